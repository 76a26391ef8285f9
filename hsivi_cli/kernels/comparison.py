"""The point where a layer's output is compared with the teacher, in one pass that draws its noise; and the gradient.

`y' = p x + q eps + sigma zeta`, `sigma = sqrt((r exp(log_gamma))^2 + v)`: the layer's output diffused to a later time
(transitions.gaussian_layer.comparison_rows says what p, q, r and v are). Eager torch writes and reads zeta, the mean,
the spread and their products; here x and eps are read and y' is written. The losses (kernels.critic_loss, student_loss)
need zeta again, as `zeta s' / sigma`: they draw it again from the same Philox counters, so that it is never stored.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hsivi_cli.kernels.choice import Kernels
from hsivi_cli.kernels.philox import Draw, philox_normals
from hsivi_cli.kernels.runtime import jit, tl
from hsivi_cli.kernels.samples import BLOCK, flat, grid, like, locate, per_sample, pick, runs, strides


@dataclass(frozen=True)
class ComparisonRows:
    """Numbers of each row: p, q, r and v of the module's formula, `s'`, and the index k - 1 of its layer."""

    x: Float[Tensor, " n"]
    eps: Float[Tensor, " n"]
    layer_noise: Float[Tensor, " n"]
    added: Float[Tensor, " n"]
    noise_scale: Float[Tensor, " n"]
    layer: Int[Tensor, " n"]

    def packed(self, device: torch.device) -> Float[Tensor, "n 6"]:
        """All of it, for a kernel."""
        numbers = (self.x, self.eps, self.layer_noise, self.added, self.noise_scale, self.layer)
        return torch.stack([v.to(torch.float32) for v in numbers], 1).to(device)


def compare(
    x: Float[Tensor, " n *shape"],
    eps: Float[Tensor, " n *shape"],
    log_gamma: Float[Tensor, "..."],
    rows: ComparisonRows,
    zeta: Draw,
    kernels: Kernels = "auto",
) -> Float[Tensor, " n *shape"]:
    """The comparison point, of x's type and memory format; differentiable once in x, eps and log_gamma.

    `log_gamma` is a scalar, a map `shape`, or one map a layer `(K, *shape)`.
    """
    check(x, log_gamma, rows, zeta, eps)
    if runs(kernels, x, eps):
        return Compare.apply(x, eps, log_gamma, rows.packed(x.device), zeta)
    return compare_reference(x, eps, log_gamma, rows, zeta.normals(tuple(x.shape[1:]), wide(x)))


def check(x: Tensor, log_gamma: Tensor, rows: ComparisonRows, zeta: Draw, *others: Tensor) -> None:
    """Raise ValueError for shapes that do not belong together; the kernels trust them."""
    shape = x.shape[1:]
    gamma = log_gamma.ndim == 0 or log_gamma.shape == shape or log_gamma.shape[1:] == shape
    images = all(v.shape == x.shape for v in others)
    if not gamma or not images or len(rows.x) != len(x) or zeta.streams.shape != (len(x), 2):
        shapes = [tuple(v.shape) for v in (x, *others, log_gamma, rows.x, zeta.streams)]
        raise ValueError(f"images, log_gamma, rows and streams of shapes {shapes} do not fit")


def wide(x: Tensor) -> torch.dtype:
    """The type in which torch computes for x."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def compare_reference(
    x: Tensor, eps: Tensor, log_gamma: Tensor, rows: ComparisonRows, zeta: Float[Tensor, " n *shape"]
) -> Tensor:
    """The same by torch's own operations; with x, eps and zeta in float64 it is the reference."""
    mean = per_sample(rows.x, x) * x + per_sample(rows.eps, x) * eps.to(x.dtype)
    return mean + (spread(log_gamma, rows, zeta) * zeta).to(x.dtype)


def spread(log_gamma: Tensor, rows: ComparisonRows, zeta: Float[Tensor, " n *shape"]) -> Float[Tensor, "n ..."]:
    """`sigma`, broadcastable to `zeta` and of its type."""
    gamma = log_gamma[rows.layer.to(log_gamma.device)] if log_gamma.ndim == zeta.ndim else log_gamma
    own = per_sample(rows.layer_noise, zeta) * gamma.to(zeta.dtype).exp()
    return (own**2 + per_sample(rows.added, zeta)).sqrt()


def comparison_target(
    log_gamma: Tensor, rows: ComparisonRows, zeta: Float[Tensor, " n *shape"]
) -> Float[Tensor, " n *shape"]:
    """What the critic learns at the comparison point: `zeta / gamma'`, `gamma' = sigma / s'`."""
    return zeta * per_sample(rows.noise_scale, zeta) / spread(log_gamma, rows, zeta)


