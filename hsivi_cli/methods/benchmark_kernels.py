"""Each fused kernel alone: how fast beside torch's own operations, and how far from its float64 reference."""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hsivi_cli.bridges.schedule import make_grid, schedule_from_config
from hsivi_cli.engine.optimisation import Precision
from hsivi_cli.engine.seeds import PhiloxStreams
from hsivi_cli.kernels.choice import triton_can_run
from hsivi_cli.kernels.comparison import ComparisonRows, compare, compare_reference, comparison_target
from hsivi_cli.kernels.critic_loss import critic_reference, critic_sums
from hsivi_cli.kernels.group_norm_silu import composite, group_norm_silu
from hsivi_cli.kernels.hsivi_step import hsivi_step, step_reference
from hsivi_cli.kernels.philox import Draw, normals, normals_triton
from hsivi_cli.kernels.samples import per_sample
from hsivi_cli.kernels.student_loss import fisher_reference, student_sums, surrogate_reference
from hsivi_cli.kernels.upsampling import summed_kernel, upsample_convolve, upsample_convolve_reference
from hsivi_cli.methods.benchmark import DTYPES, EAGER, LINEAR, OURS, Case
from hsivi_cli.methods.graphed import cuda_graph
from hsivi_cli.transitions.gaussian_layer import comparison_rows, layer_coefficients

CIFAR = (128, 32, 32)  # an activation of the CIFAR-10 DDPM UNet's first level, the largest it has
GROUPS, EPS = 32, 1e-6
CACHE = 2**27  # more bytes than a GPU's cache has: the rotating inputs fill it, so that none is left there
CALLS = 50  # in a graph: next to them its launch, and the wait for its end, are short
BOUNDS = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-2}

Side = Callable[[int], Any]
Function = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Accuracy:
    """`||out - reference|| / ||reference||` of a kernel on this device, and the most it may be."""

    kernel: str
    error: float
    bound: float


def kernel_cases(
    device: torch.device, batch: int, precision: Precision, compiled: bool, shape: tuple[int, int, int] = CIFAR
) -> Iterator[Case]:
    """Every kernel at the largest activation of the CIFAR UNet, on inputs that no cache still holds.

    On a GPU a call a rotating input, and CALLS at least, is captured as a CUDA graph: the GPU's time is measured, and
    not Python's.
    """
    for case in eager_cases(device, batch, precision, compiled, shape):
        if device.type == "cuda":
            calls = max(case.inner, CALLS)
            case = dataclasses.replace(case, sides={n: Captured(s, calls, device) for n, s in case.sides.items()})
        yield case


