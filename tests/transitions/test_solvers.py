import pytest
import torch

from hsivi_cli.bridges.schedule import make_grid, schedule_from_config
from hsivi_cli.errors import InputError
from hsivi_cli.transitions.gaussian_layer import layer_coefficients, layer_mean
from hsivi_cli.transitions.solvers import (
    BEST_ORDER,
    BEST_SPACING,
    ORDERS,
    SOLVERS,
    best_spacing,
    build_scheduler,
    clipped,
    ddim,
    resolve_order,
    solve,
    solver_times,
    spacings,
)

SCHEDULE = schedule_from_config({})


def zero_draw():
    return torch.zeros(2, 1, 2, 2)


def start():
    return torch.linspace(-1, 1, 8, dtype=torch.float64).reshape(2, 1, 2, 2)


def gaussian_eps(scale):
    """The exact noise prediction for data ~ N(0, scale^2): eps = s_t x / (abar_t scale^2 + s_t^2)."""

    def eps(x, t):
        abar = float(SCHEDULE.abar[int(t)])
        return (1 - abar) ** 0.5 * x / (abar * scale**2 + 1 - abar)

    return eps


@pytest.mark.parametrize("nfe", [3, 5, 10, 20])
@pytest.mark.parametrize(
    ("solver", "spacing"), [(solver, spacing) for solver in SOLVERS for spacing in spacings(solver)]
)
def test_exactly_nfe_network_evaluations(solver, spacing, nfe):
    times = []

    def eps(x, t):
        times.append(int(t))
        return 0.1 * x

    images = solve(eps, SCHEDULE, solver, nfe, spacing, lambda: torch.ones(2, 1, 2, 2))
    assert tuple(times) == solver_times(solver, nfe, spacing, SCHEDULE)
    assert len(times) == nfe
    assert images.isfinite().all()


def test_schedulers_share_our_noise_schedule_and_never_clip():
    for solver in SOLVERS:
        scheduler = build_scheduler(solver, "leading", SCHEDULE)
        torch.testing.assert_close(scheduler.alphas_cumprod.double(), SCHEDULE.abar, rtol=1e-4, atol=1e-7)
        assert not scheduler.config.get("clip_sample", False)
        assert not scheduler.config.get("thresholding", False)


def test_ddim_is_the_gaussian_layer_without_noise():
    grid = (0, 8, 32, 72, 128, 800)
    layers = layer_coefficients(grid, 0.0, SCHEDULE)
    eps = gaussian_eps(0.5)
    x = start()
    for layer in range(len(grid) - 1, 0, -1):
        x = layer_mean(x, eps(x, grid[layer]), torch.full((2,), layer), layers)
    # DDIM ends at abar = 1, so it makes one step more: at the layer's last time
    abar = float(SCHEDULE.abar[0])
    last = (x - (1 - abar) ** 0.5 * eps(x, 0)) / abar**0.5
    torch.testing.assert_close(ddim(eps, SCHEDULE, grid[::-1], 0.0, start), last, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("solver", "nfe"), [("ddim", 10), ("ddpm", 1000)])
def test_equals_the_diffusers_scheduler(solver, nfe):
    eps = gaussian_eps(0.5)
    noise = torch.Generator().manual_seed(0)
    draws = [torch.randn(2, 1, 2, 2, generator=noise, dtype=torch.float64) for _ in range(nfe + 1)]
    ours = solve(eps, SCHEDULE, solver, nfe, "leading", iter(draws).__next__)
    scheduler = build_scheduler(solver, "leading", SCHEDULE)
    scheduler.alphas_cumprod = SCHEDULE.abar  # float64, to compare formulas and not rounding
    scheduler.final_alpha_cumprod = scheduler.one = torch.tensor(1.0, dtype=torch.float64)
    scheduler.set_timesteps(nfe)
    x = draws[0]
    for i, t in enumerate(scheduler.timesteps):
        if solver == "ddim":
            x = scheduler.step(eps(x, t), t, x).prev_sample
        else:
            # DDPM's step with the noise taken out: its mean and variance are diffusers' own
            x = posterior_step(scheduler, eps(x, t), int(t), x, draws[i + 1] if t > 0 else 0)
    torch.testing.assert_close(ours, x, rtol=1e-8, atol=1e-10)


