"""Walks along a geometric bridge by Langevin steps, with the log ratio of a backward to the forward kernel.

Geffner & Domke 2023 (arXiv 2208.07743): whatever the backward kernels B_k are, a walk of kernels F_k from q has
`E exp(log p(z_end) - log q(z_1) + sum_k log B_k - log F_k) = Z` (with the momenta's own terms where there are any).
The forward walk does not look at the score network, so the network sees the states of all K transitions in one batch.

Shapes: K transitions, n draws, d dimensions; the noise is (K, n, d). `score` maps (K, n, d) states, transition k in row
k, to (K, n, d); leaving it out means zero.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from hsivi_cli.bridges.geometric import GeometricBridge
from hsivi_cli.transitions.bridge_path import Moves, walk_path

States = Float[Tensor, "k n d"]
PositionScore = Callable[[States], States]
PhaseScore = Callable[[States, States], States]


@dataclass(frozen=True)
class Walk:
    """The last state, the target's gradient there, and `sum_k log B_k - log F_k`, shape (n,).

    `momentum` is the last one, None if overdamped.
    """

    z: Float[Tensor, "n d"]
    target_gradient: Float[Tensor, "n d"]
    log_ratio: Float[Tensor, " n"]
    momentum: Float[Tensor, "n d"] | None = None


@dataclass(frozen=True)
class Refresh:
    """Momentum refresh `rho' ~ N(keep rho, variance)` and the backward `rho ~ N(keep rho' + push s, variance)`.

    Every entry is a tensor of shape (K,), one number a transition.
    """

    keep: Float[Tensor, " k"]
    variance: Float[Tensor, " k"]
    backward_keep: Float[Tensor, " k"]
    backward_variance: Float[Tensor, " k"]
    backward_push: Float[Tensor, " k"]


def exact_refresh(eta: Float[Tensor, " k"]) -> Refresh:
    """The Ornstein-Uhlenbeck step solved exactly, reversible at N(0, I): UHA at s = 0."""
    variance = 1 - eta**2
    return Refresh(eta, variance, eta, variance, 2 * (1 - eta))


def euler_refresh(a: Float[Tensor, " k"]) -> Refresh:
    """Euler-Maruyama with `a = gamma step` in both directions: LDVI. Needs 0 < a < 1."""
    return Refresh(1 - a, 2 * a, 1 - a, 2 * a, 2 * a)


def mixed_refresh(a: Float[Tensor, " k"]) -> Refresh:
    """The exact step forward (`eta = exp(-a)`), Euler-Maruyama backward."""
    return Refresh((-a).exp(), -torch.expm1(-2 * a), 1 - a, 2 * a, 2 * a)


def overdamped_walk(
    z: Float[Tensor, "n d"],
    bridge: GeometricBridge,
    step: Float[Tensor, " k"],
    noise: States,
    score: PositionScore | None = None,
) -> Walk:
    """Unadjusted Langevin steps `z' = z + e g_k(z) + sqrt(2 e) xi`: ULA, and MCD with a score.

    The backward kernel is `N(z' + e g_k(z') + e S_k(z'), 2 e)` (S as in the released code; the paper's is S / 2). With
    `xi' = xi + sqrt(e / 2) (g_k(z) + g_k(z') + S_k(z'))` the log ratio of the two kernels is `(|xi|^2 - |xi'|^2) / 2`.
    """
    half, none = (step / 2).sqrt(), torch.zeros_like(step)
    path = walk_path(z, torch.zeros_like(z), bridge, Moves(none, half, 2 * half, none), noise)
    before, after = path.bridge_gradients(bridge)
    drift = before + after
    if score is not None:
        drift = drift + score(path.z[1:])
    return Walk(path.z[-1], path.target_gradient[-1], _log_ratio(noise, torch.addcmul(noise, _rows(half), drift)))


def underdamped_walk(
    z: Float[Tensor, "n d"],
    rho: Float[Tensor, "n d"],
    bridge: GeometricBridge,
    step: Float[Tensor, " k"],
    refresh: Refresh,
    noise: States,
    score: PhaseScore | None = None,
) -> Walk:
    """Momentum refresh, then one leapfrog step, K times: UHA and LDVI (section 1.3 and Lemma 1 of the paper).

    Leapfrog preserves volume and can be undone, so only the refresh counts: the log ratio of a transition is
    `log mB(rho | rho', z) - log mF(rho' | rho)`. The score sees the position before leapfrog and the fresh momentum.
    """
    kick = _rows(refresh.variance.sqrt()) * noise
    path = walk_path(z, rho, bridge, Moves(refresh.keep, step / 2, step, step / 2), kick)
    before = path.rho[:-1]
    fresh = torch.addcmul(kick, before, _rows(refresh.keep))
    residual = torch.addcmul(before, fresh, _rows(refresh.backward_keep), value=-1)
    if score is not None:
        residual = torch.addcmul(residual, score(path.z[:-1], fresh), _rows(refresh.backward_push), value=-1)
    volume = 0.5 * noise.shape[2] * (refresh.variance / refresh.backward_variance).log().sum()
    log_ratio = _log_ratio(noise, residual * _rows(refresh.backward_variance.rsqrt())) + volume
    return Walk(path.z[-1], path.target_gradient[-1], log_ratio, path.rho[-1])


def euler_walk(
    z: Float[Tensor, "n d"],
    rho: Float[Tensor, "n d"],
    bridge: GeometricBridge,
    step: Float[Tensor, " k"],
    a: Float[Tensor, " k"],
    noise: States,
    score: PhaseScore | None = None,
) -> Walk:
    """Plain Euler-Maruyama for the underdamped diffusion (section 5.2 of the paper): UHA-EM, and LDVI-EM with a score.

    Forward `rho' ~ N((1 - a) rho + d g_k(z), 2 a)`, `z' = z + d rho'`; backward the position first, then
    `rho ~ N((1 - a) rho' - d g_k(z) + 2 a s_k(z, rho'), 2 a)`.
    """
    spread, keep = _rows((2 * a).sqrt()), 1 - a
    path = walk_path(z, rho, bridge, Moves(keep, step, step, torch.zeros_like(step)), spread * noise)
    before, after = path.rho[:-1], path.rho[1:]
    residual = before - _rows(keep) * after + _rows(step) * path.bridge_gradients(bridge)[0]
    if score is not None:
        residual = residual - _rows(2 * a) * score(path.z[:-1], after)
    return Walk(path.z[-1], path.target_gradient[-1], _log_ratio(noise, residual / spread), path.rho[-1])


def undo_leapfrog(
    z: Float[Tensor, "n d"], rho: Float[Tensor, "n d"], bridge: GeometricBridge, k: int, step: Float[Tensor, ""]
) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n d"]]:
    """`(z_k, rho'_k)` from `(z_{k+1}, rho_{k+1})`: the inverse of one leapfrog step on bridge k, counted from 0."""
    half = rho - step / 2 * bridge.gradient(k, z)
    start = z - step * half
    return start, half - step / 2 * bridge.gradient(k, start)


def log_momentum_ratio(first: Float[Tensor, "n d"], last: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """`log N(last; 0, I) - log N(first; 0, I)`, which a walk with momenta adds to its weight."""
    return 0.5 * (first.square().sum(1) - last.square().sum(1))


def _rows(values: Float[Tensor, " k"]) -> Float[Tensor, "k 1 1"]:
    return values[:, None, None]


def _log_ratio(forward_noise: States, backward_noise: States) -> Float[Tensor, " n"]:
    """Sum over the transitions of `log N(backward_noise; 0, I) - log N(forward_noise; 0, I)`."""
    return 0.5 * (forward_noise.square().sum((0, 2)) - backward_noise.square().sum((0, 2)))