def rotations(device: torch.device, nbytes: int) -> int:
    """How many inputs of `nbytes` take turns: as many as no cache of a GPU holds, if 512 are enough for that."""
    return min(max(CACHE // nbytes, 2), 512) if device.type == "cuda" else 2


class Captured:
    """The first `calls` calls of a side as one CUDA graph, captured when it is first called."""

    def __init__(self, side: Side, calls: int, device: torch.device) -> None:
        self.side, self.calls, self.device = side, calls, device
        self.replay: Callable[[], Any] | None = None

    def __call__(self, i: int) -> None:
        if self.replay is None:
            self.replay = cuda_graph(lambda: [self.side(j) for j in range(self.calls)][-1], self.device)
        self.replay()


def eager_cases(
    device: torch.device, batch: int, precision: Precision, compiled: bool, shape: tuple[int, int, int]
) -> Iterator[Case]:
    """The cases of `kernel_cases`, one call after the other; `inner` counts the inputs that take turns."""
    nbytes = batch * shape[0] * shape[1] * shape[2] * DTYPES[precision].itemsize
    count = rotations(device, nbytes)
    for label, memory_format in {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}.items():
        norm = norm_sides(device, batch, DTYPES[precision], shape, memory_format, count, compiled)
        yield Case(f"GroupNorm + SiLU + temb, {label}", batch, precision, norm[0], 2 * nbytes, inner=count)
        # forward: x in, y out; backward: x and dy in, dx out
        yield Case(f"its forward and backward, {label}", batch, precision, norm[1], 5 * nbytes, inner=count)
    yield upsampling_case(device, batch, precision, shape, count)
    nbytes = batch * 3 * shape[1] * shape[2] * 4
    count = rotations(device, 2 * nbytes)
    images = [torch.randn(2, batch, 3, *shape[1:], device=device) for _ in range(count)]
    streams = PhiloxStreams(0, range(batch), device).streams
    step: dict[str, Any] = {"a": 1.01, "b": -0.2, "c1": 0.1, "streams": streams}
    step["log_gamma"] = torch.zeros(3, *shape[1:], device=device)

    def eager_step(i: int) -> Tensor:
        x, eps = images[i % count]
        return 1.01 * x - 0.2 * eps + 0.1 * step["log_gamma"].exp() * torch.randn_like(x)

    sides: dict[str, Side] = {EAGER: eager_step}
    if triton_can_run(streams):
        sides = {OURS: lambda i: hsivi_step(images[i % count][0], images[i % count][1], **step)} | sides
    yield Case("HSIVI step with its noise", batch, "fp32", sides, 3 * nbytes, inner=count)
    count = rotations(device, 3 * nbytes)
    for name, (passes, sides) in loss_sides(device, batch, (3, *shape[1:]), count, compiled).items():
        yield Case(name, batch, "fp32", sides, passes * nbytes, inner=count)


def upsampling_case(
    device: torch.device, batch: int, precision: Precision, shape: tuple[int, int, int], count: int
) -> Case:
    """Upsampling to `shape` and its convolution, as one transposed convolution and as two operations."""
    channels, height, width = shape
    dtype = DTYPES[precision]
    small = [torch.randn(batch, channels, height // 2, width // 2, device=device).to(dtype) for _ in range(count)]
    weight = torch.randn(channels, channels, 3, 3, device=device).to(dtype)
    bias, kernel = torch.zeros(channels, device=device, dtype=dtype), summed_kernel(weight)
    sides: dict[str, Side] = {
        OURS: lambda i: upsample_convolve(small[i % count], kernel, bias),
        EAGER: lambda i: upsample_convolve_reference(small[i % count], weight, bias),
    }
    nbytes, flops = 5 * small[0].numel() * dtype.itemsize, 2 * 16 * small[0].numel() * channels
    return Case("upsampling + convolution", batch, precision, sides, nbytes, flops, count)


def loss_sides(
    device: torch.device, batch: int, shape: tuple[int, int, int], count: int, compiled: bool
) -> dict[str, tuple[int, dict[str, Side]]]:
    """The comparison and each loss, forward and backward, with their noise: images they must move, and the sides.

    Eager torch and the compiler draw by `torch.randn` once and keep it for the loss: what one would write without us.
    """
    schedule = schedule_from_config(LINEAR)
    layers = layer_coefficients(make_grid("quad", 10, schedule), 0.2, schedule)
    k = torch.arange(batch) % 10 + 1
    rows = comparison_rows(k, (layers.times[k - 1] + 900) // 2, layers, schedule)
    rows = ComparisonRows(*(v.to(device) for v in vars(rows).values()))
    zeta = Draw(PhiloxStreams(0, range(batch), device).streams, 1)
    log_gamma = torch.zeros(shape, device=device, requires_grad=True)
    images = [torch.randn(3, batch, *shape, device=device).unbind() for _ in range(count)]
    images = [tuple(v.requires_grad_() for v in lot) for lot in images]

    def target(noise: Tensor) -> tuple[Tensor, Tensor]:
        return comparison_target(log_gamma, rows, noise), per_sample(rows.noise_scale, noise)

    def eager_critic(f: Tensor, e: Tensor, y: Tensor) -> Tensor:
        return critic_reference(f, *(v.detach() for v in target(torch.randn_like(f))))

    def eager_fisher(f: Tensor, e: Tensor, y: Tensor) -> Tensor:
        return fisher_reference(f, e, *target(torch.randn_like(f)))

    def eager_surrogate(f: Tensor, e: Tensor, y: Tensor) -> Tensor:
        return surrogate_reference(f, e, y, per_sample(rows.noise_scale, y))

    # passes over an image: the comparison reads x, eps and writes y', its backward reads dy and writes d eps and rows
    # of d log_gamma; a loss reads its inputs once more in the backward
    cases: dict[str, tuple[int, Function, Function, tuple[int, ...]]] = {
        "comparison point": (
            6,
            lambda x, eps, _: compare(x.detach(), eps, log_gamma, rows, zeta),
            lambda x, eps, _: compare_reference(x.detach(), eps, log_gamma, rows, torch.randn_like(x)),
            (1,),
        ),
        "critic loss": (3, lambda f, e, y: critic_sums(f, log_gamma, rows, zeta), eager_critic, (0,)),
        "Fisher divergence": (
            7,
            lambda f, e, y: student_sums("fisher", f, e, y, log_gamma, rows, zeta).loss,
            eager_fisher,
            (0, 1),
        ),
        "reverse KL": (
            6,
            lambda f, e, y: student_sums("reverse-kl", f, e, y, log_gamma, rows, zeta).loss,
            eager_surrogate,
            (2,),
        ),
    }

    def both(function: Function, wanted: tuple[int, ...]) -> Side:
        def run(i: int) -> Any:
            given = images[i % count]
            return torch.autograd.grad(function(*given).sum(), [given[j] for j in wanted])

        return run

    found = {}
    for name, (passes, ours, eager, wanted) in cases.items():
        functions = {OURS: ours} if triton_can_run(log_gamma) else {}
        functions[EAGER] = eager
        if compiled:
            functions["compile"] = torch.compile(eager, mode="max-autotune-no-cudagraphs", dynamic=False)
        found[f"{name}, forward and backward"] = (passes, {n: both(f, wanted) for n, f in functions.items()})
    return found


def norm_sides(
    device: torch.device,
    batch: int,
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    memory_format: torch.memory_format,
    count: int,
    compiled: bool,
) -> tuple[dict[str, Side], dict[str, Side]]:
    """Sides of GroupNorm + SiLU with a time embedding, forward alone and with its backward."""
    xs = [torch.randn(batch, *shape, device=device).to(dtype, memory_format=memory_format) for _ in range(count)]
    leaves = [x.detach().requires_grad_(True) for x in xs]
    gradient = torch.randn_like(xs[0])
    weight, bias = torch.ones(shape[0], device=device, dtype=dtype), torch.zeros(shape[0], device=device, dtype=dtype)
    norm: dict[str, Any] = {"weight": weight, "bias": bias, "groups": GROUPS if shape[0] % GROUPS == 0 else 1}
    norm |= {"eps": EPS, "temb": torch.randn(batch, shape[0], device=device).to(dtype)}
    functions: dict[str, Callable[[Tensor], Tensor]] = {EAGER: lambda x: composite(x, **norm)}
    if triton_can_run(weight):
        functions = {OURS: lambda x: group_norm_silu(x, **norm)} | functions
    if compiled:
        program = torch.compile(composite, mode="max-autotune-no-cudagraphs", dynamic=False)
        functions["compile"] = lambda x: program(x, **norm)

    def forward(function: Callable[[Tensor], Tensor]) -> Side:
        return lambda i: function(xs[i % count])

    def both(function: Callable[[Tensor], Tensor]) -> Side:
        return lambda i: torch.autograd.grad(function(leaves[i % count]), leaves[i % count], gradient)

    return {n: forward(f) for n, f in functions.items()}, {n: both(f) for n, f in functions.items()}


def check_kernels(device: torch.device) -> list[Accuracy]:
    """Every kernel on this device against its float64 reference; needs a device that Triton runs on."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for dtype in BOUNDS:
        for shape in ((2, 128, 32, 32), (3, 96, 9, 7), (1, 384, 32, 32)):
            for mean in (0.0, 1e4) if dtype == torch.float32 else (0.0,):
                for memory_format in (torch.contiguous_format, torch.channels_last):
                    x = torch.randn(shape, generator=generator) + mean
                    x = x.to(device, dtype, memory_format=memory_format)
                    weight, bias, temb = (torch.randn(n, shape[1], generator=generator) for n in (1, 1, shape[0]))
                    given = [x, weight[0].to(device), bias[0].to(device), temb.to(device, dtype)]
                    label = f"GroupNorm + SiLU, {tuple(shape)} {str(dtype)[6:]}, mean {mean:g}, {memory_format}"
                    found += check_norm(label, given, BOUNDS[dtype])
    streams = PhiloxStreams(2**40 + 1, [0, 7, 2**35], device).streams
    reference = normals(streams.cpu(), 3, (3, 33, 31), torch.float64)
    found.append(Accuracy("Philox normals, kernel", error(normals_triton(streams, 3, (3, 33, 31)), reference), 1e-6))
    found.append(Accuracy("Philox normals, torch", error(normals(streams, 3, (3, 33, 31)), reference), 1e-6))
    x, eps, gamma = (torch.randn(3, 3, 33, 31, generator=generator) for _ in range(3))
    got = hsivi_step(x.to(device), eps.to(device), 1.02, -0.3, 0.2, gamma[0].to(device), streams, 2, "triton")
    wanted = step_reference(x.double(), eps.double(), 1.02, -0.3, 0.2, gamma[0], streams.cpu(), 2)
    return [*found, Accuracy("HSIVI step", error(got, wanted), 1e-6), *check_losses(device)]


def check_losses(device: torch.device) -> list[Accuracy]:
    """Comparison point, losses and gradients against float64."""
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(3, 3, 33, 31, generator=generator) for _ in range(5)]
    given = [*images, 0.3 * torch.randn(3, 33, 31, generator=generator)]
    schedule = schedule_from_config(LINEAR)
    layers = layer_coefficients(make_grid("quad", 10, schedule), 0.2, schedule)
    rows = comparison_rows(torch.tensor([1, 5, 10]), torch.tensor([20, 400, 800]), layers, schedule)
    results = []
    for place, kind in ((device, torch.float32), (torch.device("cpu"), torch.float64)):
        zeta = Draw(PhiloxStreams(2**40 + 1, [0, 7, 2**35], place).streams, 3)
        x, eps, f, e, y, gamma = (v.to(place, kind).requires_grad_() for v in given)
        point = compare(x, eps, gamma, rows, zeta)
        outputs: dict[str, tuple[Tensor, tuple[Tensor, ...]]] = {"comparison point": (point.square(), (x, eps, gamma))}
        outputs["critic loss"] = (critic_sums(f, gamma, rows, zeta), (f,))
        outputs["Fisher divergence"] = (student_sums("fisher", f, e, y, gamma, rows, zeta).loss, (f, e, gamma))
        outputs["reverse KL"] = (student_sums("reverse-kl", f, e, y, gamma, rows, zeta).loss, (y,))
        found = {}
        for name, (out, leaves) in outputs.items():
            found[name] = out.detach()
            for number, gradient in enumerate(torch.autograd.grad(out.sum(), leaves)):
                found[f"{name}, gradient {number}"] = gradient
        results.append(found)
    ours, wanted = results
    # sums of both signs lose a digit to cancelling
    return [Accuracy(name, error(ours[name], wanted[name]), 5e-6) for name in wanted]


def check_norm(label: str, given: list[Tensor], bound: float) -> list[Accuracy]:
    """Output and gradients of GroupNorm + SiLU at `given` = x, weight, bias and time embedding."""
    results = []
    for function, kind in ((group_norm_silu, None), (composite, torch.float64)):
        leaves = [v.detach().to(kind or v.dtype).requires_grad_(True) for v in given]
        call: Any = function
        out = call(leaves[0], leaves[1], leaves[2], GROUPS, EPS, leaves[3])
        out.square().sum().backward()
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    names = ("output", "dx", "dweight", "dbias", "dtemb")
    errors = [error(ours, wanted) for ours, wanted in zip(*results, strict=True)]
    # gradients add up over pixels and batch: a few times the rounding of one output
    limits = [bound, *[5 * bound] * 4]
    return [Accuracy(f"{label}: {n}", e, limit) for n, e, limit in zip(names, errors, limits, strict=True)]


def error(got: Any, reference: Any) -> float:
    """`||got - reference|| / ||reference||`."""
    reference = reference.to(got.device)
    return float((got.double() - reference).norm() / reference.norm())
