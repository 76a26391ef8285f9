"""Controlled Monte Carlo diffusions: forward and backward walks that share one learned control (arXiv 2307.01050)."""

import torch

from hsivi_cli.bridges.geometric import GeometricBridge, Rows
from hsivi_cli.transitions.langevin import Number, States, Walk, bridge_gradients, log_ratio, pull_and_push
from hsivi_cli.transitions.recursion import Control, Recursion, run_recursion


def controlled_walk(z: Rows, bridge: GeometricBridge, step: Number, noise: States, control: Control) -> Walk:
    """Langevin steps pushed by a control, `z' = z + e (g_k(z) + u_{k-1}(z)) + sqrt(2 e) xi`, k = 1 .. K.

    The backward kernel is `N(z' + e (g_k(z') - u_k(z')), 2 e)`: by Nelson's relation, a control that carries the bridge
    along exactly is undone by its negative (section 4 of Vargas et al. 2024; the discretisation of their released
    code). `u_j` has j = 0 .. K: the one at the end of a transition starts the next. With
    `xi' = xi + sqrt(e / 2) (g_k(z) + u_{k-1}(z) + g_k(z') - u_k(z'))` the log ratio of the two kernels is
    `(|xi|^2 - |xi'|^2) / 2`, whatever the control; at u = 0 this is ULA.
    """
    root = (step / 2).sqrt()  # z' = z + 2 root h with h = xi + root (g_k(z) + u_{k-1}(z))
    pull, push = pull_and_push(bridge, root)
    kick = torch.addcmul(noise, pull, bridge.reference.mean)
    recursion = Recursion(kick, torch.zeros_like(root), pull, push, 2 * root, root)
    path = run_recursion(z, torch.zeros_like(z), recursion, bridge, control)
    drift = bridge_gradients(bridge, path.z[1:], path.gradient[1:]) - control(path.z)[1:]
    return Walk(path.z[-1], path.gradient[-1], log_ratio(noise, torch.addcmul(path.h, root, drift)))
