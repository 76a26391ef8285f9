"""The Langevin methods as a whole: bounds, training, both parameterisations, resume, streams, and bad densities."""

import dataclasses
import math

import pytest
import torch

from hsivi_cli.engine.seeds import NoiseStreams, Stream, generator
from hsivi_cli.errors import InputError, RunError
from hsivi_cli.methods import langevin_vi
from hsivi_cli.methods.langevin_vi import KINDS, OVERDAMPED, WITH_ETA, WITH_NETWORK, Config
from hsivi_cli.targets.density import Density

D = 3
WALKING = [kind for kind in KINDS if kind != "vi"]
MIXING = torch.tensor([[1.0, 0, 0], [0.9, 0.5, 0], [-0.3, 0.4, 0.8]], dtype=torch.float64)
MEAN = torch.tensor([1.0, -0.5, 0.3], dtype=torch.float64)
LOG_Z = 0.7


def correlated_gaussian():
    """A Gaussian no mean-field q can match, with evidence exp(0.7)."""
    normal = torch.distributions.MultivariateNormal(MEAN, scale_tril=MIXING)
    return Density("gaussian", D, lambda z: normal.log_prob(z) + LOG_Z, log_z=LOG_Z)


def run(state, steps, seed=0):
    records = []
    for _ in range(steps):
        records.append(langevin_vi.step(state, None, generator(seed, Stream.TRAIN, state.step + 1)))
    return records


def elbo(state, draws=4000):
    log_weight = langevin_vi.sample(state, NoiseStreams(99, range(draws))).log_weight
    return log_weight.mean().item(), log_weight.std().item() / math.sqrt(draws)


def wake(state):
    """Give the network and every scalar values of their own, so that nothing hides behind a start at zero."""
    if state.network:
        state.network.factor.data.fill_(0.3)
    for parameter in state.parameters.values():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator(5, Stream.INIT)).double())
    return state


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_unbiased_and_bound_the_evidence(kind):
    config = Config(kind, bridges=4, initial_step=0.1 if kind in OVERDAMPED else 0.3)
    state = wake(langevin_vi.init(correlated_gaussian(), config, MEAN, torch.zeros(D)))
    draws = langevin_vi.sample(state, NoiseStreams(3, range(20000)))
    weight = (draws.log_weight - LOG_Z).exp()
    assert weight.mean().item() == pytest.approx(1, abs=5 * weight.std().item() / math.sqrt(20000))
    assert draws.log_weight.mean() < LOG_Z
    torch.testing.assert_close(draws.log_prob, state.density.log_prob(draws.z))
    assert draws.log_approx is None
    assert draws.z.dtype == draws.log_weight.dtype == torch.float64


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_the_bound_is_its_slope(kind):
    state = wake(langevin_vi.init(correlated_gaussian(), Config(kind, bridges=3), MEAN))
    noise = torch.randn((state.config.noise_rows, 4, D), generator=generator(0, Stream.INIT)).double()

    def bound():
        return langevin_vi.weigh(state, noise)[2].mean()

    gradients = torch.autograd.grad(bound(), state.trained)
    for parameter, gradient in zip(state.trained, gradients, strict=True):
        direction = torch.randn(parameter.shape, generator=generator(1, Stream.INIT)).double()
        slopes = []
        for sign in (1, -1):
            parameter.data.add_(sign * 1e-5 * direction)
            slopes.append(bound().item())
            parameter.data.sub_(sign * 1e-5 * direction)
        expected = (slopes[0] - slopes[1]) / 2e-5
        assert (gradient * direction).sum().item() == pytest.approx(expected, abs=1e-6, rel=1e-6)


@pytest.mark.parametrize("kind", ["mcd", "uha", "ldvi", "cmcd"])
def test_training_beats_mean_field_and_stays_below_the_evidence(kind):
    density = correlated_gaussian()
    mean_field = langevin_vi.init(density, Config("vi", steps=400, lr=0.02))
    run(mean_field, 400)
    config = Config(kind, bridges=4, steps=200, lr=5e-3, initial_step=0.02 if kind in OVERDAMPED else 0.2)
    state = langevin_vi.init(density, config, *langevin_vi.reference(mean_field))
    run(state, 200)
    (before, _), (after, error) = elbo(mean_field), elbo(state)
    exact = 0.5 * (torch.linalg.inv(MIXING @ MIXING.T).diagonal().log().sum() + 2 * MIXING.diagonal().log().sum())
    assert before == pytest.approx(LOG_Z - exact.item(), abs=0.03)
    assert after > before + 0.1
    assert after < LOG_Z + 3 * error


@pytest.mark.parametrize("kind", WALKING)
def test_both_parameterisations_give_the_same_bound(kind):
    density, noise = correlated_gaussian(), torch.randn(7, 4, D).double()
    stable, paper = (langevin_vi.init(density, Config(kind, bridges=5, paper=paper)) for paper in (False, True))
    with torch.no_grad():
        stable.parameters["step"].fill_(math.log(0.2))
        paper.parameters["step"].fill_(0.2)
        increments = torch.rand(6).double() + 0.1
        stable.parameters["increments"].copy_(increments.log())
        paper.parameters["increments"].copy_(increments)
        if "damping" in stable.parameters:
            stable.parameters["damping"].fill_(math.log(0.3 / 0.7))
            paper.parameters["damping"].fill_(0.3 if kind in WITH_ETA else 0.3 / 0.2)
    noise = noise[: stable.config.noise_rows]
    for a, b in zip(langevin_vi.weigh(stable, noise), langevin_vi.weigh(paper, noise), strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=0)


