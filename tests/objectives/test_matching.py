"""The losses on Gaussian data, where the best critic, the Fisher divergence and every marginal are closed form."""

from types import SimpleNamespace

import torch

from hsivi_cli.bridges.schedule import make_grid, schedule_from_config
from hsivi_cli.kernels.comparison import compare_reference, comparison_target
from hsivi_cli.kernels.critic_loss import critic_reference
from hsivi_cli.kernels.student_loss import fisher_reference, surrogate_reference
from hsivi_cli.transitions.gaussian_layer import comparison_rows, layer_coefficients

SCHEDULE = schedule_from_config({})
LAYERS = layer_coefficients(make_grid("quad", 5, SCHEDULE), 0.2, SCHEDULE)
DATA_VARIANCE = 0.25
N = 400_000
LOG_GAMMA = torch.zeros(())


def critic_loss(*given):
    return critic_reference(*given).mean()


def fisher_loss(*given):
    return fisher_reference(*given).mean()


def reverse_kl_surrogate(*given):
    return surrogate_reference(*given).mean()


def optimal_eps(x, t):
    """eps* of data N(0, v): `s_t x / (abar_t v + s_t^2)`."""
    abar = SCHEDULE.abar[t].reshape(-1, 1)
    return (1 - abar).sqrt() * x / (abar * DATA_VARIANCE + 1 - abar)


def comparison(k, t, student_scale, n=N, seed=0):
    """Layer k of the student `phi = student_scale * eps*` fed with exact marginals of level k, compared at time t."""
    draws = torch.Generator().manual_seed(seed)
    variance_in = LAYERS.abar[k] * DATA_VARIANCE + 1 - LAYERS.abar[k]
    x = torch.randn(n, 1, dtype=torch.float64, generator=draws) * variance_in.sqrt()
    which, at_t = torch.full((n,), k), torch.full((n,), t)
    eps = student_scale * optimal_eps(x, torch.full((n,), int(LAYERS.times[k])))
    zeta = torch.randn(n, 1, dtype=torch.float64, generator=draws)
    rows = comparison_rows(which, at_t, LAYERS, SCHEDULE)
    y, target = compare_reference(x, eps, LOG_GAMMA, rows, zeta), comparison_target(LOG_GAMMA, rows, zeta)
    return SimpleNamespace(y=y, t=at_t, target=target, noise_scale=rows.noise_scale.reshape(-1, 1))


def linear_output_variance(k, t, scale):
    """Variance of y' for that student: everything is linear and Gaussian."""
    variance_in = LAYERS.abar[k] * DATA_VARIANCE + 1 - LAYERS.abar[k]
    slope = LAYERS.A[k] + LAYERS.B[k] * scale * LAYERS.noise_scale[k] / variance_in
    layer = slope**2 * variance_in + LAYERS.c1[k] ** 2
    a2 = SCHEDULE.abar[t] / LAYERS.abar[k - 1]
    return a2 * layer + (1 - SCHEDULE.abar[t]) - a2 * (1 - LAYERS.abar[k - 1])


def best_critic_slope(k, t, scale):
    """`f*(y) = s' E[zeta / std | y] = s' y / Var(y')` for a linear-Gaussian student."""
    return (1 - SCHEDULE.abar[t]).sqrt() / linear_output_variance(k, t, scale)


def test_least_squares_critic_reaches_its_closed_form():
    for k, t in ((3, int(LAYERS.times[2])), (3, 400), (1, 700)):
        at = comparison(k, t, student_scale=0.7)
        slope = (at.y * at.target).mean() / (at.y**2).mean()  # the minimiser of critic_loss among linear critics
        expected = best_critic_slope(k, t, 0.7)
        noise = ((at.target - expected * at.y) ** 2).mean().sqrt() / (at.y**2).mean().sqrt() / N**0.5
        assert abs(slope - expected) < 5 * noise
        losses = [critic_loss(c * slope * at.y, at.target, at.noise_scale) for c in (0.98, 1.0, 1.02)]
        assert losses[1] < min(losses[0], losses[2])


