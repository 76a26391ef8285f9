"""Metrics of latent-variable models: bounds on log p(x), latents against the prior, classes, clusters, gaps, collapse.

Tensors and callables come in, so that every method is judged by the same functional: bounds are means over rows of
`log_weight` with `E exp(log_weight) = p(x)`. Rows go in blocks; nothing the size of all draws is kept.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hsivi_cli.errors import InputError
from hsivi_cli.io.latent_draws import LatentDraws

RUN_BANDWIDTHS = (0.05, 0.8, 0.1, 0.3, 0.5)
"""Of the study's training script (.8 is as it stands there)."""
RESULT_BANDWIDTHS = (0.005, 0.008, 0.01, 0.03, 0.05)
"""Of the study's script for its tables."""
BANDWIDTHS = {"run": RUN_BANDWIDTHS, "results": RESULT_BANDWIDTHS}
ACTIVE = 0.01
"""A dimension whose posterior mean varies less than that over rows says nothing of them (Burda et al. 2016)."""
DRAWS_AT_ONCE = 100_000
PAIRS_AT_ONCE = 4_000_000
LOG_TWO_PI = math.log(2 * math.pi)

LogJoint = Callable[[Tensor, Tensor], Tensor]
"""`(x (n, D), z (k, n, d)) -> log p(x, z) (k, n)`, differentiable in z."""


class Posterior(Protocol):
    """What is judged."""

    def draw(self, x: Tensor, k: int, generator: torch.Generator, weigh: bool = ...) -> LatentDraws:
        """k weighted draws a row."""


@dataclass(frozen=True)
class Bounds:
    """Means over rows in nats with standard errors; `elbo_rows` and `iwae_rows` (n,) are the rows' own, for pairing.

    The errors are of the rows as a sample of the population, with the noise of the draws in them.
    """

    draws: int
    elbo: float
    elbo_se: float
    iwae: float
    iwae_se: float
    elbo_rows: Float[Tensor, " n"]
    iwae_rows: Float[Tensor, " n"]

    @property
    def says(self) -> str:
        """One line, the number of draws stated."""
        return (
            f"ELBO {self.elbo:.3f} ± {self.elbo_se:.3f}, "
            f"IWAE-{self.draws} log-likelihood {self.iwae:.3f} ± {self.iwae_se:.3f} nats a row"
        )