def posterior_step(scheduler, eps, t, x, z):
    """Ho, Jain, Abbeel 2020, equations 6, 7 and 15, one step without skipping."""
    abar = SCHEDULE.abar[t]
    before = SCHEDULE.abar[t - 1] if t > 0 else torch.tensor(1.0, dtype=torch.float64)
    alpha = abar / before
    x0 = (x - (1 - abar).sqrt() * eps) / abar.sqrt()
    mean = before.sqrt() * (1 - alpha) / (1 - abar) * x0 + alpha.sqrt() * (1 - before) / (1 - abar) * x
    variance = (1 - before) / (1 - abar) * (1 - alpha)
    if t > 0:
        assert float(scheduler._get_variance(t)) == pytest.approx(float(variance), rel=1e-6)
    return mean + variance.sqrt() * z


@pytest.mark.parametrize("solver", SOLVERS)
def test_gaussian_data_is_sampled_with_its_own_spread(solver):
    noise = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(20000, 1, 1, 1, generator=noise, dtype=torch.float64)  # noqa: E731
    images = solve(gaussian_eps(0.5), SCHEDULE, solver, 200, "trailing", draw)
    assert float(images.std()) == pytest.approx(0.5, rel=0.03)


def test_ddim_of_gaussian_data_in_closed_form():
    # with exact eps the probability flow scales x by the ratio of marginal standard deviations
    x = start()
    images = ddim(gaussian_eps(0.5), SCHEDULE, tuple(range(999, -1, -1)), 0.0, lambda: x)
    abar = SCHEDULE.abar[999]
    scale = 0.5 / (abar * 0.25 + 1 - abar).sqrt()
    torch.testing.assert_close(images, scale * x, rtol=5e-3, atol=1e-6)


def test_quad_is_the_students_grid():
    for solver in ("ddim", "ddpm", "dpm++"):
        assert solver_times(solver, 5, "quad", SCHEDULE) == make_grid("quad", 5, SCHEDULE)[:0:-1]
    assert "quad" not in spacings("unipc")


def relative_error(solver, spacing, order=None, nfe=10):
    """How far the solver's scale is from the probability flow's, for data ~ N(0, 1.5^2), from its own first time on."""
    first = SCHEDULE.abar[solver_times(solver, nfe, spacing, SCHEDULE)[0]]
    exact = 1.5 * start() / (first * 2.25 + 1 - first).sqrt()
    found = solve(gaussian_eps(1.5), SCHEDULE, solver, nfe, spacing, start, order)
    return float((found / exact - 1).abs().max())


# diffusers takes no times with the other spacings
@pytest.mark.parametrize(("solver", "spacing"), [(name, way) for name in BEST_ORDER for way in spacings(name)])
def test_second_order_baselines_beat_ddim(solver, spacing):
    """A baseline that lost its order, its schedule or its last step would flatter the students."""
    worst = relative_error("ddim", spacing)
    assert relative_error(solver, spacing, 2) < 0.5 * worst
    assert relative_error(solver, spacing, 2) < relative_error(solver, spacing, 1)
    assert relative_error(solver, spacing, 3) < 0.5 * worst
    # and it converges: four times the steps, far less than a quarter of the error of first order
    assert relative_error(solver, spacing, 2, 40) < 0.15 * worst


@pytest.mark.parametrize("spacing", ["trailing", "quad"])
@pytest.mark.parametrize("clip", [False, True])
def test_first_order_dpm_is_ddim(spacing, clip):
    # with these two spacings both solvers have the same times
    found = [
        solve(gaussian_eps(0.5), SCHEDULE, solver, 10, spacing, lambda: 4 * start(), order, clip)
        for solver, order in (("ddim", None), ("dpm++", 1))
    ]
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


def wild_eps(x, t):
    """Predictions whose x_0 leaves [-1, 1] in most places."""
    return torch.sin(3 * x + 0.01 * float(t))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("solver", BEST_ORDER)
