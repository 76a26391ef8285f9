"""In Triton's interpreter: comparison point, critic and student losses, and their gradients, against float64."""

import pytest
import torch

from hsivi_cli.bridges.schedule import make_grid, schedule_from_config
from hsivi_cli.kernels import comparison, critic_loss, student_loss
from hsivi_cli.kernels.comparison import compare, compare_reference, comparison_target
from hsivi_cli.kernels.critic_loss import critic_reference, critic_sums
from hsivi_cli.kernels.philox import Draw, make_streams
from hsivi_cli.kernels.student_loss import fisher_reference, gap_reference, student_sums, surrogate_reference
from hsivi_cli.methods import benchmark_kernels
from hsivi_cli.transitions.gaussian_layer import comparison_rows, layer_coefficients

SCHEDULE = schedule_from_config({})
LAYERS = layer_coefficients(make_grid("quad", 5, SCHEDULE), 0.2, SCHEDULE)
SHAPES = [(2, 3, 5, 7), (1, 1, 1, 1), (3, 1, 28, 28), (1, 2, 3, 1), (2, 2, 24, 24)]
GAMMAS = ("map", "layer", "scalar")
LOSSES = ("fisher", "reverse-kl")


def make(shape, gamma="map", dtype=torch.float32, memory_format=torch.contiguous_format, own_time=False):
    """Images x, eps, f, e and y, log_gamma, rows and noise."""
    generator = torch.Generator().manual_seed(1)
    n = shape[0]
    images = [torch.randn(shape, generator=generator).to(dtype, memory_format=memory_format) for _ in range(5)]
    size = {"map": shape[1:], "layer": (5, *shape[1:]), "scalar": ()}[gamma]
    k = torch.tensor([3, 1, 5])[:n]
    t = LAYERS.times[k - 1] if own_time else torch.tensor([400, 30, 700])[:n]
    rows = comparison_rows(k, t, LAYERS, SCHEDULE)
    zeta = Draw(make_streams(2**33 + 5, [4, 2, 2**40][:n]), 3)
    return images, 0.3 * torch.randn(size, generator=generator), rows, zeta


def leaves(tensors, kind=None):
    return [v.detach().clone().to(kind or v.dtype).requires_grad_(True) for v in tensors]


def error(got, reference):
    return ((got.detach().double() - reference).norm() / reference.norm()).item()


def error_of_sums(got, terms):
    """The worst row's error, relative to the size of what it adds up: terms of both signs cancel in both."""
    return ((got.detach() - terms.sum(1)).abs() / terms.abs().sum(1)).max().item()


def error_of_gamma(got, reference):
    """As `error`; a scalar's gradient is the sum over the elements of a map."""
    return error(got, reference) if got.ndim else error_of_sums(got[None], reference.reshape(1, -1))


def as_map(log_gamma, shape):
    """A scalar as a map that says the same, whose gradient shows what is added up."""
    return log_gamma if log_gamma.ndim else log_gamma.expand(shape[1:])


def reference_terms(loss, f, e, y, log_gamma, rows, zeta):
    """What every row adds up, (n, elements), by the plain formulas in float64, each element as a row of its own."""
    target = comparison_target(log_gamma, rows, zeta.normals(tuple(f.shape[1:]), torch.float64))
    scale = rows.noise_scale.reshape(-1, 1, 1, 1)
    f, e, y, target, scale = (None if v is None else v.expand(f.shape).reshape(-1, 1) for v in (f, e, y, target, scale))
    terms = {
        "critic": lambda: critic_reference(f, target.detach(), scale),
        "fisher": lambda: fisher_reference(f, e, target, scale),
        "reverse-kl": lambda: surrogate_reference(f, e, y, scale),
        "gap": lambda: gap_reference(f, e, scale),
    }
    return terms[loss]().reshape(len(rows.x), -1)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("shape", SHAPES)
