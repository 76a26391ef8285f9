"""The student's losses a row, and what is watched beside them, in one pass over the predictions; and the gradients.

With g = f - eps* (critic less teacher), T = zeta / gamma' and s' of the comparison (kernels.comparison):
- the Fisher divergence `sum s'^2 [2 g (T - eps*) - g^2]`, with gradients to f, eps* and, through T, log_gamma;
- the surrogate of the reverse KL `sum -s' g y'`, whose gradient reaches y' alone;
- the critic's gap `sum s'^2 g^2`.
Eager torch makes a dozen passes for the three; here f, eps* and y' are read once. zeta is drawn again, never stored.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from hsivi_cli.kernels.choice import Kernels
from hsivi_cli.kernels.comparison import (
    ComparisonRows,
    check,
    comparison_target,
    fold_gamma,
    gamma_arguments,
    sigma,
    wide,
)
from hsivi_cli.kernels.philox import Draw, philox_normals
from hsivi_cli.kernels.runtime import jit, tl
from hsivi_cli.kernels.samples import BLOCK, flat, grid, like, locate, per_sample, pick, runs, strides

Loss = Literal["fisher", "reverse-kl"]


@dataclass(frozen=True)
class StudentSums:
    """The loss of every row, which has a gradient, and the Fisher divergence and the critic's gap, which have none."""

    loss: Float[Tensor, " n"]
    fisher: Float[Tensor, " n"]
    gap: Float[Tensor, " n"]


def student_sums(
    loss: Loss,
    critic_eps: Float[Tensor, " n *shape"],
    teacher_eps: Float[Tensor, " n *shape"],
    y: Float[Tensor, " n *shape"],
    log_gamma: Float[Tensor, "..."],
    rows: ComparisonRows,
    zeta: Draw,
    kernels: Kernels = "auto",
) -> StudentSums:
    """All three sums; the gradient of `fisher` reaches both predictions and log_gamma, of `reverse-kl` y alone."""
    check(critic_eps, log_gamma, rows, zeta, teacher_eps, y)
    if runs(kernels, critic_eps, teacher_eps, y):
        numbers = rows.packed(critic_eps.device)
        chosen, other, gap = Sums.apply(loss == "fisher", critic_eps, teacher_eps, y, log_gamma, numbers, zeta)
        return StudentSums(chosen, chosen.detach() if loss == "fisher" else other, gap)
    with torch.set_grad_enabled(torch.is_grad_enabled() and loss == "fisher"):
        target = comparison_target(log_gamma, rows, zeta.normals(tuple(y.shape[1:]), wide(y)))
        noise_scale = per_sample(rows.noise_scale, target)
        fisher = fisher_reference(critic_eps, teacher_eps, target, noise_scale)
    chosen = fisher if loss == "fisher" else surrogate_reference(critic_eps, teacher_eps, y, noise_scale)
    return StudentSums(chosen, fisher.detach(), gap_reference(critic_eps, teacher_eps, noise_scale))


def fisher_reference(
    critic_eps: Float[Tensor, " n *shape"],
    teacher_eps: Float[Tensor, " n *shape"],
    target: Float[Tensor, " n *shape"],
    noise_scale: Float[Tensor, " n *ones"],
) -> Float[Tensor, " n"]:
    """The Fisher divergence by torch's own operations."""
    gap = critic_eps - teacher_eps
    return (noise_scale**2 * (2 * gap * (target - teacher_eps) - gap**2)).flatten(1).sum(1)


def surrogate_reference(
    critic_eps: Float[Tensor, " n *shape"],
    teacher_eps: Float[Tensor, " n *shape"],
    y: Float[Tensor, " n *shape"],
    noise_scale: Float[Tensor, " n *ones"],
) -> Float[Tensor, " n"]:
    """The reverse KL's surrogate by torch's own operations."""
    gap = (critic_eps - teacher_eps).detach()
    return -(noise_scale * gap * y).flatten(1).sum(1)