def test_clip_is_static_thresholding_in_diffusers(solver, order):
    scheduler = build_scheduler(solver, "trailing", SCHEDULE, order)
    scheduler.register_to_config(thresholding=True, dynamic_thresholding_ratio=1.0, sample_max_value=1.0)
    scheduler.set_timesteps(10)
    x = start()
    for t in scheduler.timesteps:
        x = scheduler.step(wild_eps(x, t), t, x).prev_sample
    ours = solve(wild_eps, SCHEDULE, solver, 10, "trailing", start, order, clip=True)
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-4)
    assert (ours - solve(wild_eps, SCHEDULE, solver, 10, "trailing", start, order)).abs().max() > 0.1


def test_clip_of_ddim_is_clip_sample_with_the_clipped_output():
    scheduler = build_scheduler("ddim", "leading", SCHEDULE)
    scheduler.register_to_config(clip_sample=True)
    scheduler.set_timesteps(10)
    x = start()
    for t in scheduler.timesteps:
        x = scheduler.step(wild_eps(x, t), t, x, use_clipped_model_output=True).prev_sample
    ours = solve(wild_eps, SCHEDULE, "ddim", 10, "leading", start, clip=True)
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-4)
    assert ours.abs().max() <= 1 + 1e-6


@pytest.mark.parametrize("t", [999, 500, 1])
def test_clip_of_ddpm_is_clip_sample(t):
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(**SCHEDULE.config, clip_sample=True)
    scheduler.alphas_cumprod, scheduler.one = SCHEDULE.abar, torch.tensor(1.0, dtype=torch.float64)
    noise = torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    again = torch.Generator().manual_seed(1)
    theirs = scheduler.step(wild_eps(start(), t), t, start(), generator=again).prev_sample
    ours = posterior_step(scheduler, clipped(wild_eps, SCHEDULE)(start(), torch.tensor(t)), t, start(), noise)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_clip_changes_nothing_inside_the_range():
    draw = lambda: 0.1 * start()  # noqa: E731
    plain, bounded = (solve(gaussian_eps(0.05), SCHEDULE, "ddim", 10, "leading", draw, clip=c) for c in (False, True))
    torch.testing.assert_close(bounded, plain, rtol=1e-9, atol=1e-9)


def test_orders():
    assert [resolve_order(solver) for solver in SOLVERS] == [BEST_ORDER.get(solver) for solver in SOLVERS]
    assert build_scheduler("dpm++", "leading", SCHEDULE, 3).config.solver_order == 3
    with pytest.raises(InputError, match="1, 2, 3"):
        resolve_order("unipc", 4)
    with pytest.raises(InputError, match="leave it out"):
        resolve_order("ddim", 2)


def test_default_spacings_are_usable():
    for solver in SOLVERS:
        assert BEST_SPACING[solver][0][0] == 1
        for nfe in (1, 2, 3, 5, 10, 20, 50):
            assert len(solver_times(solver, nfe, best_spacing(solver, nfe), SCHEDULE)) == nfe
    assert best_spacing("ddim", 1) == "trailing"
    assert best_spacing("ddim", 10) == "leading"
    assert best_spacing("unipc", 10) == "linspace"


@pytest.mark.parametrize(
    ("solver", "nfe", "spacing", "says"),
    [
        ("euler", 5, "leading", "ddim"),
        ("ddim", 5, "karras", "trailing"),
        ("ddim", 0, "leading", "at least one"),
        ("ddim", 1001, "leading", "1000"),
        ("ddim", 1, "leading", "--spacing trailing"),
        ("unipc", 1000, "leading", "--spacing trailing"),
        ("dpm++", 61, "trailing", "--spacing leading or linspace"),
        ("unipc", 5, "quad", "UniPCMultistepScheduler takes no times: use leading, trailing, linspace"),
        ("deis", 5, "quad", "leading, trailing, linspace"),
        ("ddim", 1000, "quad", "no 1000 distinct times"),
    ],
)
def test_refuses_what_it_cannot_meet_exactly(solver, nfe, spacing, says):
    with pytest.raises(InputError, match=says):
        solve(lambda x, t: x, SCHEDULE, solver, nfe, spacing, zero_draw)
