import ast
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hsivi_cli.networks.posterior_encoder as module
from hsivi_cli.errors import InputError
from hsivi_cli.networks.posterior_encoder import FAMILIES, EncoderConfig, build_encoder


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


SHIFT, SCALE = torch.tensor([3.0, -1.0, 0.5]).double(), torch.tensor([0.5, 4.0, 1.0]).double()


def built(family, dim=2, shape=(2,), seed=1, shaken=0.2, **options):
    """A small encoder with scales, away from its start, where maps are trivial."""
    small = {"hidden": (16, 16), "transforms": 2, "components": 3, **options}
    encoder = build_encoder(EncoderConfig(family, **small), dim, shape, seed=seed)
    prior = SHIFT[:dim] + SCALE[:dim] * normal(300, dim)
    encoder.fit_scales(prior, None if shape is None else 2 + normal(300, *shape, seed=1))
    with torch.no_grad():
        for number, parameter in enumerate(encoder.parameters()):
            parameter.add_(shaken * torch.randn(parameter.shape, generator=generator(number)))
    return encoder


def grid(dim, side, reach=12.0):
    axes = [SHIFT[j] + SCALE[j] * torch.linspace(-reach, reach, side, dtype=torch.float64) for j in range(dim)]
    points = torch.cartesian_prod(*axes).reshape(-1, dim)
    return points, float(torch.stack([axis[1] - axis[0] for axis in axes]).prod())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dim", "shape"), [(1, (2,)), (2, (2,)), (2, None), (1, None)])
def test_densities_integrate_to_one_and_draws_follow_them(family, dim, shape):
    encoder = built(family, dim, shape)
    x = None if shape is None else normal(1, *shape, seed=5) + 2
    points, cell = grid(dim, 300 if dim == 2 else 4000)
    mass = encoder.log_prob(points[None], x, precise=True)[0].detach().exp() * cell
    assert float(mass.sum()) == pytest.approx(1, abs=2e-3)
    drawn = encoder.draw(20_000, generator(3), x)[0]
    u, v = ((values - SHIFT[:dim]) / SCALE[:dim] for values in (drawn, points))
    for function in (lambda t: t[:, 0], lambda t: t[:, -1].abs(), lambda t: (t.sum(1) > 0.3).double()):
        found, error = function(u).mean(), function(u).std() / math.sqrt(len(u))
        assert abs(float(found - (mass * function(v)).sum())) < 4.5 * float(error) + 2e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_a_draw_knows_its_own_noise_and_observation_only(family):
    encoder = built(family, 3, (4,))
    noise, x = normal(5, 7, encoder.noise_dim), normal(5, 4, seed=2)
    together = encoder.sample(noise, x)
    for row in (0, 4):
        alone = encoder.sample(noise[row : row + 1, 2:4], x[row : row + 1])
        torch.testing.assert_close(alone, together[row : row + 1, 2:4], rtol=1e-10, atol=1e-10)
    assert together.dtype == torch.float64
    assert not together.requires_grad


