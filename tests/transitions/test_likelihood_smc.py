"""Likelihood-tempered SMC: unbiased in orders A and B, not in the published one; every sampler for itself."""

import math
from dataclasses import replace

import pytest
import torch

from hsivi_cli.errors import InputError
from hsivi_cli.transitions.likelihood_smc import SmcConfig, freeze, run_smc
from hsivi_cli.transitions.particle_moves import PriorLikelihood, given_observations
from hsivi_cli.transitions.tempering import log_mean_exp

LOG_2PI = math.log(2 * math.pi)
NOISE = 0.3
GEOMETRIC = (*(0.01 ** (1 - i / 11) for i in range(11)), 1.0)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal_prior(dim):
    def sample(n, generator):
        return torch.randn(n, dim, generator=generator, dtype=torch.float64)

    return sample, lambda z: -0.5 * z.square().sum(-1) - 0.5 * dim * LOG_2PI


def gaussian(x):
    """z ~ N(0, I), x | z ~ N(z, 0.3^2 I): the posterior and the evidence are known."""
    dim = x.shape[1]
    sample, log_prior = normal_prior(dim)

    def log_likelihood(z, x):
        return -0.5 * ((z - x[:, None]) / NOISE).square().sum(-1) - dim * (math.log(NOISE) + 0.5 * LOG_2PI)

    return given_observations(dim, sample, log_prior, log_likelihood, x)


def log_evidence(x):
    variance = 1 + NOISE**2
    return -0.5 * x.square().sum(1) / variance - 0.5 * x.shape[1] * (math.log(variance) + LOG_2PI)


def repeated(dim, samplers, value=1.5):
    return torch.full((samplers, dim), value, dtype=torch.float64)


def moments(run):
    weight = run.log_weight.exp()[..., None]
    mean = (weight * run.z).sum(1)
    return mean, (weight * (run.z - mean[:, None]).square()).sum(1).sqrt()


def mean_and_error(values):
    return float(values.mean()), float(values.std()) / math.sqrt(len(values))


def frozen_run(order, samplers=400, dim=2, particles=40, kernel="hmc", **fields):
    config = SmcConfig(particles=particles, kernel=kernel, moves=1, order=order, schedule=GEOMETRIC, **fields)
    pilot = run_smc(gaussian(repeated(dim, 1)), 1, replace(config, particles=500), seeded(1))
    return run_smc(gaussian(repeated(dim, samplers)), samplers, config, seeded(2), freeze(pilot))


@pytest.mark.parametrize(("order", "kernel"), [("A", "hmc"), ("B", "hmc"), ("B", "mala"), ("A", "random-walk")])
def test_frozen_samplers_are_unbiased(order, kernel):
    run = frozen_run(order, kernel=kernel)
    ratio = (run.log_z - log_evidence(repeated(2, 1))).exp()
    mean, error = mean_and_error(ratio)
    assert error < 0.05
    assert abs(mean - 1) < 4 * error
    # E Zhat sum w f = Z E f: the moments of the posterior, however few the particles
    posterior = 1.5 / (1 + NOISE**2)
    weighted, error = mean_and_error(ratio * (moments(run)[0][:, 0] - posterior))
    assert abs(weighted) < 4 * error


def test_the_published_order_is_biased():
    run = frozen_run("published")
    mean, error = mean_and_error((run.log_z - log_evidence(repeated(2, 1))).exp())
    assert mean > 1 + 20 * error


def test_never_resampling_is_annealed_importance_sampling_and_unbiased_too():
    run = frozen_run("B", particles=80, ess_share=1e-6)
    assert float(run.ess[:, -1].min()) < 40
    mean, error = mean_and_error((run.log_z - log_evidence(repeated(2, 1))).exp())
    assert abs(mean - 1) < 4 * error


