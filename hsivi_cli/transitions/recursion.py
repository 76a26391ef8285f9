"""The one sequential loop of the Langevin methods, and its adjoint written by hand.

With `g_k` the gradient of bridge k, u_k a learned control (CMCD has one, the others do not), and xi_k the noise,
transition k = 0 .. K-1 takes the position z_k and the momentum rho_k to

    fresh_k = keep_k rho_k + spread_k xi_k,
    h_k     = fresh_k + before_k (g_k(z_k) + u_k(z_k)),
    z_{k+1} = z_k + stride_k h_k,
    rho_{k+1} = h_k + after_k g_k(z_{k+1}).

`before = after = stride / 2` is a momentum refresh and a leapfrog step, `after = 0` Euler-Maruyama, and `keep = 0` with
`before = after = stride / 2 = sqrt(e / 2)` an unadjusted Langevin step of size e whose `rho_{k+1}` is, without a score,
the noise that would bring it back.

The states are a few hundred numbers, so that time goes into the calls and not into the arithmetic. Autograd makes a
dozen calls of each of these; numpy's are a third as dear as torch's. Hence numpy here, and an adjoint as short as the
loop: one product with the target's Hessian a state, and what belongs to parameters for all k at once. The loop itself
runs on h alone, with the second kick and the next refresh folded into the next h. Only first derivatives, only the CPU.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hsivi_cli.bridges.geometric import Array, GeometricBridge, Linearised, Rows

Number = Float[Tensor, "#k 1 1"]
States = Float[Tensor, "k n d"]


class Control(Protocol):
    """A function of k and z with parameters of its own (networks.residual_score)."""

    def __call__(self, z: States, first: int = 0) -> States:
        """`u_{first + k}(z_k)` for every row k of `z`, differentiable."""

    def linearise(self, k: int, z: Array) -> Linearised:
        """`u_k(z)`, and the product of rows with its Jacobian."""

    def parameters(self) -> Any:
        """Every tensor that wants a gradient."""


@dataclass(frozen=True)
class Moves:
    """The numbers of the transitions, of shape (K, 1, 1), or (1, 1, 1) where all have the same."""

    keep: Number
    spread: Number
    before: Number
    stride: Number
    after: Number


@dataclass(frozen=True)
class Path:
    """The states of a walk: row k of `z`, `rho` and `fresh` is what transition k starts with, of `next_*` its end."""

    z: States
    next_z: States
    rho: States
    next_rho: States
    fresh: States
    last_z: Rows
    last_rho: Rows
    last_gradient: Rows


def run_recursion(
    start: Rows, rho: Rows, bridge: GeometricBridge, moves: Moves, noise: States, control: Control | None = None
) -> Path:
    """Walk from `z_0`, the reference's draw from the noise `start`, and `rho_0 = rho`, all in float64.

    Differentiable once in everything that is a tensor, and in the control's parameters. `last_gradient`, the target's
    at `last_z`, has no graph.
    """
    reference, parameters = bridge.reference, tuple(control.parameters()) if control is not None else ()
    tensors: tuple[Tensor, ...] = (start, rho, noise, moves.keep, moves.spread, moves.before, moves.stride, moves.after)
    tensors += (bridge.betas, reference.mean, reference.log_scale)
    return Path(*_Recursion.apply(bridge.linearise, control, *tensors, *parameters))


class _Inputs:
    """The tensors of `run_recursion` as arrays, and what the loop and its adjoint both derive from them."""

    def __init__(self, *tensors: Tensor) -> None:
        self.start, self.rho, self.noise, *numbers, self.mean, log_scale = (t.detach().numpy() for t in tensors)
        self.sizes = [len(number) for number in numbers]
        self.keep, self.spread, self.before, self.stride, self.after, self.betas = numbers
        self.scale, self.precision = np.exp(log_scale), np.exp(-2 * log_scale)
        self.shares = 1 - self.betas
        # the factors of the target's (push) and the reference's (pull) gradient in h_k, the kick that ended transition
        # k - 1 included
        self.later = self.keep[1:] if len(self.keep) > 1 else self.keep
        self.push, pull = self.before * self.betas, self.before * self.shares
        self.push[1:] += self.later * (self.after * self.betas)[:-1]
        pull[1:] += self.later * (self.after * self.shares)[:-1]
        self.attraction = pull * self.precision

    def lists(self) -> tuple[list[float], ...]:
        """keep, push, stride and before as Python numbers, one a transition."""
        count = len(self.noise)
        numbers = (number.ravel().tolist() for number in (self.keep, self.push, self.stride, self.before))
        return tuple(values if len(values) == count else values * count for values in numbers)


@dataclass(frozen=True)
class _Run:
    """All states (K + 1 rows of z, rho and gradient), and what the adjoint needs besides."""

    z: Array
    h: Array
    rho: Array
    gradient: Array
    controls: list[Array]
    products: list[Callable[[Array], Array]]
    turns: list[Callable[[Array], Array]]


def _run(linearise: Callable[[Array], Linearised], control: Control | None, at: _Inputs) -> _Run:
    count, n, d = at.noise.shape
    z, velocities, gradients = np.empty((count + 1, n, d)), np.empty((count, n, d)), np.empty((count + 1, n, d))
    impulses = at.attraction * at.mean + at.spread * at.noise
    np.multiply(at.scale, at.start, out=z[0])
    z[0] += at.mean
    here, h = z[0], at.rho
    gradient, product = linearise(here)
    gradients[0] = gradient
    products, controls, turns = [product], [], []
    rows = zip(impulses, at.attraction, velocities, z[1:], gradients[1:], *at.lists(), strict=True)
    for k, (impulse, attraction, velocity, there, target, c, t, s, p) in enumerate(rows):
        np.multiply(h, c, out=velocity)
        velocity += impulse
        velocity -= attraction * here
        velocity += t * gradient
        if control is not None:
            value, turn = control.linearise(k, here)
            velocity += p * value
            controls.append(value)
            turns.append(turn)
        np.multiply(velocity, s, out=there)
        there += here
        here, h = there, velocity
        gradient, product = linearise(here)
        target[:] = gradient
        products.append(product)
    reference = (at.mean - z[1:]) * at.precision
    rho = np.empty_like(z)
    rho[0] = at.rho
    rho[1:] = velocities + at.after * (at.shares * reference + at.betas * gradients[1:])
    return _Run(z, velocities, rho, gradients, controls, products, turns)


class _Recursion(torch.autograd.Function):
    """`_run`; a bar over a name, as in `bar_z`, is the derivative of the objective with respect to it."""

    @staticmethod
    def forward(ctx: Any, linearise: Any, control: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        at = _Inputs(*tensors[:11])
        run = _run(linearise, control, at)
        ctx.at, ctx.run, ctx.control = at, run, control
        fresh = at.keep * run.rho[:-1] + at.spread * at.noise
        arrays = (run.z[:-1], run.z[1:], run.rho[:-1], run.rho[1:], fresh, run.z[-1], run.rho[-1], run.gradient[-1])
        path = tuple(torch.from_numpy(array) for array in arrays)
        ctx.mark_non_differentiable(path[-1])
        return path

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *bars: Tensor | None) -> tuple[Tensor | None, ...]:
        at: _Inputs = ctx.at
        run: _Run = ctx.run
        outer_z, outer_rho, bar_fresh = _outer(at, [None if bar is None else bar.numpy() for bar in bars])
        # outside the loop, rho_{k+1} = h_k + after_k g_k(z_{k+1}) with that gradient taken apart
        kicked = at.after * outer_rho[1:]
        outer_gradient = np.zeros_like(outer_z)
        np.multiply(kicked, at.betas, out=outer_gradient[1:])
        outer_z[1:] -= kicked * at.shares * at.precision
        bar_z, bar_next, bar_h = _adjoint(at, run, outer_z, outer_rho, outer_gradient)
        bar_rho = outer_rho[1:]
        bar_rho[:-1] += at.later * bar_h[1:]

        offset = at.mean - run.z
        reference = offset * at.precision
        contrast = run.gradient - reference
        h_contrast, rho_contrast = _dot(bar_h, contrast[:-1]), _dot(bar_rho, contrast[1:])
        bar_before = _dot(bar_h, reference[:-1]) + at.betas * h_contrast
        bar_after = _dot(bar_rho, reference[1:]) + at.betas * rho_contrast
        rest: tuple[Tensor, ...] = ()
        if ctx.control is not None:
            bar_before += _dot(bar_h, np.stack(run.controls))
            rest = _control_gradients(ctx.control, run.z[:-1], bar_h * at.before)
        pulled = np.zeros_like(offset)  # the factor of the reference's gradient at each state
        np.multiply(at.before * at.shares, bar_h, out=pulled[:-1])
        pulled[1:] += at.after * at.shares * bar_rho
        bar_mean = bar_z.sum(0) + at.precision * pulled.sum((0, 1))
        bar_log_scale = (bar_z * at.start).sum(0) * at.scale - 2 * at.precision * (pulled * offset).sum((0, 1))
        bar_fresh = bar_h if bar_fresh is None else bar_h + bar_fresh
        bar_keep, bar_spread = _dot(bar_fresh, run.rho[:-1]), _dot(bar_fresh, at.noise)
        bar_betas = at.before * h_contrast + at.after * rho_contrast
        found = (bar_keep, bar_spread, bar_before, _dot(bar_next, run.h), bar_after, bar_betas)
        sized = [
            bar if len(bar) == size else bar.sum(0, keepdims=True) for bar, size in zip(found, at.sizes, strict=True)
        ]
        bar_inputs = (bar_z * at.scale, outer_rho[0] + at.keep[0] * bar_h[0], at.spread * bar_fresh)
        bar_tensors = (*bar_inputs, *sized, bar_mean, bar_log_scale)
        return None, None, *(torch.from_numpy(bar) for bar in bar_tensors), *rest


def _outer(at: _Inputs, bars: list[Array | None]) -> tuple[Array, Array, Array | None]:
    """Derivatives with respect to all positions and momenta from outside the loop, `fresh` counted as momentum."""
    bar_z, bar_next_z, bar_rho, bar_next_rho, bar_fresh, bar_last_z, bar_last_rho, _ = bars
    count, n, d = at.noise.shape
    outer_z, outer_rho = np.zeros((count + 1, n, d)), np.zeros((count + 1, n, d))
    for outer, here, there, last in (
        (outer_z, bar_z, bar_next_z, bar_last_z),
        (outer_rho, bar_rho, bar_next_rho, bar_last_rho),
    ):
        if here is not None:
            outer[:-1] += here
        if there is not None:
            outer[1:] += there
        if last is not None:
            outer[-1] += last
    if bar_fresh is not None:
        outer_rho[:-1] += at.keep * bar_fresh
    return outer_z, outer_rho, bar_fresh


def _adjoint(
    at: _Inputs, run: _Run, outer_z: Array, outer_rho: Array, outer_gradient: Array
) -> tuple[Array, Array, Array]:
    """Derivatives with respect to `z_0`, to every `z_{k+1}`, and to every `h_k`."""
    bars_z, bars_h = np.empty_like(run.h), np.empty_like(run.h)
    bar_z = outer_z[-1] + run.products[-1](outer_gradient[-1])
    bar_h, later = np.zeros_like(bar_z), 0.0
    lists = at.lists()
    for k in reversed(range(len(run.h))):
        c, t, s, p = (values[k] for values in lists)
        bars_z[k] = bar_z
        bar = bars_h[k]
        np.multiply(bar_z, s, out=bar)
        bar += outer_rho[k + 1]
        bar += later * bar_h
        bar_z = bar_z - at.attraction[k] * bar
        bar_z += outer_z[k]
        bar_z += run.products[k](t * bar + outer_gradient[k])
        if run.turns:
            bar_z += run.turns[k](p * bar)
        bar_h, later = bar, c
    return bar_z, bars_z, bars_h


def _control_gradients(control: Control, z: Array, bar: Array) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        return torch.autograd.grad(control(torch.from_numpy(z)), tuple(control.parameters()), torch.from_numpy(bar))


def _dot(a: Array, b: Array) -> Array:
    return (a * b).sum((1, 2), keepdims=True)
