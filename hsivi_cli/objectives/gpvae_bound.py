"""The bound of a VAE whose encoder is a random function (GPVAE; Kim & Pavlovic 2021, arXiv 2102.03151), in closed form.

Given functions f and g, `q(z | x, f, g) = N(f(x), diag e^{2 g(x)})`; at a row x the variational posterior of the
functions is `f_j(x) ~ N(m_j, v_j)`, `g_j(x) ~ N(log_sd_j, s_j)`. The bound of a data set is

    sum_n E_{f, g} [E_q log p(x_n | z) - KL(q(z | x_n, f, g) || p(z))] - KL(q(weights) || p(weights)),          (5)

at most sum_n log p(x_n). Numbers are the equations of the derivation that the tests check, term by term. Throughout,
moments are (..., d), one row an instance; results are (...), in nats.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

LOG_TWO_PI = math.log(2 * math.pi)


@dataclass(frozen=True)
class Moments:
    """The encoder at a row: `mean`, `log_sd`, and the variances `v` of the mean, `s` of the log sd (0: no function)."""

    mean: Float[Tensor, "... d"]
    log_sd: Float[Tensor, "... d"]
    v: Float[Tensor, "... d"]
    s: Float[Tensor, "... d"]


def expected_variance(at: Moments) -> Float[Tensor, "... d"]:
    """`E e^{2 g} = exp(2 log_sd + 2 s)`, above the plug-in `e^{2 log_sd}` (Jensen)."""
    return (2 * at.log_sd + 2 * at.s).exp()


def expected_prior_kl(at: Moments) -> Float[Tensor, "..."]:
    """`E_{f, g} KL(q(z | x, f, g) || N(0, I))`, with g the log of the standard deviation, equation (6)."""
    return 0.5 * (at.mean**2 + at.v + expected_variance(at) - 1 - 2 * at.log_sd).sum(-1)


def expected_prior_kl_log_variance(
    mean: Float[Tensor, "... d"],
    v: Float[Tensor, "... d"],
    log_variance: Float[Tensor, "... d"],
    s: Float[Tensor, "... d"],
) -> Float[Tensor, "..."]:
    """The same where the random function is the log of the variance, equation (7)."""
    return 0.5 * (mean**2 + v + (log_variance + s / 2).exp() - 1 - log_variance).sum(-1)


def expected_entropy(at: Moments) -> Float[Tensor, "..."]:
    """`E_g H(q(z | x, f, g))`: with `E log p(z)` by draws it takes the place of (6) for a prior that is not normal."""
    return (at.log_sd + 0.5 * (1 + LOG_TWO_PI)).sum(-1)


def draw_latent(at: Moments, noise: Float[Tensor, "3 ... d"]) -> Float[Tensor, "... d"]:
    """z of each row, its own f and g integrated: the local reparameterisation, equation (8).

    Exact for a loss that is a sum over rows; the weights themselves are never drawn.
    """
    deviation = (at.log_sd + _root(at.s) * noise[1]).exp()
    return at.mean + _root(at.v) * noise[0] + deviation * noise[2]


def expected_linear_log_likelihood(
    x: Float[Tensor, "... D"], weight: Float[Tensor, "D d"], offset: Float[Tensor, " D"], sd: Tensor, at: Moments
) -> Float[Tensor, "..."]:
    """`E log N(x; weight z + offset, sd^2)` over f, g and z, equation (9); `sd` one number or one a column."""
    spread = (at.v + expected_variance(at)) @ (weight**2).T
    residual = x - at.mean @ weight.T - offset
    sd = torch.as_tensor(sd, dtype=x.dtype).expand(x.shape[-1])
    return (-0.5 * LOG_TWO_PI - sd.log() - (residual**2 + spread) / (2 * sd**2)).sum(-1)


def weights_kl(
    mean: Float[Tensor, "d p"], trace: Float[Tensor, " d"], log_det: Float[Tensor, " d"], tau: Tensor
) -> Float[Tensor, ""]:
    """`sum_j KL(N(mean_j, S_j) || N(0, tau^2 I))` from the traces and log determinants of the S_j."""
    p = mean.shape[-1]
    quadratic = (trace + (mean**2).sum(-1)) / tau**2
    return 0.5 * (quadratic - p + 2 * p * tau.log() - log_det).sum()


def information(at: Moments) -> Float[Tensor, "..."]:
    """`I(z; f | x) = 1/2 sum_j log(1 + v_j / e^{2 g_j})` for a g that is not random: what the bound pays, (10).

    It is the ELBO of the marginal `N(mean, v + e^{2 g})` less the row's part of the bound, so that the bound flatters
    or belittles no method only if all are judged by the ELBO.
    """
    return 0.5 * (at.v * (-2 * at.log_sd).exp()).log1p().sum(-1)


def loss_per_row(
    log_likelihood: Float[Tensor, " b"], prior_kl: Float[Tensor, " b"], weight_kl: Tensor, rows: int, kappa: float = 1.0
) -> Float[Tensor, ""]:
    """Minus the bound (5), divided by the number of all `rows`, from a minibatch.

    The weights' KL is shared out over all rows, not over the minibatch: one over b would be b/N times too heavy, and
    its symptom is v at the prior's. `kappa` tempers it; a value other than 1 is no longer a bound.
    """
    return (prior_kl - log_likelihood).mean() + kappa * weight_kl / rows


def _root(variance: Tensor) -> Tensor:
    """Square root with a gradient of zero, not of infinity, where the variance is exactly zero."""
    positive = variance > 0
    return torch.where(positive, torch.where(positive, variance, 1.0).sqrt(), 0.0)
