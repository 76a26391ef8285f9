"""Walks along a geometric bridge by Langevin steps, with the log ratio of a backward to the forward kernel.

Geffner & Domke 2023 (arXiv 2208.07743): whatever the backward kernels B_k are, a walk of kernels F_k from q has
`E exp(log p(z_end) - log q(z_1) + sum_k log B_k - log F_k) = Z` (with the momenta's own terms where there are any).
The forward walk does not look at the score network, so the network sees the states of all K transitions in one batch.

Shapes: K transitions, n draws, d dimensions; the noise is (K, n, d), a number of each transition (K, 1, 1). `score`
maps (K, n, d) states, transition k in row k, to (K, n, d); leaving it out means zero. Walks start at the reference's
draw from the standard normal noise `start`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from hsivi_cli.bridges.geometric import GeometricBridge, Rows
from hsivi_cli.transitions.recursion import Control, Moves, Number, Path, States, run_recursion

PositionScore = Callable[[States], States]
PhaseScore = Callable[[States, States], States]


@dataclass(frozen=True)
class Walk:
    """The last state, the target's gradient there (without a graph), and `sum_k log B_k - log F_k`, shape (n,).

    `momentum` is the last one, None if overdamped.
    """

    z: Rows
    target_gradient: Rows
    log_ratio: Float[Tensor, " n"]
    momentum: Rows | None = None


@dataclass(frozen=True)
class Refresh:
    """Momentum refresh `rho' ~ N(keep rho, variance)`, and backward `rho ~ N(backward_keep rho' + push s, ...)`.

    `log_volume` is half the log of the forward over the backward variance; None where they are the same.
    """

    keep: Number
    variance: Number
    backward_keep: Number
    backward_variance: Number
    backward_push: Number
    log_volume: Number | None = None


def exact_refresh(eta: Number) -> Refresh:
    """The Ornstein-Uhlenbeck step solved exactly, reversible at N(0, I): UHA at s = 0."""
    variance = 1 - eta * eta
    return Refresh(eta, variance, eta, variance, 2 * (1 - eta))


def euler_refresh(a: Number) -> Refresh:
    """Euler-Maruyama with `a = gamma step` in both directions: LDVI. Needs 0 < a < 1."""
    keep, variance = 1 - a, 2 * a
    return Refresh(keep, variance, keep, variance, variance)


def mixed_refresh(a: Number) -> Refresh:
    """The exact step forward (`eta = exp(-a)`), Euler-Maruyama backward."""
    forward, backward = -torch.expm1(-2 * a), 2 * a
    return Refresh((-a).exp(), forward, 1 - a, backward, backward, 0.5 * (forward / backward).log())


def overdamped_walk(
    start: Rows, bridge: GeometricBridge, step: Number, noise: States, score: PositionScore | None = None
) -> Walk:
    """Unadjusted Langevin steps `z' = z + e g_k(z) + sqrt(2 e) xi`: ULA, and MCD with a score.

    The backward kernel is `N(z' + e g_k(z') + e S_k(z'), 2 e)` (S as in the released code; the paper's is S / 2). With
    `xi' = xi + sqrt(e / 2) (g_k(z) + g_k(z') + S_k(z'))` the log ratio of the two kernels is `(|xi|^2 - |xi'|^2) / 2`.
    """
    root, path = overdamped_path(start, bridge, step, noise)
    backward = path.next_rho
    if score is not None:
        backward = torch.addcmul(backward, root, score(path.next_z))
    return Walk(path.last_z, path.last_gradient, log_ratio(noise, backward))


def overdamped_path(
    start: Rows, bridge: GeometricBridge, step: Number, noise: States, control: Control | None = None
) -> tuple[Number, Path]:
    """`sqrt(e / 2)`, and the walk whose `next_rho` is `xi + sqrt(e / 2) (g_k(z) + u_k(z) + g_k(z'))`."""
    root, one = (step / 2).sqrt(), torch.ones_like(step[:1])
    moves = Moves(keep=torch.zeros_like(one), spread=one, before=root, stride=2 * root, after=root)
    return root, run_recursion(start, torch.zeros_like(start), bridge, moves, noise, control)


def underdamped_walk(
    start: Rows,
    rho: Rows,
    bridge: GeometricBridge,
    step: Number,
    refresh: Refresh,
    noise: States,
    score: PhaseScore | None = None,
) -> Walk:
    """Momentum refresh, then one leapfrog step, K times: UHA and LDVI (section 1.3 and Lemma 1 of the paper).

    Leapfrog preserves volume and can be undone, so only the refresh counts: the log ratio of a transition is
    `log mB(rho | rho', z) - log mF(rho' | rho)`. The score sees the position before leapfrog and the fresh momentum.
    """
    half = step / 2
    moves = Moves(keep=refresh.keep, spread=refresh.variance.sqrt(), before=half, stride=step, after=half)
    path = run_recursion(start, rho, bridge, moves, noise)
    residual = torch.addcmul(path.rho, path.fresh, refresh.backward_keep, value=-1)
    if score is not None:
        residual = torch.addcmul(residual, score(path.z, path.fresh), refresh.backward_push, value=-1)
    ratio = log_ratio(noise, residual * refresh.backward_variance.rsqrt())
    if refresh.log_volume is not None:
        ratio = ratio + noise.shape[2] * refresh.log_volume.expand(len(noise), 1, 1).sum()
    return Walk(path.last_z, path.last_gradient, ratio, path.last_rho)


def euler_walk(
    start: Rows,
    rho: Rows,
    bridge: GeometricBridge,
    step: Number,
    a: Number,
    noise: States,
    score: PhaseScore | None = None,
) -> Walk:
    """Plain Euler-Maruyama for the underdamped diffusion (section 5.2 of the paper): UHA-EM, and LDVI-EM with a score.

    Forward `rho' ~ N((1 - a) rho + d g_k(z), 2 a)`, `z' = z + d rho'`; backward the position first, then
    `rho ~ N((1 - a) rho' - d g_k(z) + 2 a s_k(z, rho'), 2 a)`. The residual of the latter over its spread is
    `sqrt(a / 2) (rho + rho' - 2 s) - xi`, g_k having dropped out.
    """
    moves = Moves(keep=1 - a, spread=(2 * a).sqrt(), before=step, stride=step, after=torch.zeros_like(step))
    path = run_recursion(start, rho, bridge, moves, noise)
    total = path.rho + path.next_rho
    if score is not None:
        total = torch.add(total, score(path.z, path.next_rho), alpha=-2)
    return Walk(path.last_z, path.last_gradient, log_ratio(noise, (a / 2).sqrt() * total - noise), path.last_rho)


def undo_leapfrog(z: Rows, rho: Rows, bridge: GeometricBridge, k: int, step: Float[Tensor, ""]) -> tuple[Rows, Rows]:
    """`(z_k, rho'_k)` from `(z_{k+1}, rho_{k+1})`: the inverse of one leapfrog step on bridge k, counted from 0."""
    half = rho - step / 2 * bridge.gradient(k, z)
    start = z - step * half
    return start, half - step / 2 * bridge.gradient(k, start)


def log_momentum_ratio(first: Rows, last: Rows) -> Float[Tensor, " n"]:
    """`log N(last; 0, I) - log N(first; 0, I)`, which a walk with momenta adds to its weight."""
    return 0.5 * (first.square().sum(1) - last.square().sum(1))


def log_ratio(forward_noise: States, backward_noise: States) -> Float[Tensor, " n"]:
    """Sum over the transitions of `log N(backward_noise; 0, I) - log N(forward_noise; 0, I)`."""
    return 0.5 * (forward_noise.square().sum((0, 2)) - backward_noise.square().sum((0, 2)))
