"""Distillation of a Gaussian, where everything is closed form: real steps must move every layer to its bridge.

Data N(0, v) a pixel; teacher, student and critic are linear, `eps = slope[t] x`, so that the student's marginals are
Gaussian with variances that follow from its slopes, and the best student of every layer is known.
"""

import dataclasses
from pathlib import Path

import pytest
import torch

from hsivi_cli.bridges.schedule import make_grid, schedule_from_config
from hsivi_cli.engine.optimisation import share_of
from hsivi_cli.engine.seeds import StepDraws, Stream, generator
from hsivi_cli.kernels.critic_loss import critic_reference
from hsivi_cli.kernels.student_loss import fisher_reference, gap_reference, surrogate_reference
from hsivi_cli.methods import hsivi_sm
from hsivi_cli.methods.hsivi_sm import DistillConfig
from hsivi_cli.methods.student import chain_states
from hsivi_cli.targets.score_net import ScoreNet

SCHEDULE = schedule_from_config({})
DATA_VARIANCE = 0.1
SIDE = 4


class LinearNet(torch.nn.Module):
    """`eps = slope[t] * x`; it answers like a UNet2DModel."""

    def __init__(self, slope):
        super().__init__()
        self.slope = torch.nn.Parameter(slope)
        self.config = {"sample_size": SIDE, "in_channels": 1}

    def forward(self, x, t):
        return type("Output", (), {"sample": self.slope[t].reshape(-1, 1, 1, 1) * x})()


def bridge_variance(t):
    return SCHEDULE.abar[t] * DATA_VARIANCE + 1 - SCHEDULE.abar[t]


def make_state(**settings):
    t = torch.arange(1000)
    best = ((1 - SCHEDULE.abar).sqrt() / bridge_variance(t)).float()
    teacher = LinearNet(best).requires_grad_(False)
    defaults = {"steps": 400, "batch": 256, "lr_student": 1e-2, "lr_critic": 5e-2, "clip": 1e9, "warmup": 1}
    config = DistillConfig(grid=make_grid("quad", 4, SCHEDULE), **(defaults | settings))
    return hsivi_sm.init(ScoreNet(teacher, SCHEDULE, Path("gaussian"), ""), config)


def marginal_variances(state, slopes):
    """Variance of x_k, k = K-1 .. 0, from x_K ~ N(0, 1); log_gamma is taken at its mean."""
    layers, found, variance = state.layers, [], torch.ones((), dtype=torch.float64)
    scale = state.log_gamma.detach().double().exp().mean()
    for k in range(layers.nfe, 0, -1):
        gain = layers.A[k] + layers.B[k] * slopes[layers.times[k]].double()
        variance = gain**2 * variance + (layers.c1[k] * scale) ** 2
        found.append(variance)
    return torch.stack(found)


def step_draws(step):
    return StepDraws(0, step, generator(0, Stream.TRAIN, step))


def log_ratio(state):
    """How far the log variances of all layers are from their bridges."""
    times = state.layers.times.flip(0)[1:]
    return (marginal_variances(state, state.student.slope.detach()) / bridge_variance(times)).log()


@pytest.mark.parametrize("objective", ["diffused-kl", "diffused-fisher"])
def test_steps_move_every_layer_to_its_bridge(objective):
    state = make_state(objective=objective)
    with torch.no_grad():
        state.student.slope *= 0.6  # a student that is wrong, whose layers keep too much noise
    before = log_ratio(state).abs()
    assert before.max() > 0.8
    for _ in range(state.config.steps):
        hsivi_sm.step(state, None, generator(0, Stream.TRAIN, state.step + 1))
    after = log_ratio(state).abs()
    # the layers share one critic, which sees their mixture: what is left is its compromise, not noise
    assert after.max() < 0.3
    assert after.mean() < 0.15
    assert state.log_gamma.abs().max() > 1e-3
    assert not torch.equal(state.ema_log_gamma, torch.zeros_like(state.ema_log_gamma))


def test_rollout_pairs_are_the_students_own():
    state = make_state()
    with torch.no_grad():
        state.student.slope.mul_(torch.linspace(0.8, 1.2, 1000))
    rollout = hsivi_sm.roll_out(state, step_draws(1), range(state.config.chains))
    times = state.layers.times[rollout.k]
    torch.testing.assert_close(rollout.eps, state.student(rollout.x, times).sample)
    top = rollout.x[rollout.k == state.layers.nfe]
    assert abs(top.var() - 1) < 0.1
    visited = chain_states(lambda x, t: state.student(x, t).sample, state.log_gamma, state.layers, lambda: top[:2])
    torch.testing.assert_close(visited[1], state.student(visited[0], state.layers.times[visited[2]]).sample)


