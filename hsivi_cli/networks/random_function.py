"""Random functions on a network's features: Gaussian processes with a deep kernel, in weight space.

`f(x) = b(x) + W psi(x)` with `W_jk ~ N(0, tau^2)` is a GP with the mean function b and the kernel
`tau^2 psi(x)' psi(x')` (GPVAE; Kim & Pavlovic 2021, arXiv 2102.03151). With a Gaussian q(W), independent over the rows
of W, `f_j(x) ~ N(m_j, v_j)` in closed form and in one pass. Features are normalised to `|psi| = 1`, so that tau is the
prior standard deviation of `f - b` whatever the width, and the trunk cannot buy a free KL by rescaling them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hsivi_cli.objectives.gpvae_bound import Moments, weights_kl

Covariance = Literal["none", "diagonal", "full", "shared"]
"""Of q(w_j): none (an ordinary linear head), diagonal, a matrix for each output, or one matrix for all."""
Normalise = Literal["layer", "scale", "none"]
"""LayerNorm over the root of the width, the root of the width alone (Gaussian features of unit size), or nothing."""
LOWEST_LOG_SD, HIGHEST_LOG_SD, MOST_S = -7.0, 2.0, 1.0
NUMBERS_AT_ONCE = 250_000
"""Of the products of features and factors of a full covariance."""
INITIAL_SHARE = 0.05
"""q(W) begins with this share of the prior's standard deviation."""
INITIAL_MEAN = 0.3
"""Standard deviation of the means at the start, given features of unit size."""


@dataclass(frozen=True)
class FunctionPrior:
    """A head's prior and its q(W); plain JSON fields.

    With `mean_function` b is a linear head and the mean of q(W) stays zero: b is a prior mean fitted to the data.
    Without, the mean of q(W) does the work and the KL shrinks it, as a weight decay does. `learn_tau` is for the
    second: under a mean function nothing holds tau up, and it goes to zero, where the encoder is an ordinary one.
    """

    covariance: Covariance = "diagonal"
    tau: float = 0.3
    mean_function: bool = True
    learn_tau: bool = False


