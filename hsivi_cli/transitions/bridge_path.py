"""A walk along a geometric bridge and its adjoint, written by hand: the one sequential loop of the Langevin methods.

With `g_k` the gradient of bridge k, transition k = 1 .. K maps the position z and the momentum rho to

    h = keep rho + kick + before g_k(z),    z' = z + stride h,    rho' = h + after g_k(z').

`before = after = stride / 2` is a momentum refresh and a leapfrog step, `after = 0` Euler-Maruyama, and `keep = 0` with
`before = stride / 2 = sqrt(e / 2)` an unadjusted Langevin step of size e.

Differentiating this loop through autograd costs five times the arithmetic. Its adjoint is as short as the loop: one
product with the Hessian of the target a state, and everything that belongs to parameters is done for all transitions at
once. Only first derivatives are available.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hsivi_cli.bridges.geometric import GeometricBridge

Rows = Float[Tensor, "n d"]


@dataclass(frozen=True)
class Moves:
    """The numbers of the transitions, each of shape (K,)."""

    keep: Float[Tensor, " k"]
    before: Float[Tensor, " k"]
    stride: Float[Tensor, " k"]
    after: Float[Tensor, " k"]


@dataclass(frozen=True)
class Path:
    """All states, positions `z` and momenta `rho`, and the target's gradient there; row 0 is the start."""

    z: Float[Tensor, "k+1 n d"]
    rho: Float[Tensor, "k+1 n d"]
    target_gradient: Float[Tensor, "k+1 n d"]

    def bridge_gradients(self, bridge: GeometricBridge) -> tuple[Float[Tensor, "k n d"], Float[Tensor, "k n d"]]:
        """`g_k` at the start and at the end of every transition."""
        betas = bridge.betas[:, None, None]
        reference = bridge.reference.gradient(self.z)
        before = torch.lerp(reference[:-1], self.target_gradient[:-1], betas)
        return before, torch.lerp(reference[1:], self.target_gradient[1:], betas)


def walk_path(z: Rows, rho: Rows, bridge: GeometricBridge, moves: Moves, kick: Float[Tensor, "k n d"]) -> Path:
    """Walk from `(z, rho)`; differentiable once in every tensor that goes in."""
    reference = bridge.reference
    tensors = (z, rho, kick, moves.keep, moves.before, moves.stride, moves.after)
    tensors += (bridge.betas, reference.mean, (-2 * reference.log_scale).exp())
    if torch.is_grad_enabled():
        return Path(*_Walk.apply(bridge.linearise, *tensors))
    return Path(*_forward(lambda at: (bridge.target_gradient(at), None), *tensors)[:3])


def _forward(linearised: Callable[[Rows], tuple[Rows, Any]], *tensors: Tensor) -> tuple[Any, ...]:
    z, rho, kick, keep, before, stride, after, betas, mean, precision = tensors
    numbers = zip(*(values.tolist() for values in (keep, before, stride, after, betas)), strict=True)
    pull = mean * precision
    gradient, product = linearised(z)
    reference = torch.addcmul(pull, z, precision, value=-1)
    positions, momenta, halves, gradients, products = [z], [rho], [], [gradient], [product]
    for (c, p, d, r, beta), impulse in zip(numbers, kick.unbind(), strict=True):
        half = torch.add(impulse, rho, alpha=c).add_(torch.lerp(reference, gradient, beta), alpha=p)
        z = torch.add(z, half, alpha=d)
        gradient, product = linearised(z)
        reference = torch.addcmul(pull, z, precision, value=-1)
        rho = torch.add(half, torch.lerp(reference, gradient, beta), alpha=r) if r else half
        halves.append(half)
        positions.append(z)
        momenta.append(rho)
        gradients.append(gradient)
        products.append(product)
    return torch.stack(positions), torch.stack(momenta), torch.stack(gradients), halves, products


class _Walk(torch.autograd.Function):
    """The walk; a bar over a name (`bar_z`) is the derivative of the objective with respect to it."""

    @staticmethod
    def forward(ctx: Any, linearised: Any, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        *path, ctx.halves, ctx.products = _forward(linearised, *tensors)
        ctx.save_for_backward(*tensors, *path)
        return tuple(path)  # type: ignore[return-value]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, bar_path: Tensor, bar_momenta: Tensor, bar_gradient: Tensor) -> tuple[Tensor | None, ...]:
        _, _, _, keep, before, stride, after, betas, mean, precision, z, rho, gradient = ctx.saved_tensors
        # v_j collects what the target's gradient at z_j is multiplied by: in the transition that ends there, in the one
        # that starts there, and outside the walk; w_j likewise for the reference
        lists = (values.tolist() for values in (keep, before, stride, after, betas))
        numbers = list(zip(*lists, strict=True))
        direct_z, direct_rho = bar_path.unbind(), bar_momenta.unbind()
        direct_gradient = bar_gradient.unbind()
        halves, ends, positions, references = [], [], [], []
        bar_rho, v, w = direct_rho[-1], direct_gradient[-1], torch.zeros_like(direct_z[-1])
        bar_z = direct_z[-1]
        for k in reversed(range(len(numbers))):
            c, p, d, r, beta = numbers[k]
            if r:
                v = torch.add(v, bar_rho, alpha=r * beta)
                w = torch.add(w, bar_rho, alpha=r * (1 - beta))
            bar_z = torch.addcmul(bar_z + ctx.products[k + 1](v), w, precision, value=-1)
            half = torch.add(bar_rho, bar_z, alpha=d)
            ends.append(bar_rho)
            positions.append(bar_z)
            halves.append(half)
            references.append(w)
            v = torch.add(direct_gradient[k], half, alpha=p * beta)
            w = half * (p * (1 - beta))
            bar_rho = torch.add(direct_rho[k], half, alpha=c)
            bar_z = bar_z + direct_z[k]
        bar_z = torch.addcmul(bar_z + ctx.products[0](v), w, precision, value=-1)
        references.append(w)
        bar_half, bar_end, bar_next, bar_reference = (
            torch.stack(rows[::-1]) for rows in (halves, ends, positions, references)
        )
        offset = mean - z
        reference = offset * precision
        weights = betas[:, None, None]
        start = torch.lerp(reference[:-1], gradient[:-1], weights)
        end = torch.lerp(reference[1:], gradient[1:], weights)
        contrast = gradient - reference
        bar_before, bar_after = _dot(bar_half, start), _dot(bar_end, end)
        bar_betas = before * _dot(bar_half, contrast[:-1]) + after * _dot(bar_end, contrast[1:])
        bar_mean = precision * bar_reference.sum((0, 1))
        bar_precision = (bar_reference * offset).sum((0, 1))
        bar_keep = _dot(bar_half, rho[:-1])
        bar_stride = _dot(bar_next, torch.stack(ctx.halves))
        return (None, bar_z, bar_rho, bar_half, bar_keep, bar_before, bar_stride, bar_after) + (
            bar_betas,
            bar_mean,
            bar_precision,
        )


def _dot(a: Float[Tensor, "k n d"], b: Float[Tensor, "k n d"]) -> Float[Tensor, " k"]:
    return torch.linalg.vecdot(a.flatten(1), b.flatten(1))