@pytest.mark.parametrize("objective", ["sm", "diffused-fisher", "diffused-kl"])
def test_student_step_follows_the_gradient_of_the_written_formula(objective):
    """Recompute comparison, losses and gradients from the same random numbers, in plain formulas."""
    state = make_state(objective=objective, batch=64)
    with torch.no_grad():
        state.student.slope *= 0.9
        state.critic.slope *= 0.7
        state.log_gamma += 0.1
    rollout = hsivi_sm.roll_out(state, step_draws(1), range(state.config.chains))
    rows, k, zeta, t = hsivi_sm._draw_comparison(state, rollout, step_draws(2), range(64))
    zeta = zeta.normals(state.teacher.shape)
    earliest = state.layers.times[k - 1]
    assert torch.equal(t, earliest) if objective == "sm" else (t > earliest).float().mean() > 0.9
    assert int(t.max()) <= 900
    if objective != "sm":
        assert int(t.max()) > 700
    slope = state.student.slope.detach().clone().requires_grad_(True)
    log_gamma = state.log_gamma.detach().clone().requires_grad_(True)
    abar, abar_j, layers = SCHEDULE.abar[t], SCHEDULE.abar[earliest], state.layers
    a, s = (abar / abar_j).sqrt(), (1 - abar).sqrt()
    b2 = (1 - abar) - a**2 * (1 - abar_j)
    a, s, b2, A, B, c1 = (
        v.float().reshape(-1, 1, 1, 1) for v in (a, s, b2.clamp_min(0), layers.A[k], layers.B[k], layers.c1[k])
    )
    x = rollout.x[rows]
    mean = A * x + B * slope[layers.times[k]].reshape(-1, 1, 1, 1) * x
    std = ((a * c1 * log_gamma.exp()) ** 2 + b2).sqrt()
    y = a * mean + std * zeta
    target = zeta * s / std
    critic = state.critic.slope.detach()[t].reshape(-1, 1, 1, 1) * y
    teacher = state.teacher.unet.slope[t].reshape(-1, 1, 1, 1) * y
    gap = critic - teacher
    if objective == "diffused-kl":
        loss = (-s * gap.detach() * y).sum() / len(y)
    else:
        loss = (s**2 * (2 * gap * (target - teacher) - gap**2)).sum() / len(y)
    expected = torch.autograd.grad(loss, [slope, log_gamma])
    hsivi_sm.student_step(state, rollout, step_draws(2), share_of(64))
    torch.testing.assert_close(state.student.slope.grad, expected[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state.log_gamma.grad, expected[1], rtol=1e-4, atol=1e-4)


def test_losses_weigh_by_the_noise_scale():
    draws = torch.Generator().manual_seed(0)
    f, e, target, y = (torch.randn(3, 2, 2, generator=draws) for _ in range(4))
    s = torch.tensor([0.1, 0.5, 1.0]).reshape(-1, 1, 1)
    by_hand = sum(s[i].item() ** 2 * ((f[i] - target[i]) ** 2).sum().item() for i in range(3)) / 3
    assert critic_reference(f, target, s).mean().item() == pytest.approx(by_hand, rel=1e-5)
    terms = [s[i].item() ** 2 * (2 * (f - e) * (target - e) - (f - e) ** 2)[i].sum().item() for i in range(3)]
    assert fisher_reference(f, e, target, s).mean().item() == pytest.approx(sum(terms) / 3, rel=1e-5)
    terms = [-s[i].item() * ((f - e) * y)[i].sum().item() for i in range(3)]
    assert surrogate_reference(f, e, y, s).mean().item() == pytest.approx(sum(terms) / 3, rel=1e-5)
    terms = [s[i].item() ** 2 * ((f - e) ** 2)[i].sum().item() for i in range(3)]
    assert gap_reference(f, e, s).mean().item() == pytest.approx(sum(terms) / 3, rel=1e-5)


def test_optimisers_follow_the_recipe():
    state = make_state(lr_student=1e-4, lr_critic=3e-4, lr_schedule="constant")
    hsivi_sm.step(state, None, generator(0, Stream.TRAIN, 1))
    for optimiser, rate in ((state.student_optimiser, 1e-4), (state.critic_optimiser, 3e-4)):
        assert optimiser.param_groups[0]["lr"] == pytest.approx(rate)
        assert optimiser.param_groups[0]["amsgrad"]
    assert dataclasses.replace(state.config, batch=64).chains == 32