@torch.no_grad()
def gap_reference(
    critic_eps: Float[Tensor, " n *shape"],
    teacher_eps: Float[Tensor, " n *shape"],
    noise_scale: Float[Tensor, " n *ones"],
) -> Float[Tensor, " n"]:
    """The critic's gap by torch's own operations."""
    return (noise_scale**2 * (critic_eps - teacher_eps) ** 2).flatten(1).sum(1)


class Sums(torch.autograd.Function):
    """The kernel and its backward; `numbers` is `ComparisonRows.packed`."""

    @staticmethod
    def forward(
        ctx: Any,
        fisher: bool,
        critic_eps: Tensor,
        teacher_eps: Tensor,
        y: Tensor,
        log_gamma: Tensor,
        numbers: Tensor,
        zeta: Draw,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run the kernel, keep the predictions."""
        ctx.save_for_backward(critic_eps, teacher_eps, log_gamma, numbers)
        ctx.fisher, ctx.zeta, ctx.y_type = fisher, zeta, y.dtype
        f, e, y = flat(critic_eps), flat(teacher_eps), flat(y)
        sums = torch.empty(3, *grid(f), device=f.device)
        gamma = gamma_arguments(log_gamma, f)
        with torch.cuda.device_of(f):
            student_kernel[grid(f)](
                f, e, y, sums, gamma[0], numbers, zeta.streams, zeta.number,
                f[0].numel(), f[0, 0].numel(), gamma[1], sums[0].numel(), *strides(f, e, y),
                SURROGATE=not fisher, PER_ELEMENT=gamma[2], BLOCK=BLOCK,
            )  # fmt: skip
        surrogate, divergence, gap = sums.sum(2)
        loss, other = (divergence, surrogate) if fisher else (surrogate, divergence)
        ctx.mark_non_differentiable(other, gap)
        return loss, other, gap

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """One kernel, and for the Fisher divergence the sum of log_gamma's gradient over rows."""
        critic_eps, teacher_eps, log_gamma, numbers = ctx.saved_tensors
        f, e, grad = flat(critic_eps), flat(teacher_eps), grad.contiguous()
        gamma = gamma_arguments(log_gamma, f)
        sizes = (f[0].numel(), f[0, 0].numel(), gamma[1])
        if not ctx.fisher:
            dy = like(critic_eps, ctx.y_type)
            with torch.cuda.device_of(f):
                surrogate_backward_kernel[grid(f)](
                    f, e, grad, dy, numbers, *sizes[:2], *strides(f, e, dy), BLOCK=BLOCK
                )  # fmt: skip
            return None, None, None, dy, None, None, None
        df, de = like(critic_eps), like(teacher_eps)
        dgamma = torch.empty(len(f), f[0].numel(), device=f.device)
        with torch.cuda.device_of(f):
            fisher_backward_kernel[grid(f)](
                f, e, grad, df, de, dgamma, gamma[0], numbers, ctx.zeta.streams, ctx.zeta.number,
                *sizes, *strides(f, e, df, de), PER_ELEMENT=gamma[2], BLOCK=BLOCK,
            )  # fmt: skip
        return None, df, de, None, fold_gamma(dgamma, log_gamma, numbers), None, None


@jit(do_not_specialize=["draw"])
def student_kernel(
    f, e, y, sums, log_gamma, numbers, streams, draw, elements, pixels, gamma_stride, sums_stride,
    f_n, f_c, f_p, e_n, e_c, e_p, y_n, y_c, y_p,
    SURROGATE: tl.constexpr, PER_ELEMENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program's three sums, (3, rows, programs): surrogate (0 unless SURROGATE), divergence and gap."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    r = tl.load(numbers + 6 * row + 2)
    v = tl.load(numbers + 6 * row + 3)
    scale = tl.load(numbers + 6 * row + 4)
    log_gamma += tl.load(numbers + 6 * row + 5).to(tl.int64) * gamma_stride
    z0, z1, z2, z3 = philox_normals(tl.load(streams + 2 * row), tl.load(streams + 2 * row + 1), draw, block)
    f += row * f_n
    e += row * e_n
    y += row * y_n
    surrogate = tl.zeros([BLOCK], tl.float32)
    divergence = tl.zeros([BLOCK], tl.float32)
    gap = tl.zeros([BLOCK], tl.float32)
    for lane in tl.static_range(4):
        element, channel, pixel, mask = locate(block, elements, pixels, lane)
        spread, _ = sigma(log_gamma, element, mask, r, v, PER_ELEMENT)
        teacher = tl.load(e + channel * e_c + pixel * e_p, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(f + channel * f_c + pixel * f_p, mask=mask, other=0.0).to(tl.float32) - teacher
        target = pick(z0, z1, z2, z3, lane) * scale / spread
        # where there is no element g is 0, and all terms with it
        divergence += 2.0 * g * (target - teacher) - g * g
        gap += g * g
        if SURROGATE:
            surrogate += g * tl.load(y + channel * y_c + pixel * y_p, mask=mask, other=0.0).to(tl.float32)
    out = sums + row * tl.num_programs(1) + tl.program_id(1)
    tl.store(out, -scale * tl.sum(surrogate))
    tl.store(out + sums_stride, scale * scale * tl.sum(divergence))
    tl.store(out + 2 * sums_stride, scale * scale * tl.sum(gap))


@jit()
def surrogate_backward_kernel(
    f, e, grad, dy, numbers, elements, pixels,
    f_n, f_c, f_p, e_n, e_c, e_p, dy_n, dy_c, dy_p,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """`d y' = -s' (f - eps*)`."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    slope = -tl.load(numbers + 6 * row + 4) * tl.load(grad + row).to(tl.float32)
    f += row * f_n
    e += row * e_n
    dy += row * dy_n
    for lane in tl.static_range(4):
        _, channel, pixel, mask = locate(block, elements, pixels, lane)
        g = tl.load(f + channel * f_c + pixel * f_p, mask=mask, other=0.0).to(tl.float32)
        g -= tl.load(e + channel * e_c + pixel * e_p, mask=mask, other=0.0).to(tl.float32)
        tl.store(dy + channel * dy_c + pixel * dy_p, (slope * g).to(dy.dtype.element_ty), mask=mask)


@jit(do_not_specialize=["draw"])
def fisher_backward_kernel(
    f, e, grad, df, de, dgamma, log_gamma, numbers, streams, draw, elements, pixels, gamma_stride,
    f_n, f_c, f_p, e_n, e_c, e_p, df_n, df_c, df_p, de_n, de_c, de_p,
    PER_ELEMENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`d f = 2 s'^2 (T - f)`, `d eps* = 2 s'^2 (eps* - T)`, by `d T = 2 s'^2 g` of log_gamma `-T own / sigma^2`."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    r = tl.load(numbers + 6 * row + 2)
    v = tl.load(numbers + 6 * row + 3)
    scale = tl.load(numbers + 6 * row + 4)
    log_gamma += tl.load(numbers + 6 * row + 5).to(tl.int64) * gamma_stride
    z0, z1, z2, z3 = philox_normals(tl.load(streams + 2 * row), tl.load(streams + 2 * row + 1), draw, block)
    slope = 2.0 * scale * scale * tl.load(grad + row).to(tl.float32)
    f += row * f_n
    e += row * e_n
    df += row * df_n
    de += row * de_n
    dgamma += row * elements
    for lane in tl.static_range(4):
        element, channel, pixel, mask = locate(block, elements, pixels, lane)
        spread, own = sigma(log_gamma, element, mask, r, v, PER_ELEMENT)
        critic = tl.load(f + channel * f_c + pixel * f_p, mask=mask, other=0.0).to(tl.float32)
        teacher = tl.load(e + channel * e_c + pixel * e_p, mask=mask, other=0.0).to(tl.float32)
        target = pick(z0, z1, z2, z3, lane) * scale / spread
        off = slope * (target - critic)
        tl.store(df + channel * df_c + pixel * df_p, off.to(df.dtype.element_ty), mask=mask)
        off = slope * (teacher - target)
        tl.store(de + channel * de_c + pixel * de_p, off.to(de.dtype.element_ty), mask=mask)
        dtarget = slope * (critic - teacher)
        tl.store(dgamma + element, -dtarget * target * own / (spread * spread), mask=mask)
