import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch.distributions import Exponential, LogNormal, Normal

import hsivi_cli.targets.amortised as module
from hsivi_cli import Model, Parameter
from hsivi_cli.errors import InputError, RunError
from hsivi_cli.targets.amortised import amortise, load_amortised, simulate_pairs
from hsivi_cli.targets.model import density_of

OBSERVED = torch.tensor([[0.5, -0.2, 1.0], [2.0, 1.5, 1.0], [-1.0, 0.0, 3.0]]).double()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def location_scale(**changed):
    """y_i ~ N(m, s), with m ~ N(0, 2) and log s ~ N(0, 1/2)."""
    fields = {
        "parameters": [Parameter("m"), Parameter("s", support="positive")],
        "log_prior": lambda p: Normal(0, 2).log_prob(p.m) + LogNormal(0, 0.5).log_prob(p.s),
        "log_likelihood": lambda p, y: Normal(p.m, p.s).log_prob(y),
        "simulate": lambda p, generator: Normal(p.m, p.s).sample((3,)),
        "sample_prior": lambda generator: {"m": Normal(0, 2).sample(), "s": LogNormal(0, 0.5).sample()},
        "observed": OBSERVED[0],
    }
    return Model(**{**fields, **changed})


def branching(p, y):
    return Normal(p.m, p.s).log_prob(y) if p.m > 0 else Normal(p.m, p.s).log_prob(y).sum()


def test_prior_times_likelihood_is_the_posterior_of_each_observation():
    target, z = amortise(location_scale(), "m", OBSERVED), normal(3, 6, 2)
    found = target.log_prior(z) + target.log_likelihood(z, OBSERVED)
    assert found.shape == (3, 6)
    for row, observed in enumerate(OBSERVED):
        density = density_of(location_scale(observed=observed))
        torch.testing.assert_close(found[row], density.log_prob(z[row]), rtol=1e-12, atol=1e-12)
    assert target.coordinates == ("m", "s")
    torch.testing.assert_close(target.constrain(z[0])["s"], z[0, :, 1].exp())


