"""Controlled Monte Carlo diffusions: forward and backward walks that share one learned control (arXiv 2307.01050)."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from hsivi_cli.bridges.geometric import GeometricBridge
from hsivi_cli.transitions.langevin import States, Walk

Control = Callable[[int, Float[Tensor, "n d"]], Float[Tensor, "n d"]]


def controlled_walk(
    z: Float[Tensor, "n d"], bridge: GeometricBridge, step: Float[Tensor, " k"], noise: States, control: Control
) -> Walk:
    """Langevin steps pushed by a control, `z' = z + e (g_k(z) + u_{k-1}(z)) + sqrt(2 e) xi`, k = 1 .. K.

    The backward kernel is `N(z' + e (g_k(z') - u_k(z')), 2 e)`: Nelson's relation says that a control which carries the
    bridge along exactly is undone by its negative (section 4 and Proposition 3.3 of the paper; the discretisation of
    its released code). `control(j, z)` is `u_j`, j = 0 .. K: the one at the end of a transition starts the next, so a
    walk asks for K + 1. With `xi' = xi + sqrt(e / 2) (g_k(z) + u_{k-1}(z) + g_k(z') - u_k(z'))` the log ratio of the two
    kernels is `(|xi|^2 - |xi'|^2) / 2`, whatever the control; at u = 0 this is ULA.
    """
    def ends(z: Float[Tensor, "n d"]) -> tuple[Tensor, Tensor]:
        return bridge.reference.gradient(z), bridge.target_gradient(z)

    gradients, push, drifts = ends(z), control(0, z), []
    spread = step.mul(2).sqrt()[:, None, None] * noise
    scalars = (step.unbind(), bridge.betas.unbind(), spread.unbind())
    for k, (e, beta, kick) in enumerate(zip(*scalars, strict=True), 1):
        forward = torch.lerp(*gradients, beta) + push
        z = torch.addcmul(z + kick, forward, e)
        gradients, push = ends(z), control(k, z)
        drifts.append(forward + torch.lerp(*gradients, beta) - push)
    backward_noise = torch.addcmul(noise, torch.stack(drifts), (step / 2).sqrt()[:, None, None])
    return Walk(z, gradients[1], 0.5 * (noise.square() - backward_noise.square()).sum((0, 2)))