@pytest.mark.parametrize("order", ["A", "B", "published"])
def test_adaptive_evidence_mean_and_sd(order):
    x = repeated(5, 10)
    run = run_smc(gaussian(x), 10, SmcConfig(particles=2000, moves=2, order=order), seeded(3))
    error = abs(float((run.log_z - log_evidence(x)).mean()))
    mean, sd = (part.mean(0) for part in moments(run))
    truth = NOISE / math.sqrt(1 + NOISE**2)
    if order == "published":  # the note's case: log Z of -5.64 in place of -9.97, sd 12% too small
        assert error > 2
        assert float(sd.max()) < 0.95 * truth
        return
    assert error < 0.05
    assert float((mean / (1.5 / (1 + NOISE**2)) - 1).abs().max()) < 0.03
    assert float((sd / truth - 1).abs().max()) < 0.03


def test_ten_dimensions():
    # trajectories twice as long would bring the squares back to where they were: log Z is 0.1 off then
    x = repeated(10, 20)
    run = run_smc(gaussian(x), 20, SmcConfig(particles=1000, order="A", leapfrogs=3), seeded(3))
    assert abs(float((run.log_z - log_evidence(x)).mean())) < 0.06


@pytest.mark.parametrize("resampling", ["systematic", "stratified", "multinomial"])
def test_adaptive_steps_halve_the_effective_sample_size_and_end_at_one(resampling):
    x = 2 * torch.randn(12, 3, generator=seeded(), dtype=torch.float64)
    run = run_smc(gaussian(x), 12, SmcConfig(particles=400, resampling=resampling), seeded(4))
    assert int(run.stages.min()) < int(run.stages.max())
    for i, stages in enumerate(run.stages.tolist()):
        path = run.temperatures[i, : stages + 1]
        assert path[0] == 0
        assert path[-1] == 1
        assert bool((path.diff() > 0).all())
        assert bool((run.temperatures[i, stages:] == 1).all())
        assert float((run.ess[i, : stages - 1] - 200).abs().max()) < 1
        assert float(run.ess[i, stages - 1]) >= 199
    torch.testing.assert_close(run.log_weight.exp().sum(1), torch.ones(12).double())
    assert float((run.log_z - log_evidence(x)).abs().max()) < 1


def test_one_stage_is_importance_sampling_from_the_prior():
    x = repeated(2, 3)
    run = run_smc(gaussian(x), 3, SmcConfig(particles=50, order="A", schedule=(1.0,)), seeded(5))
    log_likelihood = gaussian(x).log_likelihood(run.z)
    torch.testing.assert_close(run.log_z, log_mean_exp(log_likelihood))
    torch.testing.assert_close(run.log_weight, log_likelihood.log_softmax(1))
    torch.testing.assert_close(run.log_prior, gaussian(x).log_prior(run.z))


def two_moons(x):
    """theta uniform on [-1, 1]^2 through a logistic; the exact likelihood, with its polar Jacobian."""

    def log_likelihood(z, x):
        theta = 2 * z.sigmoid() - 1
        u = x[:, None, 0] + theta.sum(-1).abs() / math.sqrt(2) - 0.25
        v = x[:, None, 1] - (theta[..., 1] - theta[..., 0]) / math.sqrt(2)
        rho = torch.hypot(u, v)
        value = -0.5 * ((rho - 0.1) / 0.01).square() - math.log(0.01 * math.pi) - 0.5 * LOG_2PI - rho.log()
        return torch.where(u > 0, value, -math.inf)

    def sample(n, generator):
        return torch.rand(n, 2, generator=generator, dtype=torch.float64).logit()

    def log_prior(z):
        return (torch.nn.functional.logsigmoid(z) + torch.nn.functional.logsigmoid(-z)).sum(-1)

    return given_observations(2, sample, log_prior, log_likelihood, x)


def test_two_moons():
    config = SmcConfig(particles=2000, kernel="random-walk", moves=5)
    run = run_smc(two_moons(torch.zeros(20, 2).double()), 20, config, seeded(1))
    assert abs(float(run.log_z.mean()) - math.log(0.5)) < 0.05
    theta, weight = 2 * run.z.sigmoid() - 1, run.log_weight.exp()
    total = theta.sum(-1)
    assert abs(float((weight * (total > 0)).sum(1).mean()) - 0.5) < 0.05
    assert abs(float((weight * total.abs()).sum(1).mean()) - 0.4437) < 0.003
    across = theta[..., 1] - theta[..., 0]
    assert abs(float((weight * across.square()).sum(1).mean().sqrt()) - 0.1005) < 0.003


