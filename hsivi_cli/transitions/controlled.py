"""Controlled Monte Carlo diffusions: forward and backward walks that share one learned control (arXiv 2307.01050)."""

import torch

from hsivi_cli.bridges.geometric import GeometricBridge, Rows
from hsivi_cli.transitions.langevin import Walk, log_ratio, overdamped_path
from hsivi_cli.transitions.recursion import Control, Number, States


def controlled_walk(start: Rows, bridge: GeometricBridge, step: Number, noise: States, control: Control) -> Walk:
    """Langevin steps pushed by a control, `z' = z + e (g_k(z) + u_{k-1}(z)) + sqrt(2 e) xi`, k = 1 .. K.

    The backward kernel is `N(z' + e (g_k(z') - u_k(z')), 2 e)`: by Nelson's relation, a control that carries the bridge
    along exactly is undone by its negative (section 4 of Vargas et al. 2024; the discretisation of their released
    code). `u_j` has j = 0 .. K: the one at the end of a transition starts the next. With
    `xi' = xi + sqrt(e / 2) (g_k(z) + u_{k-1}(z) + g_k(z') - u_k(z'))` the log ratio of the two kernels is
    `(|xi|^2 - |xi'|^2) / 2`, whatever the control; at u = 0 this is ULA.
    """
    root, path = overdamped_path(start, bridge, step, noise, control)
    backward = torch.addcmul(path.next_rho, root, control(path.next_z, 1), value=-1)
    return Walk(path.last_z, path.last_gradient, log_ratio(noise, backward))
