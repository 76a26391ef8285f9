"""In Triton's interpreter: GroupNorm + SiLU, forward and backward, against its float64 reference."""

import pytest
import torch

from hsivi_cli.kernels import group_norm_silu as module
from hsivi_cli.kernels import tiles
from hsivi_cli.kernels.group_norm_silu import composite, group_norm_silu

# the relative error of the whole output that each type may have
BOUND = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
EPS = 1e-5


def make(shape, groups, extras="", dtype=torch.float32, mean=0.0, channels_last=False, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(size, generator=generator)

    n, c = shape[:2]
    x = (draw(*shape) + mean).to(dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    inputs = {"x": x, "weight": 1 + 0.3 * draw(c), "bias": 0.3 * draw(c), "groups": groups, "eps": EPS}
    if "temb" in extras:
        inputs["temb"] = draw(n, c).to(dtype)
    if "scale" in extras:
        inputs["scale"], inputs["shift"] = (0.3 * draw(n, 2 * c)).to(dtype).chunk(2, 1)
    return inputs


def doubled(inputs):
    return {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}


def error(got, reference):
    return ((got.double() - reference).norm() / reference.norm()).item()


def check(inputs, bound=None):
    got = group_norm_silu(**inputs, kernels="triton")
    assert got.dtype == inputs["x"].dtype
    assert error(got, composite(**doubled(inputs))) < (bound or BOUND[got.dtype])
    return got


@pytest.fixture(params=["registers", "loop"])
def _tiles(request, monkeypatch):
    """Once with the group in a program's registers, once in a loop over small tiles."""
    if request.param == "loop":
        monkeypatch.setattr(module, "FORWARD_TILE", 16)
        monkeypatch.setattr(module, "BACKWARD_TILE", 16)
        monkeypatch.setattr(tiles, "LOOP_TILE", 32)


SHAPES = [
    ((2, 8, 4, 4), 4),
    ((1, 8, 5, 7), 2),  # batch 1, odd sizes
    ((3, 9, 3, 5), 3),  # three channels a group: not a power of two
    ((2, 14, 3, 3), 2),  # seven
    ((2, 6, 1, 1), 6),  # one element a group
    ((2, 10, 9), 5),  # one-dimensional
    ((1, 4, 33, 2), 1),
]


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("extras", ["", "temb scale"])
@pytest.mark.parametrize(("shape", "groups"), SHAPES)
def test_forward(shape, groups, extras):
    check(make(shape, groups, extras))


@pytest.mark.parametrize("extras", ["temb", "scale"])
def test_what_is_folded_in_alone(extras):
    check(make(*SHAPES[2], extras))


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "groups"), [SHAPES[i] for i in (1, 2, 3, 6)])
def test_channels_last_keeps_its_format(shape, groups, dtype):
    inputs = make(shape, groups, "temb scale", dtype, channels_last=True)
    got = check(inputs)
    assert got.stride() == inputs["x"].stride()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    check(make((2, 12, 5, 5), 3, "temb", dtype))


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("mean", [1e4, -1e4])
def test_large_means_cost_no_digits(mean, channels_last):
    inputs = make((2, 12, 6, 6), 4, "temb", mean=mean, channels_last=channels_last)
    check(inputs)
    inputs["temb"] = inputs["temb"] + 1e4
    check(inputs)


@pytest.mark.usefixtures("_tiles")
def test_an_outlier_first_costs_no_digits():
    inputs = make((2, 4, 16, 16), 2)
    inputs["x"][:, ::2, 0, 0] = 1e4
    check(inputs)


@pytest.mark.usefixtures("_tiles")
def test_groups_without_variance():
    inputs = make((2, 8, 3, 3), 4)
    inputs["x"][0, :2] = 7.0
    inputs["x"][1] = 0.0
    check(inputs)


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_stay_in_their_group(value, channels_last):
    inputs = make((2, 8, 3, 5), 4, channels_last=channels_last)
    inputs["x"][1, 3, 2, 1] = value
    got = group_norm_silu(**inputs, kernels="triton")
    reference = composite(**doubled(inputs))
    assert torch.equal(got.isnan(), reference.isnan())
    assert got.isnan().sum() == 2 * 3 * 5  # the group of channels 2 and 3
    good = ~reference.isnan()
    assert error(got[good], reference[good]) < 1e-6


@pytest.mark.parametrize("channels_last", [False, True])
def test_poisoned_outputs_are_overwritten(channels_last, monkeypatch):
    inputs = make((3, 10, 5, 3), 5, "temb scale", channels_last=channels_last)
    real = {name: getattr(torch, name) for name in ("empty", "empty_like")}
    for name, function in real.items():
        monkeypatch.setattr(torch, name, lambda *a, function=function, **k: function(*a, **k).fill_(float("nan")))
    x, temb = inputs["x"].requires_grad_(True), inputs["temb"].requires_grad_(True)
    got = group_norm_silu(**inputs, kernels="triton")
    got.sum().backward()
    assert bool(got.isfinite().all())
    assert bool(x.grad.isfinite().all())
    assert bool(temb.grad.isfinite().all())


def test_a_view_that_is_not_dense_is_copied():
    inputs = make((2, 8, 6, 6), 4)
    inputs["x"] = torch.randn(2, 8, 6, 12, generator=torch.Generator().manual_seed(1))[..., ::2]
    check(inputs)
    inputs["x"] = torch.randn(8, 2, 6, 6, generator=torch.Generator().manual_seed(1)).transpose(0, 1)
    check(inputs)


def test_an_expanded_time_embedding_is_read_right():
    inputs = make((3, 8, 4, 4), 4)
    inputs["temb"] = torch.randn(1, 8, generator=torch.Generator().manual_seed(2)).expand(3, 8)
    check(inputs)


def test_negative_control_another_epsilon_is_seen():
    inputs = make((2, 8, 4, 4), 4)
    got = group_norm_silu(**inputs, kernels="triton")
    assert error(got, composite(**doubled(inputs | {"eps": EPS * 3}))) > 1e-6


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("extras", ["", "temb scale"])
@pytest.mark.parametrize(("shape", "groups", "mean"), [((2, 9, 3, 5), 3, 0.0), ((1, 4, 4, 4), 2, 1e4)])
def test_gradients(shape, groups, mean, extras, channels_last):
    inputs = make(shape, groups, extras, mean=mean, channels_last=channels_last)
    names = [name for name, value in inputs.items() if isinstance(value, torch.Tensor)]
    ours = inputs | {name: inputs[name].clone().requires_grad_(True) for name in names}
    theirs = inputs | {name: inputs[name].double().requires_grad_(True) for name in names}
    direction = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    (group_norm_silu(**ours, kernels="triton") * direction).sum().backward()
    (composite(**theirs) * direction).sum().backward()
    for name in names:
        assert error(ours[name].grad, theirs[name].grad) < 2e-6, name


def test_gradients_in_bfloat16():
    inputs = make((2, 8, 5, 5), 4, "temb", torch.bfloat16)
    names = ["x", "weight", "bias", "temb"]
    ours = inputs | {name: inputs[name].clone().requires_grad_(True) for name in names}
    theirs = inputs | {name: inputs[name].double().requires_grad_(True) for name in names}
    group_norm_silu(**ours, kernels="triton").float().square().sum().backward()
    composite(**theirs).square().sum().backward()
    for name in names:
        assert ours[name].grad.dtype == inputs[name].dtype
        assert error(ours[name].grad, theirs[name].grad) < 1e-2, name