def test_comparison_point_and_its_gradients(shape, gamma, memory_format):
    (x, eps, direction, *_), log_gamma, rows, zeta = make(shape, gamma, memory_format=memory_format)
    ours, theirs = leaves([x, eps, log_gamma]), leaves([x, eps, as_map(log_gamma, shape)], torch.float64)
    got = compare(*ours, rows, zeta, "triton")
    assert got.stride() == torch.empty_like(x).stride()
    reference = compare_reference(*theirs, rows, zeta.normals(shape[1:], torch.float64))
    assert error(got, reference) < 1e-6
    (got * direction).sum().backward()
    (reference * direction).sum().backward()
    for mine, other in zip(ours, theirs, strict=True):
        assert error_of_gamma(mine.grad, other.grad) < 1e-6


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("shape", SHAPES)
def test_critic_sums_and_gradient(shape, gamma):
    for memory_format, own_time in ((torch.contiguous_format, False), (torch.channels_last, True)):
        (f, *_), log_gamma, rows, zeta = make(shape, gamma, memory_format=memory_format, own_time=own_time)
        log_gamma.requires_grad_(True)
        (ours,), (theirs,) = leaves([f]), leaves([f], torch.float64)
        got = critic_sums(ours, log_gamma, rows, zeta, "triton")
        reference = reference_terms("critic", theirs, None, None, log_gamma.double(), rows, zeta)
        assert got.shape == (shape[0],)
        assert error_of_sums(got, reference) < 1e-6
        weights = torch.arange(1.0, shape[0] + 1)
        (got * weights).sum().backward()
        (reference.sum(1) * weights).sum().backward()
        assert error(ours.grad, theirs.grad) < 1e-6
        assert log_gamma.grad is None  # the critic's loss is the critic's alone


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("shape", SHAPES)
def test_student_sums_and_gradients(shape, gamma, loss):
    for memory_format, own_time in ((torch.contiguous_format, False), (torch.channels_last, True)):
        (f, e, y, *_), log_gamma, rows, zeta = make(shape, gamma, memory_format=memory_format, own_time=own_time)
        ours, theirs = leaves([f, e, y, log_gamma]), leaves([f, e, y, as_map(log_gamma, shape)], torch.float64)
        got = student_sums(loss, *ours, rows, zeta, "triton")
        reference = reference_terms(loss, *theirs, rows, zeta)
        assert error_of_sums(got.loss, reference) < 1e-6
        assert error_of_sums(got.fisher, reference_terms("fisher", *theirs, rows, zeta)) < 1e-6
        assert error_of_sums(got.gap, reference_terms("gap", *theirs, rows, zeta)) < 1e-6
        assert not got.fisher.requires_grad
        assert not got.gap.requires_grad
        weights = torch.arange(1.0, shape[0] + 1)
        (got.loss * weights).sum().backward()
        (reference.sum(1) * weights).sum().backward()
        for mine, other in zip(ours, theirs, strict=True):
            assert (mine.grad is None) == (other.grad is None)
            assert mine.grad is None or error_of_gamma(mine.grad, other.grad) < 1e-6


@pytest.mark.parametrize("loss", LOSSES)
def test_the_whole_student_step_has_one_gradient(loss):
    """Through the comparison point into networks that depend on it (here: products), as in a training step."""
    shape = (3, 2, 5, 5)
    (x, eps, critic, teacher, _), log_gamma, rows, zeta = make(shape)
    gradients = []
    for kernels, kind in (("triton", torch.float32), ("torch", torch.float64)):
        eps_leaf, gamma_leaf = leaves([eps, log_gamma], kind)
        y = compare(x.to(kind), eps_leaf, gamma_leaf, rows, zeta, kernels)
        f, e = critic.to(kind) * y, teacher.to(kind) * y
        student_sums(loss, f, e, y, gamma_leaf, rows, zeta, kernels).loss.mean().backward()
        gradients.append([eps_leaf.grad, gamma_leaf.grad])
    for mine, other in zip(*gradients, strict=True):
        assert error(mine, other) < 2e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    (x, eps, f, e, _), log_gamma, rows, zeta = make((3, 3, 5, 5), dtype=dtype)
    ours, theirs = leaves([x, eps, f, e, log_gamma]), leaves([x, eps, f, e, log_gamma], torch.float64)
    found = []
    for (x, eps, f, e, gamma), kernels in ((ours, "triton"), (theirs, "torch")):
        y = compare(x, eps, gamma, rows, zeta, kernels)
        sums = student_sums("fisher", f, e, y, gamma, rows, zeta, kernels)
        # three times: with once, the critic's gradient is the divergence's with the other sign
        total = sums.loss.sum() + 3 * critic_sums(f, gamma, rows, zeta, kernels).sum() + y.float().square().sum()
        total.backward()
        found.append([y, sums.loss, sums.gap, x.grad, eps.grad, f.grad, e.grad, gamma.grad])
    for mine, other in zip(*found, strict=True):
        assert error(mine, other.double().detach()) < 1e-2
    assert found[0][0].dtype == found[0][5].dtype == dtype
    assert found[0][1].dtype == torch.float32