def bounds(posterior: Posterior, x: Float[Tensor, "n D"], k: int, generator: torch.Generator) -> Bounds | None:
    """True ELBO and IWAE-k of rows; None for a posterior without a density."""
    if k < 1 or not len(x):
        raise InputError(f"a bound of {len(x)} rows with {k} draws: one or more of both are needed")
    elbo, iwae = [], []
    for block in x.split(max(1, DRAWS_AT_ONCE // k)):
        total, best = torch.zeros(len(block)).double(), torch.full((len(block),), -math.inf).double()
        left = k
        while left:  # a single row may have more draws than fit
            now = min(left, DRAWS_AT_ONCE)
            log_weight = posterior.draw(block, now, generator).log_weight
            if log_weight is None:
                return None
            log_weight = log_weight.detach().double().cpu()
            total += log_weight.sum(0)
            best = torch.logaddexp(best, log_weight.logsumexp(0))
            left -= now
        elbo.append(total / k)
        iwae.append(best - math.log(k))
    rows, weighted = torch.cat(elbo), torch.cat(iwae)
    return Bounds(k, *_mean(rows), *_mean(weighted), rows, weighted)


@dataclass(frozen=True)
class Paired:
    """Mean over rows of one method's bound less another's of the same rows, in nats, with its standard error.

    The error is of the rows as a sample, for the two fits as they are: what another seed of training would change is
    not in it. It is far below that of either bound, since rows that are hard are hard for both.
    """

    elbo: float
    elbo_se: float
    iwae: float
    iwae_se: float


def paired(bounds_of_one: Bounds, of_other: Bounds) -> Paired:
    """The differences "one less other". Raises InputError unless both are of as many rows and draws."""
    one, other = bounds_of_one, of_other
    if len(one.iwae_rows) != len(other.iwae_rows) or one.draws != other.draws:
        raise InputError("bounds are compared row by row: both must be of the same rows and as many draws")
    return Paired(*_mean(one.elbo_rows - other.elbo_rows), *_mean(one.iwae_rows - other.iwae_rows))


def latent_nll(
    latents: Float[Tensor, "m d"], prior_draws: Float[Tensor, "n d"], bandwidths: Sequence[float] = RUN_BANDWIDTHS
) -> float:
    """`E_{p(z)}[-log qhat(z)]` in nats: qhat is the equal mixture of kernel estimates on `latents`, one a bandwidth.

    Its figure depends on the bandwidths above all, so that they are to be named next to it (`BANDWIDTHS`).
    """
    latents, prior_draws = latents.double(), prior_draws.double()
    m, d = latents.shape
    if not m or not len(prior_draws) or min(bandwidths) <= 0:
        raise InputError("a kernel density needs latents, points to judge it at, and bandwidths above 0")
    if not bool(torch.isfinite(latents).all()):
        raise InputError("the latents hold numbers that are not finite: the training has diverged")
    total = 0.0
    for points in prior_draws.split(max(1, PAIRS_AT_ONCE // m)):
        squares = torch.cdist(points, latents, compute_mode="donot_use_mm_for_euclid_dist").square_()
        parts = [
            torch.logsumexp(squares * (-0.5 / h**2), 1) - math.log(m) - d * (math.log(h) + 0.5 * LOG_TWO_PI)
            for h in bandwidths
        ]
        total -= float((torch.stack(parts).logsumexp(0) - math.log(len(bandwidths))).sum())
    return total / len(prior_draws)


def knn_accuracy(
    train: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"],
    test: Float[Tensor, "m d"],
    truth: Int[Tensor, " m"],
    neighbours: int = 20,
) -> float:
    """Share of test latents whose nearest neighbours among the train latents vote right; label -1 is left out."""
    from sklearn.neighbors import KNeighborsClassifier

    known, judged = labels >= 0, truth >= 0
    if not bool(known.any()) or not bool(judged.any()):
        raise InputError("k-NN accuracy needs known labels among the train rows and among the test rows")
    voters = KNeighborsClassifier(min(neighbours, int(known.sum()))).fit(_array(train[known]), _array(labels[known]))
    return float(voters.score(_array(test[judged]), _array(truth[judged])))


@dataclass(frozen=True)
class ClusterScores:
    """Each from 0 to 1: purity (which rises with the number of clusters), completeness, NMI (arithmetic mean)."""

    purity: float
    completeness: float
    nmi: float


def cluster_scores(truth: Int[Tensor, " n"], clusters: Int[Tensor, " n"]) -> ClusterScores:
    """Clusters against classes; rows of class -1 are left out."""
    from sklearn.metrics import completeness_score, normalized_mutual_info_score
    from sklearn.metrics.cluster import contingency_matrix

    known = truth >= 0
    if not bool(known.any()):
        raise InputError("cluster scores need known labels")
    t, c = _array(truth[known]), _array(clusters[known])
    purity = float(contingency_matrix(t, c).max(0).sum()) / len(t)
    return ClusterScores(purity, float(completeness_score(t, c)), float(normalized_mutual_info_score(t, c)))


def mixture_clusters(latents: Float[Tensor, "n d"], clusters: int = 20, seed: int = 2) -> Int[Tensor, " n"]:
    """Labels by a Gaussian mixture, as the study has it: full covariances, 10 starts, 1e-2 on their diagonals."""
    from sklearn.mixture import GaussianMixture

    mixture = GaussianMixture(clusters, covariance_type="full", n_init=10, reg_covar=1e-2, random_state=seed)
    return torch.from_numpy(mixture.fit_predict(_clusterable(latents, clusters))).long()


def kmeans_clusters(latents: Float[Tensor, "n d"], clusters: int = 20, starts: int = 1, seed: int = 2) -> Tensor:
    """Labels (n,) by k-means."""
    from sklearn.cluster import KMeans

    found = KMeans(clusters, n_init=starts, random_state=seed).fit_predict(_clusterable(latents, clusters))
    return torch.from_numpy(found).long()


@dataclass(frozen=True)
class Gaps:
    """Rows (n,) in nats: `log p - elbo = approximation + amortisation`, the inference gap.

    `approximation` is log p less the ELBO of the row's best diagonal Gaussian, as far as the search found it, and
    `amortisation` that ELBO less the encoder's. `elbo_se` is the draws' standard error of each of the two ELBOs.
    Where log p is a bound of many draws, approximation is a lower bound.
    """

    amortisation: Float[Tensor, " n"]
    approximation: Float[Tensor, " n"] | None
    best_elbo: Float[Tensor, " n"]
    elbo_se: Float[Tensor, " n"]
    best_mean: Float[Tensor, "n d"]
    best_sd: Float[Tensor, "n d"]


def inference_gaps(
    log_joint: LogJoint,
    x: Float[Tensor, "n D"],
    mean: Float[Tensor, "n d"],
    sd: Float[Tensor, "n d"],
    generator: torch.Generator,
    elbo: Float[Tensor, " n"] | None = None,
    log_p: Float[Tensor, " n"] | None = None,
    steps: int = 500,
    lr: float = 1e-2,
    samples: int = 8,
    draws: int = 1000,
) -> Gaps:
    """Gaps of the encoder's Gaussian N(mean, sd^2), against `steps` of Adam from there, row by row.

    `elbo` (n,) takes the place of that Gaussian's where the encoder is not Gaussian. Both ELBOs are of the same noise.
    With `log_p` (n,), exact or a bound of many draws, there is an approximation gap.
    """
    rows = max(1, DRAWS_AT_ONCE // max(samples, 1))
    found = [
        _fit(log_joint, block, m, s, generator, steps, lr, samples, draws)
        for block, m, s in zip(x.split(rows), mean.split(rows), sd.split(rows), strict=True)
    ]
    before, after, error, best_mean, best_sd = (torch.cat(parts) for parts in zip(*found, strict=True))
    before = before if elbo is None else elbo.double()
    approximation = None if log_p is None else log_p.double() - after
    return Gaps(after - before, approximation, after, error, best_mean, best_sd)


def _fit(
    log_joint: LogJoint, x: Tensor, mean: Tensor, sd: Tensor, generator: torch.Generator,
    steps: int, lr: float, samples: int, draws: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    place, log_sd = mean.detach().clone().requires_grad_(), sd.detach().clamp_min(1e-6).log().requires_grad_()
    first = (place.detach().clone(), log_sd.detach().clone())
    optimiser = torch.optim.Adam([place, log_sd], lr)
    for index in range(steps):
        # a falling rate: at a constant one the noise of the draws would stay in the answer
        optimiser.param_groups[0]["lr"] = lr * min(1.0, 2 * (1 - index / steps))
        noise = _paired(samples, place, generator)
        bound = (log_joint(x, place + log_sd.exp() * noise).sum() / len(noise)) + log_sd.sum()
        gradients = torch.autograd.grad(-bound, (place, log_sd))
        place.grad, log_sd.grad = (gradient.nan_to_num(0.0) for gradient in gradients)
        optimiser.step()
    at_once = max(1, DRAWS_AT_ONCE // len(x))
    sums, squares, count = torch.zeros(2, len(x)).double(), torch.zeros(2, len(x)).double(), 0
    with torch.no_grad():
        while count < draws:
            noise = torch.randn(min(at_once, draws - count), *mean.shape, generator=generator, dtype=mean.dtype)
            noise = noise.to(mean.device)
            for index, (m, s) in enumerate((first, (place, log_sd))):
                value = log_joint(x, m + s.exp() * noise).double()
                log_q = (-0.5 * noise.double() ** 2 - s.double() - 0.5 * LOG_TWO_PI).sum(-1)
                sums[index] += (value - log_q).sum(0).cpu()
                squares[index] += ((value - log_q) ** 2).sum(0).cpu()
            count += len(noise)
    elbos = sums / count
    error = ((squares / count - elbos**2).clamp_min(0) / count).sqrt().amax(0)
    # the start is one of the candidates: a search that lost its way is no gap
    better = elbos[1] >= elbos[0]
    chosen = better[:, None].to(mean.device)
    best_mean = torch.where(chosen, place.detach(), first[0])
    best_sd = torch.where(chosen, log_sd.detach(), first[1]).exp()
    return elbos[0], elbos.amax(0), error, best_mean, best_sd


@dataclass(frozen=True)
class Collapse:
    """`spread` (d,): variance over rows of the posterior mean; `kl` (d,): of each dimension to N(0, 1), mean over rows.

    `kl` is of diagonal Gaussians under a normal prior; under another prior it is a description only.
    """

    spread: Float[Tensor, " d"]
    kl: Float[Tensor, " d"]
    active: int

    @property
    def warning(self) -> str | None:
        """One line where dimensions say nothing about the rows; None otherwise."""
        dim = len(self.spread)
        if self.active == dim:
            return None
        idle = [str(j + 1) for j in (self.spread <= ACTIVE).nonzero()[:, 0].tolist()]
        which = ", ".join(idle[:8]) + (", ..." if len(idle) > 8 else "")
        if not self.active:
            return f"the posterior has collapsed: none of the {dim} latent dimensions says anything about the rows"
        return f"{dim - self.active} of {dim} latent dimensions say nothing about the rows ({which}): use fewer"


def collapse(mean: Float[Tensor, "n d"], sd: Float[Tensor, "n d"]) -> Collapse:
    """Active units and the KL of each dimension, from posterior means and standard deviations."""
    mean, sd = mean.double(), sd.double()
    spread = mean.var(0, correction=0)
    kl = 0.5 * (mean**2 + sd**2 - 1 - 2 * sd.clamp_min(1e-300).log()).mean(0)
    return Collapse(spread, kl, int((spread > ACTIVE).sum()))


def _paired(samples: int, like: Tensor, generator: torch.Generator) -> Tensor:
    """Noise and its mirror image: half the variance of the gradients in the means goes."""
    half = torch.randn((samples + 1) // 2, *like.shape, generator=generator, dtype=like.dtype).to(like.device)
    return torch.cat([half, -half])


def _mean(rows: Float[Tensor, " n"]) -> tuple[float, float]:
    error = float(rows.std()) / math.sqrt(len(rows)) if len(rows) > 1 else math.nan
    return float(rows.mean()), error


def _array(values: Tensor) -> np.ndarray:
    return values.detach().cpu().numpy()


def _clusterable(latents: Tensor, clusters: int) -> np.ndarray:
    if clusters < 1 or clusters > len(latents):
        raise InputError(f"{clusters} clusters of {len(latents)} rows: choose 1 to {len(latents)}")
    if not bool(torch.isfinite(latents).all()):
        raise InputError("the latents hold numbers that are not finite: the training has diverged")
    return _array(latents.double())
