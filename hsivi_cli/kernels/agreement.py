"""Whether the kernels give torch's numbers on a device that nobody may have tried: what `--kernels auto` asks first.

A compiler or GPU that gets one wrong costs a moment then, and not pictures or a run.
"""

import functools
import warnings

import torch
from torch import Tensor

from hsivi_cli.kernels.choice import Kernels
from hsivi_cli.kernels.comparison import ComparisonRows, compare
from hsivi_cli.kernels.critic_loss import critic_sums
from hsivi_cli.kernels.group_norm_silu import group_norm_silu
from hsivi_cli.kernels.hsivi_step import hsivi_step
from hsivi_cli.kernels.philox import Draw, make_streams, normals
from hsivi_cli.kernels.student_loss import student_sums

SIDES: tuple[Kernels, Kernels] = ("triton", "torch")
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@functools.cache
def agrees(device: torch.device) -> bool:
    """Whether every kernel agrees with torch there, forward and backward; a warning says so where one does not."""
    try:
        return _agrees(device)
    except Exception as err:  # whatever a compiler throws
        warnings.warn(f"fused kernels are left out: on {device} they fail their check ({err})", stacklevel=2)
        return False


def _agrees(device: torch.device) -> bool:
    # the answer is kept: it must not depend on whether whoever asks first does so without gradients
    with torch.inference_mode(False), torch.enable_grad():
        for dtype, bound in BOUNDS.items():
            ours, theirs = ([*_norm(device, dtype, side), *_layers(device, side)] for side in SIDES)
            for mine, wanted in zip(ours, theirs, strict=True):
                error = float((mine.float() - wanted.float()).norm() / wanted.float().norm())
                if not error < bound:
                    raise RuntimeError(f"off by {error:.1g} in {dtype}")
    return True


def _norm(device: torch.device, dtype: torch.dtype, side: Kernels) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    drawn = (torch.randn(shape, generator=generator) for shape in ((2, 24, 7, 5), (24,), (24,)))
    inputs = [t.to(device, dtype).requires_grad_() for t in drawn]
    out = group_norm_silu(inputs[0], inputs[1], inputs[2], 6, kernels=side)
    return [out.detach(), *torch.autograd.grad(out.sum(), inputs)]


def _layers(device: torch.device, side: Kernels) -> list[Tensor]:
    """A step of the chain, a comparison, and every loss at it."""
    generator = torch.Generator().manual_seed(1)
    x, eps, f, e = (torch.randn(2, 3, 7, 5, generator=generator).to(device) for _ in range(4))
    log_gamma = torch.randn(3, 7, 5, generator=generator).to(device)
    eps, f, e, log_gamma = (v.requires_grad_() for v in (eps, f, e, log_gamma))
    zeta = Draw(make_streams(2**40 + 7, [3, 2**33], device), 5)
    numbers = ([1.1, 0.9], [-0.2, -0.3], [0.1, 0.2], [0.3, 0.0], [0.5, 0.8])
    x_part, eps_part, noise, added, scale = (torch.tensor(v, dtype=torch.float64) for v in numbers)
    rows = ComparisonRows(x_part, eps_part, noise, added, scale, torch.zeros(2, dtype=torch.int64))
    with torch.no_grad():
        step = hsivi_step(x, eps, 1.02, -0.3, 0.2, log_gamma, zeta.streams, 2, side)
    drawn = normals(zeta.streams, 3, (3, 7, 5), kernels=side)
    y = compare(x, eps, log_gamma, rows, zeta, side)
    critic = critic_sums(f, log_gamma, rows, zeta, side)
    found = [drawn, step, y.detach(), critic.detach(), *torch.autograd.grad(critic.sum(), f)]
    fisher = student_sums("fisher", f, e, y, log_gamma, rows, zeta, side)
    found += [fisher.gap, *torch.autograd.grad(fisher.loss.sum(), (f, e, log_gamma), retain_graph=True)]
    surrogate = student_sums("reverse-kl", f, e, y, log_gamma, rows, zeta, side)
    return [*found, *torch.autograd.grad(surrogate.loss.sum(), (eps, log_gamma))]
