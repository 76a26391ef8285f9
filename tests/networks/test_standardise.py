import pytest
import torch

from hsivi_cli.errors import InputError
from hsivi_cli.networks.standardise import Standardiser, robust_scales


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fitted(values, *arguments, **options):
    standardiser = Standardiser(tuple(values.shape[1:]), *arguments, **options)
    standardiser.fit(values)
    return standardiser


def test_columns_come_out_standard_and_go_back():
    values = draws(5000, 3) * torch.tensor([1e-6, 1.0, 1e8]) + torch.tensor([5.0, -2.0, 1e9])
    standardiser = fitted(values)
    u = standardiser(values)
    torch.testing.assert_close(u.mean(0), torch.zeros(3).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(u.std(0), torch.ones(3).double())
    torch.testing.assert_close(standardiser.inverse(u), values)


def test_the_jacobian_is_that_of_the_map():
    standardiser = fitted(draws(200, 3) * 7)
    jacobian = torch.autograd.functional.jacobian(standardiser, torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(torch.linalg.slogdet(jacobian).logabsdet, standardiser.log_jacobian)


@pytest.mark.parametrize("level", [0.0, 3.0, 1e20, -1e-20])
def test_a_column_that_does_not_move_keeps_its_scale(level):
    values = torch.stack([torch.full((100,), level, dtype=torch.float64), draws(100)], 1)
    standardiser = fitted(values)
    assert standardiser.scale[0] == 1
    assert bool((standardiser(values)[:, 0] == 0).all())


def test_heavy_tails_do_not_set_the_scale_and_are_squashed_for_networks():
    cauchy = torch.tan(torch.pi * (torch.rand(20_000, 1, generator=torch.Generator().manual_seed(1)).double() - 0.5))
    values = torch.cat([cauchy, draws(20_000, 1)], 1)
    _, scale, heavy = robust_scales(values)
    assert heavy.tolist() == [True, False]
    assert 1.3 < scale[0] < 1.7  # quartiles of a Cauchy are +-1
    assert fitted(values, squash=True)(values).abs().max() < 20
    plain = fitted(values)
    torch.testing.assert_close(plain.inverse(plain(values)), values)  # densities are of the plain map


def test_counts_that_are_mostly_zero_have_a_scale():
    values = torch.zeros(1000, 1, dtype=torch.float64)
    values[:30] = 4.0
    assert float(fitted(values).scale) == pytest.approx(float(values.std()))


def test_sets_and_images_pool_their_scales():
    rows = draws(500, 7, 2) * torch.tensor([2.0, 5.0])
    sets = fitted(rows, "last")
    torch.testing.assert_close(sets.scale, rows.reshape(-1, 2).std(0))
    torch.testing.assert_close(sets(rows.flip(1)), sets(rows).flip(1))
    pictures = draws(300, 2, 4, 4) * torch.tensor([1.0, 3.0])[:, None, None]
    pictures[:, :, 0, 0] = 0.0  # a dead pixel
    channels = fitted(pictures, "channel")
    assert channels.scale.shape == (2, 1, 1)
    assert channels(pictures).abs().max() < 7


def test_rows_that_are_not_finite_are_left_out():
    values = draws(100, 2)
    spoiled = torch.cat([values, torch.tensor([[torch.nan, 0.0], [1.0, torch.inf]])])
    torch.testing.assert_close(fitted(spoiled).scale, fitted(values).scale)
    with pytest.raises(InputError, match="1 finite rows"):
        fitted(spoiled[99:])


def test_what_lies_beyond_is_measured_in_scales():
    values = draws(1000, 2) * 4
    standardiser = fitted(values)
    far = torch.stack([values[0], values.amax(0) + torch.tensor([0.0, 4.0]), torch.tensor([torch.nan, 0.0])])
    found = standardiser.beyond(far)
    assert found[0] == 0
    assert float(found[1]) == pytest.approx(1, rel=0.1)
    assert found[2] == torch.inf


def test_the_state_dict_keeps_everything():
    values = draws(50, 2)
    copy = Standardiser((2,))
    assert torch.equal(copy(values), values)
    copy.load_state_dict(fitted(values).state_dict())
    assert torch.equal(copy(values), fitted(values)(values))
    assert copy.scale.dtype == torch.float64
