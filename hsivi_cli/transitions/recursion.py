"""The one sequential loop of the Langevin methods, and its adjoint written by hand.

Every walk here is, with G the gradient of the log target and u_k a learned control (CMCD has one, the others do not),

    h_k = kick_k + keep_k h_{k-1} - pull_k z_k + push_k G(z_k) + drive_k u_k(z_k),
    z_{k+1} = z_k + stride_k h_k,    k = 0 .. K-1.

The coefficients hold the bridge, the step and the damping; transitions.langevin fills them in for all k at once.
Differentiating the loop through autograd costs several times its arithmetic. The adjoint is as short as the loop, with
one product with the target's Hessian a state, and what belongs to parameters is done for all k at once. Only first
derivatives are available.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from hsivi_cli.bridges.geometric import GeometricBridge, Linearised, Rows


class Control(Protocol):
    """A function of k and z with parameters of its own (networks.residual_score)."""

    def __call__(self, z: Float[Tensor, "k n d"]) -> Float[Tensor, "k n d"]:
        """`u_k(z_k)` for every row k of `z`, differentiable."""

    def linearise(self, k: int, z: Rows) -> Linearised:
        """`u_k(z)` without a graph, and the product of a row vector with its Jacobian."""

    def parameters(self) -> Any:
        """Every tensor that wants a gradient."""


@dataclass(frozen=True)
class Recursion:
    """The coefficients, row k for step k; without a first velocity `h_{-1}`, `keep[0]` is not used."""

    kick: Float[Tensor, "k n d"]
    keep: Float[Tensor, "k 1 1"]
    pull: Float[Tensor, "k 1 d"]
    push: Float[Tensor, "k 1 1"]
    stride: Float[Tensor, "k 1 1"]
    drive: Float[Tensor, "k 1 1"] | None = None


@dataclass(frozen=True)
class Path:
    """Positions `z_0 .. z_K`, velocities `h_0 .. h_{K-1}`, and G at every position."""

    z: Float[Tensor, "k+1 n d"]
    h: Float[Tensor, "k n d"]
    gradient: Float[Tensor, "k+1 n d"]


def run_recursion(
    z: Rows, h: Rows, recursion: Recursion, bridge: GeometricBridge, control: Control | None = None
) -> Path:
    """Run from `z` and `h_{-1} = h` on the bridge's target.

    Differentiable once in z, h, every coefficient and the control's parameters.
    """
    coefficients = (recursion.kick, recursion.keep, recursion.pull, recursion.push, recursion.stride)
    if control is not None:
        assert recursion.drive is not None, "a control needs `drive`"
        coefficients += (recursion.drive, *control.parameters())
    if torch.is_grad_enabled():
        return Path(*_Recursion.apply(bridge.linearise, control, h, z, *coefficients))
    done = _run(lambda at: (bridge.target_gradient(at), None), control, h, z, *coefficients[:6])
    return Path(*(torch.stack(rows) for rows in done[:3]))


def _run(
    linearise: Callable[[Rows], Any], control: Control | None, h: Rows, z: Rows, kick: Tensor, *coefficients: Tensor
) -> tuple[list[Any], ...]:
    """Positions, velocities, gradients, Hessian products, controls, and products with the controls' Jacobians."""
    keep, pull, push, stride, *drive = coefficients
    numbers = _numbers(keep, push, stride, *drive)
    attractions = pull.expand_as(kick).contiguous().unbind()  # a broadcast in the loop would cost more
    gradient, product = linearise(z)
    positions, velocities, gradients, products, controls, turns = [z], [], [gradient], [product], [], []
    for k, (impulse, attraction, (c, t, d, *w)) in enumerate(zip(kick.unbind(), attractions, numbers, strict=True)):
        start = torch.add(impulse, h, alpha=c) if c else impulse
        h = torch.addcmul(start, z, attraction, value=-1).add_(gradient, alpha=t)
        if control is not None:
            push_away, turn = control.linearise(k, z)
            h.add_(push_away, alpha=w[0])
            controls.append(push_away)
            turns.append(turn)
        z = torch.add(z, h, alpha=d)
        gradient, product = linearise(z)
        positions.append(z)
        velocities.append(h)
        gradients.append(gradient)
        products.append(product)
    return positions, velocities, gradients, products, controls, turns