@pytest.mark.parametrize("kind", WALKING)
def test_the_paper_starts_next_to_plain_vi_and_keeps_its_ranges(kind):
    density = correlated_gaussian()
    state = langevin_vi.init(density, Config(kind, bridges=3, lr=0.3, paper=True), MEAN)
    noise = torch.randn(5, 6, D, generator=generator(0, Stream.INIT)).double()[: state.config.noise_rows]
    plain = langevin_vi.weigh(langevin_vi.init(density, Config("vi"), MEAN), noise)[2]
    # a step of 1e-5 moves a draw by 1e-5, or by sqrt(2e-5) where it is overdamped
    torch.testing.assert_close(
        langevin_vi.weigh(state, noise)[2], plain, atol=0.3 if kind in OVERDAMPED else 0.05, rtol=0
    )
    for _ in range(15):
        run(state, 1)
        raw = {name: parameter.detach() for name, parameter in state.parameters.items()}
        assert 1e-7 <= raw["step"] <= 0.5
        assert raw["increments"].min() >= 1e-3
        if kind in WITH_ETA:
            assert 0 <= raw["damping"] <= 0.99
        elif "damping" in raw:
            assert raw["damping"] >= 1e-3
            assert raw["damping"] * raw["step"] < 1


@pytest.mark.parametrize("kind", ["vi", "uha", "ldvi", "cmcd"])
def test_a_resumed_run_repeats_the_uninterrupted_one(kind):
    config = Config(kind, bridges=3, steps=20)
    through = langevin_vi.init(correlated_gaussian(), config)
    run(through, 6)
    stopped = langevin_vi.init(correlated_gaussian(), config)
    run(stopped, 3)
    tree = langevin_vi.state_dict(stopped)
    resumed = langevin_vi.init(correlated_gaussian(), dataclasses.replace(config, seed=7))
    langevin_vi.load_state_dict(resumed, tree)
    run(resumed, 3)
    assert resumed.step == 6
    for a, b in zip(resumed.trained, through.trained, strict=True):
        assert torch.equal(a, b)
    assert resumed.norm == through.norm


@pytest.mark.parametrize("kind", ["vi", "ula", "ldvi", "cmcd"])
def test_a_draw_does_not_depend_on_the_others(kind, monkeypatch):
    monkeypatch.setattr(langevin_vi, "ROWS_AT_ONCE", 4)
    state = wake(langevin_vi.init(correlated_gaussian(), Config(kind, bridges=3)))
    many = langevin_vi.sample(state, NoiseStreams(1, range(11)))
    few = langevin_vi.sample(state, NoiseStreams(1, [7, 2]))
    torch.testing.assert_close(few.z, many.z[[7, 2]], atol=1e-13, rtol=0)
    torch.testing.assert_close(few.log_weight, many.log_weight[[7, 2]], atol=1e-12, rtol=0)
    assert (many.z[0] - many.z[1]).abs().min() > 1e-6


def bad_beyond(limit):
    """A standard normal whose log density is NaN where the first coordinate is above `limit`."""

    def log_prob(z):
        good = -0.5 * z.square().sum(1)
        return torch.where(z[:, 0] > limit, torch.full_like(good, math.nan), good)

    return Density("bad", 2, log_prob)


@pytest.mark.parametrize("kind", ["vi", "uha", "cmcd"])
def test_bad_draws_are_left_out_and_counted(kind):
    state = langevin_vi.init(bad_beyond(0.5), Config(kind, bridges=2, samples_per_step=20, steps=30))
    records = run(state, 30)
    assert sum(record["dropped"] for record in records) == state.dropped > 0
    assert all(math.isfinite(record["elbo"]) for record in records)
    assert all(parameter.isfinite().all() for parameter in state.trained)
    assert langevin_vi.state_dict(state)["dropped"] == state.dropped


def test_a_density_that_is_never_finite_ends_the_run():
    state = langevin_vi.init(bad_beyond(-math.inf), Config("uha", bridges=2))
    before = [parameter.clone() for parameter in state.trained]
    with pytest.raises(RunError, match="50 steps without a finite gradient"):
        run(state, 60)
    assert all(torch.equal(a, b) for a, b in zip(state.trained, before, strict=True))


def test_an_outlier_moves_the_parameters_no_further_than_usual():
    state = langevin_vi.init(correlated_gaussian(), Config("uha", bridges=2, steps=100))
    run(state, 10)
    usual = state.norm
    mean = state.optimiser.mean.clone()
    langevin_vi.ascend(state, 1e9 * langevin_vi.weigh(state, torch.randn(4, 5, D).double())[2].mean())
    assert (state.optimiser.mean - 0.9 * mean).norm().item() == pytest.approx(0.1 * 4 * usual, rel=1e-6)


def test_wrong_configurations_are_refused():
    with pytest.raises(InputError, match="--method nuts is unknown: choose one of vi, ula"):
        langevin_vi.init(correlated_gaussian(), Config("nuts"))
    with pytest.raises(InputError, match="--bridges 0 is too small"):
        langevin_vi.init(correlated_gaussian(), Config("ldvi", bridges=0))


def test_only_the_factor_of_the_network_learns_at_first():
    for kind in WITH_NETWORK:
        state = langevin_vi.init(correlated_gaussian(), Config(kind, bridges=2))
        noise = torch.randn(state.config.noise_rows, 4, D).double()
        gradients = torch.autograd.grad(langevin_vi.weigh(state, noise)[2].mean(), list(state.network.parameters()))
        names = [name for name, _ in state.network.named_parameters()]
        moved = {name for name, gradient in zip(names, gradients, strict=True) if gradient.abs().max() > 0}
        assert moved == {"factor"}
