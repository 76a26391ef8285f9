"""The learned Gaussian layer of a distilled sampler, and its diffusion to later times (arXiv 2310.17153)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hsivi_cli.bridges.schedule import NoiseSchedule
from hsivi_cli.kernels.comparison import ComparisonRows
from hsivi_cli.kernels.samples import per_sample


@dataclass(frozen=True)
class LayerCoefficients:
    """Coefficients of the layers k = 1 .. K; every tensor has K+1 entries in float64 (index 0 of A, B, c1 is unused).

    `x_{k-1} = A_k x_k + B_k eps(x_k, t_k) + c1_k exp(log_gamma) z`.
    """

    times: Int[Tensor, " K+1"]
    abar: Float[Tensor, " K+1"]
    noise_scale: Float[Tensor, " K+1"]
    A: Float[Tensor, " K+1"]
    B: Float[Tensor, " K+1"]
    c1: Float[Tensor, " K+1"]

    @property
    def nfe(self) -> int:
        """K, the number of layers and of network evaluations."""
        return len(self.times) - 1

    @property
    def gamma(self) -> Float[Tensor, " K+1"]:
        """`gamma_k = c1_k / s_{k-1}`, the layer's noise relative to the noise of its bridge, at log_gamma = 0."""
        return torch.cat([self.c1[:1], self.c1[1:] / self.noise_scale[:-1]])


def layer_coefficients(grid: Sequence[int], eta: float, schedule: NoiseSchedule) -> LayerCoefficients:
    """Coefficients of every layer on `grid`; at log_gamma = 0 DDIM's with this `eta` (arXiv 2010.02502, eq. 12)."""
    times = torch.tensor(list(grid))
    abar = schedule.abar[times]
    s = (1 - abar).sqrt()
    A, B, c1 = (torch.zeros_like(abar) for _ in range(3))
    c1[1:] = eta * ((1 - abar[1:] / abar[:-1]) * s[:-1] ** 2 / s[1:] ** 2).sqrt()
    A[1:] = (abar[:-1] / abar[1:]).sqrt()
    B[1:] = (s[:-1] ** 2 - c1[1:] ** 2).sqrt() - A[1:] * s[1:]
    return LayerCoefficients(times, abar, s, A, B, c1)


def layer_mean(
    x: Float[Tensor, " n *shape"], eps: Float[Tensor, " n *shape"], k: Int[Tensor, " n"], layers: LayerCoefficients
) -> Float[Tensor, " n *shape"]:
    """Mean of `x_{k-1}` given `x_k` and the student's `eps = phi(x_k, t_k)`; `k` is the layer of each sample."""
    return per_sample(layers.A[k], x) * x + per_sample(layers.B[k], x) * eps


def layer_std(
    log_gamma: Float[Tensor, "..."], k: Int[Tensor, " n"], layers: LayerCoefficients, like: Float[Tensor, " n *shape"]
) -> Float[Tensor, "n ..."]:
    """Standard deviation `c1_k exp(log_gamma)` of `x_{k-1}`, broadcastable to `like`.

    `log_gamma` is a scalar, one map `(C, H, W)` shared by the layers, or one map a layer `(K, C, H, W)`.
    """
    per_layer = log_gamma.ndim == like.ndim
    scale = (log_gamma[k.to(log_gamma.device) - 1] if per_layer else log_gamma).exp()
    return per_sample(layers.c1[k], like) * scale


def comparison_rows(
    k: Int[Tensor, " n"], t: Int[Tensor, " n"], layers: LayerCoefficients, schedule: NoiseSchedule
) -> ComparisonRows:
    """Diffuse the output of layer k from `t_{k-1}` to the later time `t` ("diffused matching", methods.hsivi_sm).

    `y' = a (A x + B eps + c1 exp(log_gamma) z) + b z'` with `a^2 = abar_t / abar_{k-1}` and as much noise b as takes
    the bridge's marginal at `t_{k-1}` to the one at t; z and z' are one noise `zeta` of their joint variance. At
    `t = t_{k-1}` nothing is added: the paper's comparison.
    """
    abar, abar_layer = schedule.abar[t], layers.abar[k - 1]
    a = (abar / abar_layer).sqrt()
    added = ((1 - abar) - a**2 * (1 - abar_layer)).clamp_min(0)
    return ComparisonRows(a * layers.A[k], a * layers.B[k], a * layers.c1[k], added, (1 - abar).sqrt(), k - 1)


def diffusion_times(
    k: Int[Tensor, " n"], u: Float[Tensor, " n"], layers: LayerCoefficients, t_max: float
) -> Int[Tensor, " n"]:
    """Comparison times `t' ~ U[t_{k-1}, t_max)` from uniforms `u`; never before the layer's own time."""
    earliest = layers.times[k - 1]
    return earliest + (u.double() * (t_max - earliest).clamp_min(1)).long()