class _Recursion(torch.autograd.Function):
    """`_run`; a bar over a name, as in `bar_z`, is the derivative of the objective with respect to it."""

    @staticmethod
    def forward(ctx: Any, linearise: Any, control: Any, h: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        count = 6 if control is None else 7
        *done, ctx.products, controls, ctx.turns = _run(linearise, control, h, *tensors[:count])
        path = tuple(torch.stack(rows) for rows in done)
        ctx.control, ctx.start = control, h
        ctx.save_for_backward(*tensors[2:count], *([torch.stack(controls)] if controls else []), *path)
        return path

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, of_z: Tensor, of_h: Tensor, of_gradient: Tensor) -> tuple[Tensor | None, ...]:
        *coefficients, z, h, gradient = ctx.saved_tensors
        bar_z, bar_kick, bar_next = _adjoint(ctx.products, ctx.turns, of_z, of_h, of_gradient, *coefficients[:5])
        bar_keep = _dot(bar_kick, torch.cat([ctx.start[None], h[:-1]]))
        bar_pull = (bar_kick * z[:-1]).sum(1, keepdim=True).neg_()
        bars = [bar_z, bar_kick, bar_keep, bar_pull, _dot(bar_kick, gradient[:-1]), _dot(bar_next, h)]
        if ctx.control is not None:
            drive, controls = coefficients[4:]
            bars += [_dot(bar_kick, controls), *_control_gradients(ctx.control, z[:-1], bar_kick * drive)]
        return None, None, coefficients[0][0] * bar_kick[0], *bars


def _adjoint(
    products: Sequence[Any], turns: Sequence[Any], of_z: Tensor, of_h: Tensor, of_gradient: Tensor, *tensors: Tensor
) -> tuple[Rows, Float[Tensor, "k n d"], Float[Tensor, "k n d"]]:
    """Derivatives with respect to `z_0`, to every `h_k`, and to every `z_{k+1}`, from those outside the loop."""
    keep, pull, push, stride, *drive = tensors
    numbers, attractions = _numbers(keep, push, stride, *drive), pull.expand_as(of_h).contiguous().unbind()
    outer_z, outer_h, outer_gradient = of_z.unbind(), of_h.unbind(), of_gradient.unbind()
    bar_z = outer_z[-1] + products[-1](outer_gradient[-1])
    bar_h, later = torch.zeros_like(bar_z), 0.0
    bars_z, bars_h = [], []
    for k in reversed(range(len(numbers))):
        c, t, d, *w = numbers[k]
        bars_z.append(bar_z)
        velocity = torch.add(outer_h[k], bar_z, alpha=d)
        bar_h = velocity.add_(bar_h, alpha=later) if later else velocity
        bars_h.append(bar_h)
        bar_z = torch.addcmul(bar_z, bar_h, attractions[k], value=-1).add_(outer_z[k])
        bar_z += products[k](torch.add(outer_gradient[k], bar_h, alpha=t))
        if turns:
            bar_z += turns[k](w[0] * bar_h)
        later = c
    return bar_z, torch.stack(bars_h[::-1]), torch.stack(bars_z[::-1])


def _control_gradients(control: Control, z: Float[Tensor, "k n d"], bar: Float[Tensor, "k n d"]) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        values = control(z.detach())
        return torch.autograd.grad(values, tuple(control.parameters()), bar)


def _numbers(*coefficients: Float[Tensor, "k 1 1"]) -> list[tuple[float, ...]]:
    """Coefficients by step, as Python numbers: kernels take those without a tensor of their own."""
    return list(zip(*(values.flatten().tolist() for values in coefficients), strict=True))


def _dot(a: Float[Tensor, "k n d"], b: Float[Tensor, "k n d"]) -> Float[Tensor, "k 1 1"]:
    return (a * b).sum((1, 2), keepdim=True)