def test_gradients_are_those_of_the_density():
    target, z = amortise(location_scale(), "m", OBSERVED), normal(3, 6, 2).requires_grad_(True)
    total = target.log_prior(z).sum() + target.log_likelihood(z, OBSERVED).sum()
    (found,) = torch.autograd.grad(total, z)
    density = density_of(location_scale(observed=OBSERVED[2]))
    torch.testing.assert_close(found[2], density.gradient(z[2].detach()), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("block", [1, 7, 23])
def test_blocks_make_no_difference(block, monkeypatch):
    target, z = amortise(location_scale(), "m", OBSERVED), normal(3, 6, 2)
    prior, likelihood = target.log_prior(z), target.log_likelihood(z, OBSERVED)
    monkeypatch.setattr(module, "BLOCK_ENTRIES", block)
    torch.testing.assert_close(target.log_prior(z), prior, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(target.log_likelihood(z, OBSERVED), likelihood, rtol=1e-13, atol=1e-13)
    assert target.simulate(z[0], generator()).shape == (6, 3)
    assert target.log_likelihood(z[:, :0], OBSERVED).shape == (3, 0)


def test_what_vmap_cannot_batch_is_run_in_a_loop_and_said():
    def over_y(p, y):  # vmap over parameters is fine, over observations it is not
        return Normal(p.m, p.s).log_prob(y if bool(y[0] > 0) else y.flip(0)).sum()

    z, plain = normal(3, 4, 2), amortise(location_scale(), "m", OBSERVED)
    for likelihood in (over_y, lambda p, y: branching(p, y).sum()):
        target = amortise(location_scale(log_likelihood=likelihood), "m", OBSERVED)
        assert any("slowly" in fact for fact in target.facts)
        torch.testing.assert_close(target.log_likelihood(z, OBSERVED), plain.log_likelihood(z, OBSERVED))
    assert plain.facts == ()


def test_where_the_arithmetic_breaks_down_a_point_is_impossible():
    def log_likelihood(p, y):  # positive definite for -4 < m < 8
        covariance = torch.eye(3) + p.m * (torch.ones(3, 3) - torch.eye(3)) / 8
        return torch.distributions.MultivariateNormal(
            torch.zeros(3), scale_tril=torch.linalg.cholesky(covariance)
        ).log_prob(y)

    target = amortise(location_scale(log_likelihood=log_likelihood), "m", OBSERVED)
    z = torch.zeros(3, 5, 2).double()
    z[1, 2, 0], z[2, 0, 0] = -9.0, 9.0
    z.requires_grad_(True)
    found = target.log_likelihood(z, OBSERVED)
    assert (found == -torch.inf).nonzero().tolist() == [[1, 2], [2, 0]]
    (gradient,) = torch.autograd.grad(found[torch.isfinite(found)].sum(), z)
    assert bool(torch.isfinite(gradient).all())


def test_nan_and_plus_infinity_are_impossible_too():
    def log_likelihood(p, y):
        return Normal(p.m, p.s).log_prob(y).sum() + torch.where(
            p.m > 2, torch.where(p.m > 3, torch.inf, torch.nan), 0.0
        )

    z = torch.tensor([[[0.0, 0.0], [2.5, 0.0], [3.5, 0.0]]]).double()
    found = amortise(location_scale(log_likelihood=log_likelihood)).log_likelihood(z, OBSERVED[:1])
    assert (found == -torch.inf).tolist() == [[False, True, True]]


@pytest.mark.parametrize("batched", [True, False])
def test_prior_draws_have_the_law_of_the_prior(batched):
    """Batched by vmap, and one by one where torch cannot (Exponential draws in place)."""
    prior = LogNormal(0, 0.5) if batched else Exponential(1.0)
    model = location_scale(
        log_prior=lambda p: Normal(0, 2).log_prob(p.m) + prior.log_prob(p.s),
        sample_prior=lambda generator: {"m": Normal(0, 2).sample(), "s": prior.sample()},
    )
    target = amortise(model, "m", OBSERVED)
    n = 20_000 if batched else 2000
    z = target.sample_prior(n, generator(1))
    assert torch.equal(z, target.sample_prior(n, generator(1)))
    assert len(torch.unique(z)) > 1.99 * n
    z.requires_grad_(True)
    (score,) = torch.autograd.grad(target.log_prior(z).sum(), z)
    # E score = 0 and E z score = -1 under the law whose score it is
    for statistic in (score, z.detach() * score + 1):
        assert bool((statistic.mean(0).abs() < 4.5 * statistic.std(0) / math.sqrt(n)).all())


def test_numpys_random_numbers_are_not_repeated_in_a_batch():
    rng = np.random.default_rng(0)
    model = location_scale(
        sample_prior=lambda generator: {"m": torch.tensor(rng.normal()), "s": LogNormal(0, 0.5).sample()}
    )
    z = amortise(model, "m", OBSERVED).sample_prior(50, generator())
    assert len(torch.unique(z[:, 0])) == 50


def test_simulations_follow_the_seed_and_lost_ones_are_counted():
    def simulate(p, generator):
        return Normal(p.m, p.s).sample((3,)) + torch.where(p.m > 2, torch.nan, 0.0)

    target = amortise(location_scale(simulate=simulate), "m", OBSERVED)
    found = simulate_pairs(target, 2000, generator())
    again = simulate_pairs(target, 2000, generator())
    assert torch.equal(found.x, again.x)
    assert len(found.z) == len(found.x) == 2000 - found.lost
    assert float(found.z[:, 0].max()) <= 2
    assert found.lost / 2000 == pytest.approx(0.1587, abs=0.04)  # P(m > 2)
    residual = (found.x - found.z[:, :1]) / found.z[:, 1:].exp()
    assert float(residual.mean()) == pytest.approx(0, abs=0.06)
    assert float(residual.std()) == pytest.approx(1, abs=0.05)
    mostly = location_scale(
        simulate=lambda p, g: Normal(p.m, p.s).sample((3,)) + torch.where(p.m > 0.5, 0.0, torch.nan)
    )
    with pytest.raises(InputError, match="simulate returned NaN"):
        amortise(mostly, "m", OBSERVED)
    with pytest.raises(RunError, match="of 500 simulations are not finite"):
        simulate_pairs(amortise(mostly, "m", OBSERVED, report=module.Report()), 500, generator())
    with pytest.raises(InputError, match="simulations need sample_prior="):
        simulate_pairs(amortise(location_scale(sample_prior=None), "m", OBSERVED), 5, generator())


def test_a_simulator_that_breaks_down_loses_those_simulations_only():
    def simulate(p, generator):
        if bool(p.m > 2):
            raise ValueError("no steady state")
        return Normal(p.m, p.s).sample((3,))

    found = simulate_pairs(amortise(location_scale(simulate=simulate), "m", OBSERVED), 200, generator())
    assert 10 < found.lost < 60
    assert float(found.z[:, 0].max()) <= 2


@pytest.mark.parametrize(
    ("likelihood", "line"),
    [
        (lambda p: Normal(p.m, p.s).log_prob(OBSERVED[0]), "knows one observation only"),
        (lambda p, y: Normal(p.m, p.s).log_prob(OBSERVED[0]), "the same for all observations"),
    ],
)
def test_a_likelihood_that_knows_its_own_data_only_is_refused(likelihood, line):
    with pytest.raises(InputError, match=line):
        amortise(location_scale(log_likelihood=likelihood), "m", OBSERVED)
    one = amortise(location_scale(log_likelihood=likelihood))
    assert one.log_likelihood(normal(1, 4, 2), one.observed).shape == (1, 4)


FILE = """
import torch
from torch.distributions import Normal
from hsivi_cli import Model, Parameter

def model(data):
    y = torch.tensor(data[["a", "b"]].iloc[0].to_numpy(), dtype=torch.float64)
    return Model([Parameter("m")], lambda p: Normal(0, 1).log_prob(p.m), lambda p, y: Normal(p.m, 1).log_prob(y),
                 generated=lambda p: {"square": p.m**2}, observed=y)
"""


def test_a_file_and_a_table_give_one_observation_a_row(tmp_path):
    path = tmp_path / "my.py"
    path.write_text(FILE)
    table = pd.DataFrame({"a": [1.0, 2.0, 3.0], "b": [0.5, 0.0, -1.0]}, index=[7, 8, 9])
    target = load_amortised(path, table)
    assert target.observed.tolist() == table.to_numpy().tolist()
    assert set(target.constrain(normal(4, 1))) == {"m", "square"}
    assert (target.sample_prior, target.simulate) == (None, None)
    table.loc[8, "b"] = math.nan
    with pytest.raises(
        InputError, match=r"row 2 of the table: my\.py, line 8: Model: observed must be a vector of finite"
    ):
        load_amortised(path, table)
    with pytest.raises(InputError, match="a table"):
        load_amortised(path, {"a": 1})
    path.write_text(FILE.replace("p.m**2", "p.m * y[0]"))
    assert set(load_amortised(path, table.dropna()).constrain(normal(4, 1))) == {"m"}
