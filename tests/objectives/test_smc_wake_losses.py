"""The estimators of the inclusive KL: their bias, their spread, and their gradients, on a conjugate normal.

z ~ N(0, 1), x = 3 with noise 0.5: posterior mean 2.4. Runs are one stage of SMC, that is importance sampling from the
prior, on purpose a poor one. With log q = phi z the gradient of a loss is minus the estimated posterior mean.
"""

import math
from itertools import pairwise

import pytest
import torch

from hsivi_cli.objectives.smc_wake import (
    all_runs_loss,
    climbing_choice,
    defensive_wake_loss,
    newest_run_loss,
    pimh_accepts,
    retained_draws_loss,
    self_normalised_loss,
    sleep_loss,
    wake_loss,
)
from hsivi_cli.transitions.tempering import log_mean_exp, multinomial_resample

LOG_2PI = math.log(2 * math.pi)
TRUTH = 2.4
LOG_Z = -0.5 * 9 / 1.25 - 0.5 * math.log(1.25) - 0.5 * LOG_2PI


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normals(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def log_normal(z, mean=0.0, sd=1.0):
    return -0.5 * ((z - mean) / sd) ** 2 - math.log(sd) - 0.5 * LOG_2PI


def runs(reps, m, k, seed=0):
    """Particles, normalised log weights and log evidences of m runs, `reps` times."""
    z = normals(reps, m, k, seed=seed)
    log_weight = log_normal(3.0, z, 0.5)
    return z, log_weight.log_softmax(2), log_mean_exp(log_weight)


def estimates(loss, reps):
    """What each of `reps` observations estimates the mean of z to be; `loss` takes phi, one number each."""
    phi = torch.ones(reps, 1, 1, dtype=torch.float64, requires_grad=True)
    loss(phi).backward()
    return -reps * phi.grad[:, 0, 0]


def close(values, expected, slack=0.0):
    return abs(float(values.mean()) - expected) < 4 * float(values.std()) / math.sqrt(len(values)) + slack


@pytest.mark.parametrize(
    ("k", "reps", "naive", "ten", "hundred", "sd_ten", "sd_hundred"),
    [
        (5, 2000, 1.149, 2.110, 2.378, 0.408, 0.128),
        (20, 800, 1.806, 2.332, 2.394, 0.222, 0.061),
        (100, 300, 2.253, 2.388, 2.398, 0.090, 0.027),
    ],
)
def test_the_table_of_estimators(k, reps, naive, ten, hundred, sd_ten, sd_hundred):
    z, log_weight, log_z = runs(reps, 100, k)

    def estimate_a(m):
        return estimates(lambda phi: all_runs_loss(phi * z[:, :m], log_weight[:, :m], log_z[:, :m]), reps)

    def estimate_naive(j):
        return estimates(lambda phi: self_normalised_loss((phi * z)[:, j], log_weight[:, j]), reps)

    slack = 2e-3  # the table's own error
    assert close(estimate_naive(0), naive, slack)
    assert torch.equal(estimate_a(1), estimate_naive(0))
    a_ten, a_hundred = estimate_a(10), estimate_a(100)
    assert close(a_ten, ten, slack)
    assert close(a_hundred, hundred, slack)
    assert abs(float(a_ten.std()) / sd_ten - 1) < 0.15
    assert abs(float(a_hundred.std()) / sd_hundred - 1) < 0.15
    # naive keeps its bias however many runs there are; weighted by evidence it has none
    every = torch.stack([estimate_naive(j) for j in range(20)])
    assert abs(float(every.mean()) - naive) < 0.02
    weighted = ((log_z[:, :20].T - LOG_Z).exp() * every).mean(0)
    assert close(weighted, TRUTH)
    # (b): the same mean, more spread
    index = multinomial_resample(log_weight, torch.rand(reps, 100, 2, generator=seeded(1), dtype=torch.float64))
    kept = z.gather(2, index)
    b_hundred = estimates(lambda phi: retained_draws_loss(phi * kept, log_z), reps)
    assert close(b_hundred - a_hundred, 0.0)
    assert float(b_hundred.std()) > 1.02 * float(a_hundred.std())


def test_the_newest_run_alone_is_unbiased_in_the_end_and_stays_noisy():
    reps, k, spread = 3000, 20, {}
    for m in (10, 100):
        z, log_weight, log_z = runs(reps, m, k, seed=m)
        mean = log_mean_exp(log_z)
        found = estimates(
            lambda phi, z=z, w=log_weight, lz=log_z, mean=mean: newest_run_loss(
                (phi * z)[:, -1], w[:, -1], lz[:, -1], mean
            ),
            reps,
        )
        spread[m] = float(found.std())
        # the public code's scaling: smaller by the number of runs
        published = found / m
        assert abs(float(published.mean()) - TRUTH) > 4 * float(published.std()) / math.sqrt(reps)
    assert close(found, TRUTH, 0.02)
    assert 0.75 < spread[100] / spread[10] < 1.4
    cut = estimates(lambda phi: newest_run_loss((phi * z)[:, -1], log_weight[:, -1], log_z[:, -1], mean, 2.0), reps)
    assert float(cut.abs().max()) < 2.0 * 5
    assert float(cut.std()) < spread[100]


def pimh_average(k, chains=400, steps=300):
    z, log_weight, log_z = runs(steps, chains, k, seed=k)
    mean = (log_weight.exp() * z).sum(2)
    uniform = torch.rand(steps, chains, generator=seeded(2), dtype=torch.float64)
    state, state_log_z, total, accepted = mean[0], log_z[0], torch.zeros(chains).double(), 0.0
    for i in range(1, steps):
        takes = pimh_accepts(state_log_z, log_z[i], uniform[i])
        state, state_log_z = torch.where(takes, mean[i], state), torch.where(takes, log_z[i], state_log_z)
        accepted += float(takes.double().mean()) / (steps - 1)
        total += state * (i >= 50)
    return total / (steps - 50), accepted


def test_pimh_is_exact_on_average_for_any_number_of_particles():
    found, rate = {}, {}
    for k in (5, 40, 400):
        found[k], rate[k] = pimh_average(k, *((400, 300) if k < 400 else (100, 100)))
        assert close(found[k], TRUTH)
    assert rate[5] < rate[40] < rate[400]
    assert rate[400] > 0.75
    dead = torch.full((3,), -torch.inf).double()
    assert pimh_accepts(dead, torch.tensor([-torch.inf, -700.0, 0.0]).double(), torch.rand(3)).tolist() == [True] * 3
    assert not bool(pimh_accepts(torch.zeros(3).double(), dead, torch.rand(3)).any())


def collapsed_wake(mean, sd, reps=100, draws=10_000, seed=0):
    """The wake objective of q = N(mean, sd^2) for z ~ N(0, 10^2), x | z ~ N(z, 1), x = 12."""
    z = mean + sd * normals(reps, draws, seed=seed)
    log_q = log_normal(z, mean, sd)
    log_joint = log_normal(z, 0.0, 10.0) + log_normal(12.0, z, 1.0)
    return torch.stack([wake_loss(log_q[i : i + 1], log_joint[i : i + 1]) for i in range(reps)])


def test_wake_collapses_as_published():
    published = {1: (4.595, 1.868), 2: (0.240, 2.229), 3: (-2.327, 1.806), 4: (-4.690, 1.471)}
    published |= {5: (-6.841, 1.947), 6: (-9.439, 1.497), 7: (-11.798, 1.585)}
    means = []
    for decade, (mean, sd) in published.items():
        found = collapsed_wake(0.0, 10.0**-decade, seed=decade)
        means.append(float(found.mean()))
        assert abs(means[-1] - mean) < 3.5 * math.hypot(float(found.std()) / math.sqrt(100), sd / 10)
        assert 0.6 < float(found.std()) / sd < 1.6
    exact = collapsed_wake(1200 / 101, math.sqrt(100 / 101), reps=50)
    assert abs(float(exact.mean()) - 1.41396) < 4 * float(exact.std()) / math.sqrt(50)
    # a wrong point is preferred to the exact posterior, and each decade to the one before
    assert means[1] < float(exact.mean())
    assert all(later < earlier for earlier, later in pairwise(means))


def test_defensive_wake_does_not_collapse():
    def loss(mean, sd):
        q = mean + sd * normals(200, 500, seed=1)
        z = torch.cat([10 * normals(200, 500, seed=2), q], 1)
        return float(defensive_wake_loss(log_normal(z, mean, sd), log_normal(z, 0.0, 10.0), log_normal(12.0, z, 1.0)))

    exact = loss(1200 / 101, math.sqrt(100 / 101))
    assert abs(exact - 1.414) < 0.1
    for decade in range(1, 8):
        assert loss(0.0, 10.0**-decade) > 10 * exact


def test_defensive_weights_are_those_of_the_mixture():
    # any q: the self-normalised mean is right, which it is not if each half is weighted by its own proposal alone
    for share in (0.5, 0.2):
        prior = int(share * 4000)
        z = torch.cat([normals(100, prior, seed=3), 1 + 0.3 * normals(100, 4000 - prior, seed=4)], 1)
        phi = torch.ones(100, 1, dtype=torch.float64, requires_grad=True)
        log_q = log_normal(z, 1.0, 0.3)
        tilted = log_q.detach() + phi * z - (phi * z).detach()
        defensive_wake_loss(tilted, log_normal(z), log_normal(3.0, z, 0.5), share).backward()
        assert close(-100 * phi.grad[:, 0], TRUTH, 2e-3)


def climb(retain):
    chains, k = 3000, 4
    z = normals(chains, 1)
    for step in range(60):
        fresh = 1.5 + 0.8 * normals(chains, k - 1 + (not retain), seed=step + 1)
        every = torch.cat([z, fresh], 1) if retain else fresh
        uniform = torch.rand(chains, generator=seeded(1000 + step), dtype=torch.float64)
        chosen = climbing_choice(log_normal(every) + log_normal(3.0, every, 0.5), log_normal(every, 1.5, 0.8), uniform)
        z = every.gather(1, chosen[:, None])
    return z[:, 0]


def test_score_climbing_retains_draws_of_the_posterior():
    z = climb(retain=True)
    assert close(z, TRUTH)
    assert abs(float(z.std()) / math.sqrt(0.2) - 1) < 0.06
    assert not close(climb(retain=False), TRUTH)
    # nothing possible: stay
    nothing = torch.full((2, 3), -torch.inf).double()
    assert climbing_choice(nothing, torch.zeros(2, 3).double(), torch.tensor([0.3, 0.9]).double()).tolist() == [0, 0]


class NormalQ:
    """q = N(location, exp(log_sd)^2) with gradients by hand."""

    def __init__(self):
        self.location = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
        self.log_sd = torch.tensor(-0.3, dtype=torch.float64, requires_grad=True)

    def log_prob(self, z):
        return -0.5 * ((z - self.location) * (-self.log_sd).exp()) ** 2 - self.log_sd - 0.5 * LOG_2PI

    def scores(self, z):
        u = ((z - self.location) * (-self.log_sd).exp()).detach()
        return torch.stack([u * (-self.log_sd).exp().detach(), u**2 - 1])

    def check(self, loss, weight, z):
        """The gradient is minus the score, summed with these weights, and averaged over the first axis."""
        found = torch.stack(torch.autograd.grad(loss, [self.location, self.log_sd]))
        expected = -(weight * self.scores(z)).reshape(2, -1).sum(1) / len(z)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_gradients_are_the_formulas_and_reach_q_alone():
    q, (z, log_weight, log_z) = NormalQ(), runs(6, 4, 7)
    for constant in (z, log_weight, log_z):
        constant.requires_grad_(True)
    weight, share = log_weight.detach().exp(), log_z.detach().softmax(1)
    ratio = (log_z.detach()[:, -1] - log_mean_exp(log_z.detach())).exp()
    # where particles are given as constants to q, as the store gives them
    log_q = q.log_prob(z.detach())
    q.check(all_runs_loss(log_q, log_weight, log_z), share[..., None] * weight, z)
    q.check(retained_draws_loss(q.log_prob(z.detach()), log_z), share[..., None] / 7 * torch.ones_like(weight), z)
    log_mean = log_mean_exp(log_z)
    newest = newest_run_loss(q.log_prob(z.detach()[:, -1]), log_weight[:, -1], log_z[:, -1], log_mean)
    q.check(newest, ratio[:, None] * weight[:, -1], z[:, -1])
    q.check(self_normalised_loss(q.log_prob(z.detach()[:, 0]), log_weight[:, 0]), weight[:, 0], z[:, 0])
    one = z.detach()[:, 0]
    log_prior, log_likelihood = log_normal(z[:, 0]), log_normal(3.0, z[:, 0], 0.5)
    joint = (log_prior + log_likelihood).detach()
    fixed = q.log_prob(one).detach()
    q.check(wake_loss(q.log_prob(one), log_prior + log_likelihood), (joint - fixed).softmax(1), one)
    mixture = torch.logaddexp(fixed, log_prior.detach()) - math.log(2)
    q.check(defensive_wake_loss(q.log_prob(one), log_prior, log_likelihood), (joint - mixture).softmax(1), one)
    q.check(sleep_loss(q.log_prob(one[:, 0])), torch.ones(6).double(), one[:, 0])
    for loss in (
        all_runs_loss(q.log_prob(z.detach()), log_weight, log_z),
        newest_run_loss(q.log_prob(z.detach()[:, -1]), log_weight[:, -1], log_z[:, -1], log_mean),
        wake_loss(q.log_prob(one), log_prior + log_likelihood),
        defensive_wake_loss(q.log_prob(one), log_prior, log_likelihood),
    ):
        loss.backward(retain_graph=True)
    assert [constant.grad for constant in (z, log_weight, log_z)] == [None] * 3
    assert q.location.grad is not None


def test_particles_and_observations_of_weight_zero_add_nothing():
    z, log_weight, log_z = runs(3, 2, 4)
    log_q = (0.7 * z).requires_grad_(True)
    broken = torch.where(torch.arange(4) == 1, math.nan, log_q)  # q breaks down at a particle that has no weight
    log_weight[..., 1] = -torch.inf
    log_weight = log_weight.log_softmax(2)
    expected = all_runs_loss(log_q, log_weight, log_z)
    torch.testing.assert_close(all_runs_loss(broken, log_weight, log_z), expected)
    # no evidence at all: two observations are left of three
    without = log_z.clone()
    without[1] = -torch.inf
    rest = torch.tensor([0, 2])
    torch.testing.assert_close(
        all_runs_loss(broken, log_weight, without), 2 / 3 * all_runs_loss(log_q[rest], log_weight[rest], log_z[rest])
    )
    nothing = torch.full((3, 4), -torch.inf).double()
    dead = torch.full((3,), -torch.inf).double()
    zeros = (
        all_runs_loss(log_q, log_weight, torch.full_like(log_z, -torch.inf)),
        newest_run_loss(log_q[:, 0], log_weight[:, 0], dead, dead),
        self_normalised_loss(log_q[:, 0], nothing),
        wake_loss(log_q[:, 0], nothing),
        defensive_wake_loss(log_q[:, 0], 0 * nothing.exp(), nothing),
    )
    for loss in zeros:
        assert float(loss.detach()) == 0
        (slope,) = torch.autograd.grad(loss, log_q, allow_unused=True, retain_graph=True)
        assert float(slope.abs().sum()) == 0