class RandomHead(nn.Module):
    """d random functions of p features. Parameters of q(W) and tau are those in `q_parameters()`."""

    def __init__(self, features: int, outputs: int, prior: FunctionPrior, generator: torch.Generator) -> None:
        super().__init__()
        self.prior, self.features, self.outputs = prior, features, outputs
        random = prior.covariance != "none"
        self.linear: nn.Linear
        self.mean: nn.Parameter | None = None
        start = torch.randn(outputs, features, generator=generator) * INITIAL_MEAN
        if prior.mean_function or not random:
            self.linear = nn.utils.skip_init(nn.Linear, features, outputs)
            with torch.no_grad():
                self.linear.weight.copy_(start)
                self.linear.bias.zero_()
        else:
            self.mean = nn.Parameter(start)
        if random:
            self.log_tau = nn.Parameter(torch.tensor(math.log(prior.tau)), requires_grad=prior.learn_tau)
            rows = 1 if prior.covariance == "shared" else outputs
            self.log_sd = nn.Parameter(torch.full((rows, features), math.log(INITIAL_SHARE * prior.tau)))
        if prior.covariance in ("full", "shared"):
            self.below = nn.Parameter(torch.zeros(len(self.log_sd), features, features))

    @property
    def tau(self) -> Tensor:
        """The prior's standard deviation of a weight."""
        return self.log_tau.exp()

    def q_parameters(self) -> list[nn.Parameter]:
        """What only a random head has; they can take a larger learning rate."""
        own = [value for name, value in self.named_parameters(recurse=False) if name != "mean"]
        return [value for value in own if value.requires_grad]

    def factor(self) -> Float[Tensor, "r p p"]:
        """The lower triangular factors L_j of `S_j = L_j L_j'`, one for all outputs where they share it."""
        unit = torch.eye(self.features, dtype=self.log_sd.dtype, device=self.log_sd.device)
        # a row below the diagonal is in units of its own deviation
        unit = unit if self.prior.covariance == "diagonal" else unit + self.below.tril(-1)
        return self.log_sd.exp()[..., None] * unit

    def forward(self, psi: Float[Tensor, "... p"]) -> tuple[Float[Tensor, "... d"], Float[Tensor, "... d"]]:
        """Mean and variance of the d functions, equation (4); a variance of zero without a covariance."""
        mean = self.linear(psi) if self.mean is None else psi @ self.mean.T
        if self.prior.covariance == "none":
            return mean, torch.zeros_like(mean)
        if self.prior.covariance == "diagonal":
            return mean, psi**2 @ (2 * self.log_sd).exp().T
        # one product serves all outputs; in blocks of rows that fit a cache, as n r p numbers do not
        factors = self.factor()
        r, p, _ = factors.shape
        together = factors.transpose(0, 1).reshape(p, r * p)
        blocks = psi.reshape(-1, p).split(max(1, NUMBERS_AT_ONCE // (r * p)))
        v = torch.cat([(block @ together).square().unflatten(-1, (r, p)).sum(-1) for block in blocks])
        return mean, v.reshape(*psi.shape[:-1], r).expand_as(mean)

    def kl(self) -> Float[Tensor, ""]:
        """`KL(q(W) || p(W))` in nats; zero for an ordinary head."""
        if self.prior.covariance == "none":
            return next(self.parameters()).new_zeros(())
        if self.prior.covariance == "diagonal":
            trace = (2 * self.log_sd).exp().sum(-1)
        else:
            trace = (self.factor() ** 2).sum((-2, -1))
        log_det = 2 * self.log_sd.sum(-1)
        mean = self.log_sd.new_zeros(self.outputs, self.features) if self.mean is None else self.mean
        return weights_kl(mean, trace.expand(self.outputs), log_det.expand(self.outputs), self.tau)


class FeatureNorm(nn.Module):
    """Features of unit size and, where a head has no bias of its own, a constant feature besides them."""

    def __init__(self, features: int, kind: Normalise, constant: bool) -> None:
        super().__init__()
        self.kind, self.constant, self.root = kind, constant, math.sqrt(features)
        self.width = features + constant

    def forward(self, psi: Float[Tensor, "... p"]) -> Float[Tensor, "... w"]:
        """Normalised features, row by row: nothing of the batch enters, or the kernel would depend on it."""
        if self.kind == "layer":
            psi = nn.functional.layer_norm(psi, psi.shape[-1:])
        if self.kind != "none":
            psi = psi / self.root
        return torch.cat([psi, torch.ones_like(psi[..., :1])], -1) if self.constant else psi


class RandomEncoder(nn.Module):
    """`x -> Moments`: a trunk, its features normalised, a head for the mean and one for the log standard deviation.

    Without covariances it is the encoder of a VAE, with the same trunk, norm and heads: the same network but for q(W).
    """

    def __init__(
        self,
        trunk: Callable[[Tensor], Tensor],
        features: int,
        latent: int,
        mean: FunctionPrior,
        log_sd: FunctionPrior,
        generator: torch.Generator,
        normalise: Normalise = "layer",
    ) -> None:
        super().__init__()
        constant = any(head.covariance != "none" and not head.mean_function for head in (mean, log_sd))
        self.trunk = trunk
        self.norm = FeatureNorm(features, normalise, constant)
        self.mean_head = RandomHead(self.norm.width, latent, mean, generator)
        self.log_sd_head = RandomHead(self.norm.width, latent, log_sd, generator)

    @property
    def random(self) -> bool:
        """Whether there is a random function in it."""
        return any(head.prior.covariance != "none" for head in (self.mean_head, self.log_sd_head))

    def features(self, x: Float[Tensor, "n D"]) -> Float[Tensor, "n w"]:
        """Normalised features psi(x)."""
        return self.norm(self.trunk(x))

    def forward(self, x: Float[Tensor, "n D"], mask: Float[Tensor, "n w"] | None = None) -> Moments:
        """Mean and log sd, clamped to a range that no posterior under N(0, I) needs to leave, with their variances.

        `mask` multiplies the features: dropout, for an ordinary encoder only (a random function needs psi(x) fixed).
        """
        psi = self.features(x)
        psi = psi if mask is None else psi * mask
        mean, v = self.mean_head(psi)
        log_sd, s = self.log_sd_head(psi)
        return Moments(mean, _clamp(log_sd, LOWEST_LOG_SD, HIGHEST_LOG_SD), v, _clamp(s, 0.0, MOST_S))

    def weight_kl(self) -> Float[Tensor, ""]:
        """`KL(q(W, U) || p(W, U))` of both heads."""
        return self.mean_head.kl() + self.log_sd_head.kl()

    def q_parameters(self) -> list[nn.Parameter]:
        """Parameters of the weights' posteriors and learned taus."""
        return self.mean_head.q_parameters() + self.log_sd_head.q_parameters()


def _clamp(value: Tensor, low: float, high: float) -> Tensor:
    """Clamped, with the gradient of the identity: a row beyond the edge must find its way back."""
    return value + (value.clamp(low, high) - value).detach()
