"""The equation `phi - twist exp(r cos phi) = angle (mod 2 pi)` of a pinwheel's arms, for many angles at one r."""

import math

import torch
from jaxtyping import Float64
from torch import Tensor

CELLS, STEPS, FOLD_STEPS = 32, 3, 3
"""Steps are of third order: enough for float64, from a place in a cell of the table, and for a fold."""


@torch.no_grad()
def solve_angles(r: Float64[Tensor, "*n 1"], angle: Float64[Tensor, "*n k"], twist: float) -> Float64[Tensor, "*n k"]:
    """`r cos phi` of the root on the stretch where the left side rises, nearest to 0 at its beginning.

    The left side is tabulated once a row, for all its angles; a root begins in its cell of the table.
    """
    begin = rising_stretch(r, twist)
    place = torch.arange(CELLS + 1, device=r.device, dtype=r.dtype) * (2 * math.pi / CELLS)
    # cos(begin + place) without a cosine for each
    cosine = begin.cos() * place.cos() - begin.sin() * place.sin()
    table = begin + place - twist * (r * cosine).exp()
    table = torch.minimum(table, table[..., -1:])  # beyond the end of the rising stretch it is only above
    target = table[..., :1] + torch.remainder(angle - table[..., :1], 2 * math.pi)
    cell = torch.searchsorted(table, target, right=True).sub_(1).clamp_(0, CELLS - 1)
    below, above = table.gather(-1, cell), table.gather(-1, cell + 1)
    low = begin + place[cell]
    high = low + place[1]
    phi = low + (target - below) / (above - below).clamp_min(1e-300) * place[1]
    for _ in range(STEPS):
        # the root of the parabola through value, slope and curvature (Euler's method): near a fold, where the slope
        # vanishes, Newton's would be slow
        f1, f2 = r * phi.cos(), r * phi.sin()
        bent = twist * f1.exp()
        slope = 1 + bent * f2
        off = phi - bent - target
        curvature = bent * (f1 - f2.square())
        under = (slope.square() - 2 * off * curvature).clamp_min_(0).sqrt_()
        phi = phi - 2 * off / (slope + under).clamp_min_(1e-9)
        phi = torch.minimum(torch.maximum(phi, low), high)
    return r * phi.cos()


def rising_stretch(r: Float64[Tensor, "*n 1"], twist: float) -> Float64[Tensor, "*n 1"]:
    """Minus psi, where the left side begins to rise after it was steepest downwards.

    Up to about r = 1.7 it always rises; then, where it rises least.
    """
    psi = torch.acos(2 * r / (1 + (1 + 4 * r.square()).sqrt()))
    steepness = (twist * r).log()
    # the log of how many times as steep the twist falls as phi rises
    falls = steepness + psi.sin().log() + r * psi.cos() > 0
    if not bool(falls.any()):
        return -psi
    # it is concave, and rises up to psi: from the left, parabolas approach its root
    root = (-r - steepness).exp()
    for _ in range(FOLD_STEPS):
        sine, across = root.sin(), r * root.cos()
        off, slope = steepness + sine.log() + across, across / (r * sine) - r * sine
        curvature = across + sine.pow(-2)
        root = root - 2 * off / (slope + (slope.square() + 2 * off * curvature).clamp_min_(0).sqrt_())
        root = torch.minimum(root, psi)
    return -torch.where(falls, root, psi)