@pytest.mark.parametrize("loss", ["critic", *LOSSES])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_stay_in_their_row(value, loss):
    images, log_gamma, rows, zeta = make((3, 2, 4, 5))
    images[0][1, 1, 2, 3] = value
    f, e, y = leaves(images[:3])
    sums = critic_sums(f, log_gamma, rows, zeta, "triton")
    if loss != "critic":
        sums = student_sums(loss, f, e, y, log_gamma, rows, zeta, "triton").loss
    assert sums.isfinite().tolist() == [True, False, True]
    sums.sum().backward()
    gradient = y.grad if loss == "reverse-kl" else f.grad
    assert (~gradient.isfinite()).nonzero().tolist() == [[1, 1, 2, 3]]
    point = compare(images[0], images[1], log_gamma, rows, zeta, "triton")
    assert (~point.isfinite()).nonzero().tolist() == [[1, 1, 2, 3]]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_poisoned_outputs_are_overwritten(memory_format, monkeypatch):
    images, log_gamma, rows, zeta = make((3, 3, 5, 3), memory_format=memory_format)
    real = {name: getattr(torch, name) for name in ("empty", "empty_like")}
    for name, function in real.items():
        monkeypatch.setattr(torch, name, lambda *a, function=function, **k: function(*a, **k).fill_(float("nan")))
    x, eps, f, e, _, gamma = leaves([*images, log_gamma])
    y = compare(x, eps, gamma, rows, zeta, "triton")
    total = critic_sums(f, gamma, rows, zeta, "triton").sum() + y.sum()
    for loss in LOSSES:
        total = total + student_sums(loss, f, e, y, gamma, rows, zeta, "triton").loss.sum()
    total.backward()
    assert all(bool(v.isfinite().all()) for v in (y, total, x.grad, eps.grad, f.grad, e.grad, gamma.grad))


@pytest.mark.parametrize("view", [lambda v: v[..., ::2], lambda v: v.transpose(2, 3), lambda v: v[:1].expand_as(v)])
def test_views_are_read_and_written_right(view):
    images, _, rows, zeta = make((3, 2, 4, 6))
    # every tensor its own layout: the view for half of them
    x, eps, f, e, y = (view(v) if i % 2 == 0 else view(v).contiguous() for i, v in enumerate(images))
    log_gamma = torch.linspace(-1, 1, x[0].numel()).reshape(x.shape[1:])
    found = []
    for kernels, kind in (("triton", torch.float32), ("torch", torch.float64)):
        given = [v.detach().to(kind).requires_grad_(True) for v in (x, eps, f, e, y, log_gamma)]
        point = compare(*given[:2], given[5], rows, zeta, kernels)
        critic = critic_sums(given[2], given[5], rows, zeta, kernels)
        sums = [student_sums(loss, *given[2:], rows, zeta, kernels).loss for loss in LOSSES]
        (view(images[1]).to(kind) * point).sum().backward(retain_graph=True)
        (3 * critic + sums[0] + sums[1]).sum().backward()
        found.append([point, critic, torch.stack(sums), *(v.grad for v in given)])
    for mine, other in zip(*found, strict=True):
        assert error(mine, other.detach()) < 1e-5  # a read or write at the wrong place is off by 1