def half_line(shares, nan=False):
    """Sampler i's likelihood is 1 above a point with prior mass `shares[i]` there, else 0 (or NaN)."""
    sample, log_prior = normal_prior(1)
    edges = torch.distributions.Normal(0.0, 1.0).icdf(1 - torch.tensor(shares)).double()

    def log_likelihood(z, edge):
        return torch.where(z[..., 0] > edge[:, None], 0 * z[..., 0], math.nan if nan else -math.inf)

    return given_observations(1, sample, log_prior, log_likelihood, edges)


@pytest.mark.parametrize("kernel", ["hmc", "mala", "random-walk"])
@pytest.mark.parametrize("order", ["A", "B", "published"])
@pytest.mark.parametrize("nan", [False, True], ids=["zero", "nan"])
def test_impossible_particles_weigh_nothing(kernel, order, nan):
    shares = [0.5, 0.0, 0.05, 1.0]
    config = SmcConfig(particles=400, kernel=kernel, order=order)
    run = run_smc(half_line(shares, nan), 4, config, seeded(6))
    assert bool(run.z.isfinite().all())
    torch.testing.assert_close(run.log_weight.exp().sum(1), torch.ones(4).double())
    assert run.log_z[1] == -math.inf
    assert run.log_z[3] == 0
    assert bool((run.temperatures[:, -1] == 1).all())
    for i in (0, 2):
        alive = run.log_likelihood[i] == 0
        assert bool(alive[run.log_weight[i] > -math.inf].all())
        if order != "published":
            assert abs(float(run.log_z[i].exp()) / shares[i] - 1) < 5 * math.sqrt((1 - shares[i]) / shares[i] / 400)
    # the one without any evidence has not touched the others
    alone = run_smc(half_line(shares[:1], nan), 1, config, seeded(6))
    torch.testing.assert_close(alone.log_z, run.log_z[:1])
    torch.testing.assert_close(alone.z, run.z[:1])


def test_impossible_particles_may_idle():
    # a finished sampler stays at temperature 1 with its dead particles, where a step of 0 meets a likelihood of 0
    half = half_line([0.8, 0.5])
    sharp = torch.tensor([[0.0], [40.0]], dtype=torch.float64)
    slow = replace(half, log_likelihood=lambda z: half.log_likelihood(z) - sharp * z[..., 0].square(), take=None)
    run = run_smc(slow, 2, SmcConfig(particles=100, kernel="random-walk", order="A"), seeded(6))
    assert run.stages[0] == 1
    assert run.stages[1] > 2
    assert bool((run.log_likelihood[0] == -math.inf).any())
    assert abs(float(run.log_z[0].exp()) - 0.8) < 0.2
    assert bool(run.z.isfinite().all())


def test_few_survivors_spread_again():
    # 2 in 1000 draws of the prior are possible: the cloud grows from them into the whole posterior
    run = run_smc(half_line([0.002] * 20), 20, SmcConfig(particles=1000, kernel="random-walk", moves=20), seeded(7))
    assert abs(float(run.log_z.exp().mean()) / 0.002 - 1) < 4 * math.sqrt(1 / 0.002 / 20_000)
    survived = run.log_z > -math.inf
    assert int(survived.sum()) > 10
    assert bool((run.least_ess[survived] < 10).all())
    assert bool((run.least_ess[~survived] == 0).all())
    tail = torch.distributions.Normal(0.0, 1.0)
    edge = tail.icdf(torch.tensor(0.998))
    truth = float(tail.log_prob(edge).exp() / 0.002)
    assert abs(float(moments(run)[0][survived].mean()) - truth) < 0.03