class Compare(torch.autograd.Function):
    """The kernel and its backward; `numbers` is `ComparisonRows.packed`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: Tensor, log_gamma: Tensor, numbers: Tensor, zeta: Draw) -> Tensor:
        """Run the kernel; nothing of the images' size is kept."""
        out = like(x)
        x, eps = flat(x), flat(eps)
        gamma = gamma_arguments(log_gamma, x)
        with torch.cuda.device_of(x):
            compare_kernel[grid(x)](
                x, eps, out, gamma[0], numbers, zeta.streams, zeta.number, x[0].numel(), x[0, 0].numel(), gamma[1],
                *strides(x, eps, out), PER_ELEMENT=gamma[2], BLOCK=BLOCK,
            )  # fmt: skip
        ctx.save_for_backward(log_gamma, numbers)
        ctx.zeta, ctx.eps_type = zeta, eps.dtype
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """One kernel for eps and log_gamma's gradient a row, which torch then adds up over rows."""
        log_gamma, numbers = ctx.saved_tensors
        dx = grad * numbers[:, 0].to(grad.dtype).reshape(-1, 1, 1, 1) if ctx.needs_input_grad[0] else None
        deps = like(grad, ctx.eps_type)
        dgamma = torch.empty(len(grad), grad[0].numel(), device=grad.device)
        grad = flat(grad)
        gamma = gamma_arguments(log_gamma, grad)
        with torch.cuda.device_of(grad):
            compare_backward_kernel[grid(grad)](
                grad, deps, dgamma, gamma[0], numbers, ctx.zeta.streams, ctx.zeta.number,
                grad[0].numel(), grad[0, 0].numel(), gamma[1], *strides(grad, deps),
                PER_ELEMENT=gamma[2], BLOCK=BLOCK,
            )  # fmt: skip
        return dx, deps, fold_gamma(dgamma, log_gamma, numbers), None, None


def gamma_arguments(log_gamma: Tensor, x: Tensor) -> tuple[Tensor, int, bool]:
    """`log_gamma` for a kernel: dense, how far apart two layers' maps lie, and whether it has a number an element."""
    return log_gamma.contiguous(), x[0].numel() if log_gamma.ndim == x.ndim else 0, log_gamma.ndim > 0


def fold_gamma(by_row: Float[Tensor, "n e"], log_gamma: Tensor, numbers: Float[Tensor, "n 6"]) -> Tensor:
    """Gradients of every row's log_gamma, added up to that of `log_gamma` in an order that is always the same."""
    if log_gamma.ndim == 0:
        return by_row.sum().to(log_gamma.dtype)
    if log_gamma.ndim == 3:
        return by_row.sum(0).reshape(log_gamma.shape).to(log_gamma.dtype)
    layers = torch.arange(len(log_gamma), device=numbers.device)[:, None] == numbers[:, 5]
    return (layers.to(by_row.dtype) @ by_row).reshape(log_gamma.shape).to(log_gamma.dtype)


@jit()
def sigma(log_gamma, element, mask, layer_noise, added, PER_ELEMENT: tl.constexpr):
    """The spread of each element, and the part of its square that log_gamma moves."""
    if PER_ELEMENT:
        gamma = tl.load(log_gamma + element, mask=mask, other=0.0).to(tl.float32)
    else:
        gamma = tl.load(log_gamma).to(tl.float32)
    own = layer_noise * tl.exp(gamma)
    own *= own
    return tl.sqrt(own + added), own


@jit(do_not_specialize=["draw"])
def compare_kernel(
    x, eps, out, log_gamma, numbers, streams, draw, elements, pixels, gamma_stride,
    x_n, x_c, x_p, eps_n, eps_c, eps_p, out_n, out_c, out_p,
    PER_ELEMENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write y'; the grid is (rows, blocks of BLOCK)."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    p = tl.load(numbers + 6 * row)
    q = tl.load(numbers + 6 * row + 1)
    r = tl.load(numbers + 6 * row + 2)
    v = tl.load(numbers + 6 * row + 3)
    log_gamma += tl.load(numbers + 6 * row + 5).to(tl.int64) * gamma_stride
    z0, z1, z2, z3 = philox_normals(tl.load(streams + 2 * row), tl.load(streams + 2 * row + 1), draw, block)
    x += row * x_n
    eps += row * eps_n
    out += row * out_n
    for lane in tl.static_range(4):
        element, channel, pixel, mask = locate(block, elements, pixels, lane)
        spread, _ = sigma(log_gamma, element, mask, r, v, PER_ELEMENT)
        y = p * tl.load(x + channel * x_c + pixel * x_p, mask=mask, other=0.0).to(tl.float32)
        y += q * tl.load(eps + channel * eps_c + pixel * eps_p, mask=mask, other=0.0).to(tl.float32)
        y += spread * pick(z0, z1, z2, z3, lane)
        tl.store(out + channel * out_c + pixel * out_p, y.to(out.dtype.element_ty), mask=mask)


@jit(do_not_specialize=["draw"])
def compare_backward_kernel(
    grad, deps, dgamma, log_gamma, numbers, streams, draw, elements, pixels, gamma_stride,
    grad_n, grad_c, grad_p, deps_n, deps_c, deps_p,
    PER_ELEMENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`d eps = q dy`, and of each row's log_gamma `d sigma / d log_gamma = own / sigma` times zeta dy."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    q = tl.load(numbers + 6 * row + 1)
    r = tl.load(numbers + 6 * row + 2)
    v = tl.load(numbers + 6 * row + 3)
    log_gamma += tl.load(numbers + 6 * row + 5).to(tl.int64) * gamma_stride
    z0, z1, z2, z3 = philox_normals(tl.load(streams + 2 * row), tl.load(streams + 2 * row + 1), draw, block)
    grad += row * grad_n
    deps += row * deps_n
    dgamma += row * elements
    for lane in tl.static_range(4):
        element, channel, pixel, mask = locate(block, elements, pixels, lane)
        spread, own = sigma(log_gamma, element, mask, r, v, PER_ELEMENT)
        dy = tl.load(grad + channel * grad_c + pixel * grad_p, mask=mask, other=0.0).to(tl.float32)
        tl.store(deps + channel * deps_c + pixel * deps_p, (q * dy).to(deps.dtype.element_ty), mask=mask)
        tl.store(dgamma + element, dy * pick(z0, z1, z2, z3, lane) * own / spread, mask=mask)
