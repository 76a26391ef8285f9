"""The critic's loss a row, `sum s'^2 (f - zeta / gamma')^2`, and its gradient; zeta is drawn again, never stored.

Eager torch writes and reads the target, its difference from f, the square and the weighted square (and keeps two of
them for the backward); here f is read, and read once more by the backward, which writes the gradient. A program adds up
what it has of a row, torch adds the programs' sums: no atomics, so equal inputs give equal bits.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hsivi_cli.kernels.choice import Kernels
from hsivi_cli.kernels.comparison import (
    ComparisonRows,
    check,
    comparison_target,
    gamma_arguments,
    sigma,
    wide,
)
from hsivi_cli.kernels.philox import Draw, philox_normals
from hsivi_cli.kernels.runtime import jit, tl
from hsivi_cli.kernels.samples import BLOCK, flat, grid, like, locate, per_sample, pick, runs, strides


def critic_sums(
    critic_eps: Float[Tensor, " n *shape"],
    log_gamma: Float[Tensor, "..."],
    rows: ComparisonRows,
    zeta: Draw,
    kernels: Kernels = "auto",
) -> Float[Tensor, " n"]:
    """The loss of every row, in float32 (float64 for float64); its gradient reaches `critic_eps` alone."""
    check(critic_eps, log_gamma, rows, zeta)
    log_gamma = log_gamma.detach()
    if runs(kernels, critic_eps):
        return CriticSums.apply(critic_eps, log_gamma, rows.packed(critic_eps.device), zeta)
    target = comparison_target(log_gamma, rows, zeta.normals(tuple(critic_eps.shape[1:]), wide(critic_eps)))
    return critic_reference(critic_eps, target, per_sample(rows.noise_scale, target))


def critic_reference(
    critic_eps: Float[Tensor, " n *shape"], target: Float[Tensor, " n *shape"], noise_scale: Float[Tensor, " n *ones"]
) -> Float[Tensor, " n"]:
    """The same by torch's own operations."""
    return (noise_scale**2 * (critic_eps - target) ** 2).flatten(1).sum(1)


class CriticSums(torch.autograd.Function):
    """The kernel and its backward; `numbers` is `ComparisonRows.packed`."""

    @staticmethod
    def forward(ctx: Any, critic_eps: Tensor, log_gamma: Tensor, numbers: Tensor, zeta: Draw) -> Tensor:
        """Run the kernel, keep f."""
        ctx.save_for_backward(critic_eps, log_gamma, numbers)
        ctx.zeta = zeta
        sums = torch.empty(grid(critic_eps), device=critic_eps.device)
        launch(critic_eps, sums, None, log_gamma, numbers, zeta)
        return sums.sum(1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """One kernel."""
        critic_eps, log_gamma, numbers = ctx.saved_tensors
        out = like(critic_eps)
        launch(critic_eps, out, grad.contiguous(), log_gamma, numbers, ctx.zeta)
        return out, None, None, None


def launch(
    critic_eps: Tensor, out: Tensor, grad: Tensor | None, log_gamma: Tensor, numbers: Tensor, zeta: Draw
) -> None:
    """Write the programs' sums into `out`, or with `grad` the gradient."""
    gamma = gamma_arguments(log_gamma, critic_eps)
    f = flat(critic_eps)
    with torch.cuda.device_of(f):
        critic_kernel[grid(f)](
            f, out, grad, gamma[0], numbers, zeta.streams, zeta.number, f[0].numel(), f[0, 0].numel(), gamma[1],
            *strides(f, f if grad is None else out), PER_ELEMENT=gamma[2], BACKWARD=grad is not None, BLOCK=BLOCK,
        )  # fmt: skip


@jit(do_not_specialize=["draw"])
def critic_kernel(
    f, out, grad, log_gamma, numbers, streams, draw, elements, pixels, gamma_stride,
    f_n, f_c, f_p, out_n, out_c, out_p,
    PER_ELEMENT: tl.constexpr, BACKWARD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program's sum into `out` (rows, programs), or the gradient; the grid is (rows, blocks of BLOCK)."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    r = tl.load(numbers + 6 * row + 2)
    v = tl.load(numbers + 6 * row + 3)
    scale = tl.load(numbers + 6 * row + 4)
    log_gamma += tl.load(numbers + 6 * row + 5).to(tl.int64) * gamma_stride
    z0, z1, z2, z3 = philox_normals(tl.load(streams + 2 * row), tl.load(streams + 2 * row + 1), draw, block)
    f += row * f_n
    total = tl.zeros([BLOCK], tl.float32)
    slope = 2.0 * scale * scale
    if BACKWARD:
        out += row * out_n
        slope *= tl.load(grad + row).to(tl.float32)
    for lane in tl.static_range(4):
        element, channel, pixel, mask = locate(block, elements, pixels, lane)
        spread, _ = sigma(log_gamma, element, mask, r, v, PER_ELEMENT)
        off = tl.load(f + channel * f_c + pixel * f_p, mask=mask, other=0.0).to(tl.float32)
        off -= pick(z0, z1, z2, z3, lane) * scale / spread
        if BACKWARD:
            place = out + channel * out_c + pixel * out_p
            tl.store(place, (slope * off).to(out.dtype.element_ty), mask=mask)
        else:
            off = tl.where(mask, off, 0.0)
            total += off * off
    if not BACKWARD:
        tl.store(out + row * tl.num_programs(1) + tl.program_id(1), scale * scale * tl.sum(total))