def test_fisher_loss_at_the_best_critic_is_the_fisher_divergence():
    for k, t in ((3, int(LAYERS.times[2])), (2, 120)):
        at = comparison(k, t, student_scale=0.4)
        critic = best_critic_slope(k, t, 0.4) * at.y
        teacher = optimal_eps(at.y, at.t)
        value = fisher_loss(critic, teacher, at.target, at.noise_scale)
        variance, s = linear_output_variance(k, t, 0.4), (1 - SCHEDULE.abar[t]).sqrt()
        bridge = SCHEDULE.abar[t] * DATA_VARIANCE + s**2
        expected = s**2 * (s / variance - s / bridge) ** 2 * variance
        gap = critic - teacher
        spread = (at.noise_scale**2 * (2 * gap * (at.target - teacher) - gap**2)).std() / N**0.5
        assert abs(value - expected) < 5 * spread
        assert expected > 20 * spread  # the check can tell the value from zero
        worse = fisher_loss(0.9 * critic, teacher, at.target, at.noise_scale)
        assert worse < value  # the inner problem is a maximisation


def student_gradient(objective, k, t, scale):
    """Gradient with respect to the student's scale, critic at its closed form for that scale."""
    parameter = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
    at = comparison(k, t, parameter)
    critic, teacher = best_critic_slope(k, t, scale) * at.y, optimal_eps(at.y, at.t)
    if objective == "fisher":
        loss = fisher_loss(critic, teacher, at.target, at.noise_scale)
    else:
        loss = reverse_kl_surrogate(critic, teacher, at.y, at.noise_scale)
    (gradient,) = torch.autograd.grad(loss, parameter)
    return float(gradient)


def matching_scale(k):
    """The scale at which the layer's output variance is exactly that of its bridge."""
    low, high = 0.5, 1.5
    t = int(LAYERS.times[k - 1])
    bridge = LAYERS.abar[k - 1] * DATA_VARIANCE + 1 - LAYERS.abar[k - 1]
    sign = 1 if linear_output_variance(k, t, low) > bridge else -1
    for _ in range(80):
        middle = (low + high) / 2
        if sign * (linear_output_variance(k, t, middle) - bridge) > 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def test_students_gradient_vanishes_at_the_optimum_and_points_to_it():
    for objective in ("fisher", "kl"):
        for k, t in ((3, int(LAYERS.times[2])), (3, 500)):
            optimum = matching_scale(k)
            below, at, above = (student_gradient(objective, k, t, optimum + d) for d in (-0.2, 0.0, 0.2))
            assert below < 0 < above
            assert abs(at) < 0.02 * min(-below, above)


def test_kl_surrogate_has_the_gradient_of_the_reverse_kl():
    k, t, scale, step = 3, 500, 0.8, 1e-5
    s2 = 1 - SCHEDULE.abar[t]
    bridge = SCHEDULE.abar[t] * DATA_VARIANCE + s2

    def kl(scale):
        ratio = linear_output_variance(k, t, scale) / bridge
        return 0.5 * (ratio - 1 - ratio.log())

    expected = s2 * (kl(scale + step) - kl(scale - step)) / (2 * step)  # the surrogate carries the weight s'^2
    assert abs(student_gradient("kl", k, t, scale) / expected - 1) < 0.02


def test_kl_surrogate_sends_nothing_to_critic_or_teacher():
    y, critic, teacher = (torch.randn(3, 2, requires_grad=True) for _ in range(3))
    reverse_kl_surrogate(critic, teacher, y, torch.ones(3, 1)).backward()
    assert critic.grad is None
    assert teacher.grad is None
    assert y.grad is not None
    torch.testing.assert_close(y.grad, -(critic - teacher).detach() / 3)