@pytest.mark.parametrize("kernel", ["hmc", "random-walk"])
@pytest.mark.parametrize("order", ["A", "B"])
def test_a_sampler_does_not_see_its_neighbours(kernel, order):
    x = torch.tensor([[1.0, 0.2], [0.1, 0.0], [-6.0, 5.0], [2.0, 2.0], [0.3, -9.0]], dtype=torch.float64)
    config = SmcConfig(particles=60, kernel=kernel, order=order)
    few = run_smc(gaussian(x[:2]), 2, config, seeded(8))
    many = run_smc(gaussian(x), 5, config, seeded(8))
    assert int(few.stages.max()) < int(many.stages.max())
    torch.testing.assert_close(few.z, many.z[:2], rtol=0, atol=1e-9)
    torch.testing.assert_close(few.log_z, many.log_z[:2])
    # without take() the finished idle along, and nothing else changes
    idle = run_smc(replace(gaussian(x), take=None), 5, config, seeded(8))
    torch.testing.assert_close(idle.z, many.z, rtol=0, atol=1e-9)
    torch.testing.assert_close(idle.log_z, many.log_z)
    torch.testing.assert_close(idle.ess, many.ess, equal_nan=True)
    assert idle.evaluations > many.evaluations


def test_runs_differ_between_seeds_and_samplers_and_repeat_themselves():
    x = repeated(2, 2)
    config = SmcConfig(particles=50)
    first, again, other = (run_smc(gaussian(x), 2, config, seeded(s)) for s in (9, 9, 10))
    assert torch.equal(first.z, again.z)
    assert not torch.equal(first.z[0], first.z[1])
    assert not torch.equal(first.z, other.z)
    assert not first.z.requires_grad


def test_the_steps_and_shapes_fit_the_cloud():
    # scales of 0.01 and 100, correlated: accepted as often as is best all the same
    sample, log_prior = normal_prior(2)
    scale = torch.tensor([0.01, 100.0], dtype=torch.float64)

    def log_likelihood(z, x):
        u = z / scale
        return -0.5 * (((u[..., 0] - u[..., 1]) / 0.1).square() + (u[..., 0] - x[:, None, 0]).square())

    target = given_observations(
        2, lambda n, g: scale * sample(n, g), lambda z: log_prior(z / scale), log_likelihood, repeated(1, 4)
    )
    # HMC is accepted more often in few dimensions, for its steps are at most a quarter period
    for kernel, best in (("hmc", 0.87), ("mala", 0.57), ("random-walk", 0.3)):
        run = run_smc(target, 4, SmcConfig(particles=500, kernel=kernel, moves=8), seeded(11))
        last = run.acceptance.gather(1, run.stages[:, None] - 1)
        assert abs(float(last.mean()) - best) < 0.12
        # posterior: u0 - u1 = N(0, 0.01) times normals; u0 about 1/3 to 1/2
        u = run.z / scale
        assert abs(float((u[..., 0] - u[..., 1]).std()) - 0.1) < 0.02


def test_given_gradients_and_counted_evaluations():
    x = repeated(3, 4)
    plain, calls = gaussian(x), []

    def gradient(z):
        return -z, (x[:, None] - z) / NOISE**2

    def counted(z):
        calls.append(z.shape[0] * z.shape[1])
        return plain.log_likelihood(z)

    config = SmcConfig(particles=50)
    given = replace(plain, gradient=gradient, take=None)
    expected = run_smc(replace(plain, take=None), 4, config, seeded(12))
    torch.testing.assert_close(run_smc(given, 4, config, seeded(12)).z, expected.z, rtol=0, atol=1e-8)
    found = run_smc(replace(plain, log_likelihood=counted, take=None), 4, config, seeded(12))
    assert found.evaluations == sum(calls)


def test_bad_input_is_one_clear_line():
    for fields in ({"particles": 1}, {"moves": -1}, {"ess_share": 1.0}, {"schedule": (0.5, 0.9)}, {"schedule": ()}):
        with pytest.raises(InputError):
            SmcConfig(**fields)
    with pytest.raises(InputError, match="ascends"):
        SmcConfig(schedule=(0.5, 0.5, 1.0))
    good = gaussian(repeated(2, 3))
    for fault in (
        {"sample_prior": lambda n, g: torch.zeros(n, 5).double()},
        {"log_likelihood": lambda z: z.sum(1)},
        {"log_prior": lambda z: z},
    ):
        with pytest.raises(InputError, match="shape"):
            run_smc(replace(good, **fault), 3, SmcConfig(particles=10), seeded())
    assert isinstance(good, PriorLikelihood)