def test_draws_in_blocks_are_the_same_draws(monkeypatch):
    encoder, noise, x = built("maf"), normal(5, 7, 2), normal(5, 2, seed=2)
    whole = encoder.sample(noise, x)
    for block in (1, 3, 15):
        monkeypatch.setattr(module, "BLOCK", block)
        torch.testing.assert_close(encoder.sample(noise, x), whole, rtol=1e-10, atol=1e-10)
    assert encoder.sample(noise[:, :0], x).shape == (5, 0, 2)
    assert encoder.sample(noise[:0], x[:0]).shape == (0, 7, 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_single_precision_is_close_to_double(family):
    encoder, x = built(family, 3, (4,)), normal(6, 4)
    z = encoder.draw(50, generator(), x)
    single, double = encoder.log_prob(z, x), encoder.log_prob(z, x, precise=True)
    assert single.dtype == double.dtype == torch.float64
    torch.testing.assert_close(single, double, rtol=1e-4, atol=1e-3)
    assert not torch.equal(single, double)
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_seed_decides_the_start_and_nobody_elses_numbers(family):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, same, other = (build_encoder(EncoderConfig(family), 2, (20,), seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_state_dict_keeps_scales_and_weights(family):
    encoder = built(family, 2, (20,))
    copy = build_encoder(encoder.config, 2, (20,), seed=9)
    copy.load_state_dict(encoder.state_dict())
    x, z = normal(3, 20), normal(3, 4, 2)
    assert torch.equal(copy.log_prob(z, x), encoder.log_prob(z, x))
    assert torch.equal(copy.draw(4, generator(), x), encoder.draw(4, generator(), x))


def test_a_single_gaussian_starts_as_the_prior_it_was_standardised_by():
    encoder = built("gaussian", shaken=0.0)
    prior, x = SHIFT[:2] + SCALE[:2] * normal(300, 2), normal(300, 2)
    expected = torch.distributions.Normal(prior.mean(0), prior.std(0)).log_prob(prior).sum(1)
    torch.testing.assert_close(encoder.log_prob(prior[:, None], x)[:, 0].detach(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_far_points_have_finite_densities_and_gradients(family):
    encoder = built(family)
    z = torch.tensor([[[1e6, -1e6], [3.0, -1.0]]]).double()
    found = encoder.log_prob(z, torch.tensor([[1e3, -1e3]]))
    assert bool(torch.isfinite(found).all())
    found.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in encoder.parameters() if p.grad is not None)
    assert sum(p.grad is None for p in encoder.parameters()) == 0


def test_sets_are_sets_and_flat_rows_will_do():
    encoder = built("nsf", 2, (5, 3))
    x, z = normal(2, 5, 3), normal(2, 4, 2)
    torch.testing.assert_close(encoder.log_prob(z, x.flip(1)), encoder.log_prob(z, x), rtol=1e-5, atol=1e-5)
    assert torch.equal(encoder.log_prob(z, x.flatten(1)), encoder.log_prob(z, x))


def test_a_linear_gaussian_is_learned_to_the_end():
    """NPE with the Gaussian family: prior N(0, I), x = A z + N(0, 0.25 I); the exact posterior is in the family."""
    A = normal(3, 2, seed=8)
    precision = torch.eye(2).double() + 4 * A.T @ A
    encoder = build_encoder(EncoderConfig("gaussian", hidden=(16,)), 2, (3,), seed=0)
    g = generator(1)

    def pairs(n):
        z = torch.randn(n, 2, generator=g, dtype=torch.float64)
        return z, z @ A.T + 0.5 * torch.randn(n, 3, generator=g, dtype=torch.float64)

    encoder.fit_scales(*pairs(2000))
    optimiser = torch.optim.Adam(encoder.parameters(), 2e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 400)
    for _ in range(400):
        z, x = pairs(512)
        optimiser.zero_grad()
        (-encoder.log_prob(z[:, None], x)).mean().backward()
        optimiser.step()
        schedule.step()
    z, x = pairs(4000)
    mean = x @ (4 * torch.linalg.solve(precision, A.T)).T
    exact = torch.distributions.MultivariateNormal(mean, precision_matrix=precision).log_prob(z)
    gap = exact - encoder.log_prob(z[:, None], x)[:, 0].detach()
    assert -5e-3 < float(gap.mean()) < 0.01  # KL(p || q)


def test_observations_out_of_range_are_told():
    encoder = built("gaussian")
    assert encoder.beyond(torch.tensor([[2.0, 2.0], [2.0, 60.0]]))[0] == 0
    assert encoder.beyond(torch.tensor([[2.0, 2.0], [2.0, 60.0]]))[1] > 40


@pytest.mark.parametrize(
    ("config", "dim", "line"),
    [
        (EncoderConfig("iaf"), 2, "'iaf' is not known: use nsf, maf, gaussian, mixture"),
        (EncoderConfig(transforms=0), 2, "no density"),
        (EncoderConfig(), 0, "no density of 0 parameters"),
        (EncoderConfig(embedding="set"), 2, "takes observations of shape"),
    ],
)
def test_what_cannot_be_built_is_one_line(config, dim, line):
    with pytest.raises(InputError, match=line):
        build_encoder(config, dim, (2,))


def test_observations_must_fit():
    encoder = built("gaussian")
    with pytest.raises(InputError, match="has 3 numbers, the encoder takes \\(2,\\)"):
        encoder.log_prob(normal(1, 1, 2), normal(1, 3))
    with pytest.raises(InputError, match="conditional"):
        encoder.draw(3, generator())
    with pytest.raises(InputError, match="simulated ones"):
        encoder.fit_scales(normal(5, 2))


def test_zuko_is_imported_only_where_it_is_used():
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    names = [alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names]
    assert "zuko" not in names


def test_building_a_flow_leaves_torchs_checks_as_they_were():
    script = """
from torch.distributions import Distribution
from hsivi_cli.networks.posterior_encoder import EncoderConfig, build_encoder
build_encoder(EncoderConfig(family="nsf"), 2, None, seed=0)
assert Distribution._validate_args
"""
    subprocess.run([sys.executable, "-c", script], check=True)