def test_a_row_does_not_depend_on_the_rows_beside_it_and_equal_inputs_give_equal_bits():
    images, log_gamma, rows, zeta = make((3, 2, 24, 24))
    one = type(rows)(*(v[1:2] for v in vars(rows).values()))
    alone = Draw(zeta.streams[1:2], zeta.number)
    f, e, y = images[:3]
    for _ in range(2):
        whole = student_sums("reverse-kl", f, e, y, log_gamma, rows, zeta, "triton")
        part = student_sums("reverse-kl", f[1:2], e[1:2], y[1:2], log_gamma, one, alone, "triton")
        for name in ("loss", "fisher", "gap"):
            assert torch.equal(getattr(part, name), getattr(whole, name)[1:2])
        assert torch.equal(
            critic_sums(f[1:2], log_gamma, one, alone, "triton"), critic_sums(f, log_gamma, rows, zeta, "triton")[1:2]
        )
        assert torch.equal(
            compare(f[1:2], e[1:2], log_gamma, one, alone, "triton"),
            compare(f, e, log_gamma, rows, zeta, "triton")[1:2],
        )


def test_negative_control_another_draw_or_layer_is_seen():
    (f, e, y, *_), log_gamma, rows, zeta = make((2, 2, 5, 5), "layer")
    theirs = [v.double() for v in (f, e, y, log_gamma)]
    other = Draw(zeta.streams, zeta.number + 1)
    shifted = type(rows)(**vars(rows) | {"layer": (rows.layer + 1) % 5})
    for wrong_rows, wrong_zeta in ((rows, other), (shifted, zeta)):
        got = student_sums("fisher", f, e, y, log_gamma, wrong_rows, wrong_zeta, "triton").loss
        assert error_of_sums(got, reference_terms("fisher", *theirs, rows, zeta)) > 1e-4
        got = critic_sums(f, log_gamma, wrong_rows, wrong_zeta, "triton")
        assert error_of_sums(got, reference_terms("critic", *theirs, rows, zeta)) > 1e-4


def test_shapes_that_do_not_fit_are_refused():
    (x, eps, *_), log_gamma, rows, zeta = make((2, 2, 4, 4))
    few = Draw(zeta.streams[:1], 0)
    for broken in [(x, eps[:1], log_gamma, zeta), (x, eps, log_gamma[:1], zeta), (x, eps, log_gamma, few)]:
        with pytest.raises(ValueError, match="do not fit"):
            compare(*broken[:3], rows, broken[3])
    with pytest.raises(ValueError, match="do not fit"):
        critic_sums(x, log_gamma[:1], rows, zeta)
    with pytest.raises(ValueError, match="do not fit"):
        student_sums("fisher", x, eps[:1], x, log_gamma, rows, zeta)


def test_kernels_run_where_they_can_and_not_elsewhere(monkeypatch):
    calls = []
    functions = [(comparison, "Compare"), (critic_loss, "CriticSums"), (student_loss, "Sums")]
    for module, name in functions:
        real = getattr(module, name).apply
        monkeypatch.setattr(
            getattr(module, name), "apply", lambda *a, name=name, real=real: calls.append(name) or real(*a)
        )
    (x, eps, y, *_), log_gamma, rows, zeta = make((1, 1, 2, 2))

    def use(kernels, kind=torch.float32):
        images = [v.to(kind) for v in (x, eps, y)]
        compare(*images[:2], log_gamma, rows, zeta, kernels)
        critic_sums(images[0], log_gamma, rows, zeta, kernels)
        student_sums("fisher", *images, log_gamma, rows, zeta, kernels)

    use("torch")
    use("auto", torch.float64)  # no kernel has this type
    assert not calls
    use("auto")
    assert calls == [name for _, name in functions]


def test_what_bench_checks_is_within_its_bounds():
    found = benchmark_kernels.check_losses(torch.device("cpu"))
    assert len(found) == 12
    for accuracy in found:
        assert accuracy.error < accuracy.bound, accuracy
    assert max(accuracy.error for accuracy in found) > 0  # or no kernel ran
