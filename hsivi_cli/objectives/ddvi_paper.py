"""What the public code of DDVI optimises and reports (arXiv 2401.02739), for comparison: none of it is a bound.

The chain from y_T to y_0 is deterministic (DDIM), so that q(z | x) has no density and its entropy counts as 0; N(0, I)
stands in for r(y_T | z); the prior is a kernel density estimate; the divergence of a step has y_0 of the same chain.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import smooth_l1_loss

from hsivi_cli.bridges.latent_noise import LatentNoise

BANDWIDTHS = (0.005, 0.008, 0.01, 0.03, 0.05)
KDE_DRAWS, FARTHEST = 10_000, 1000.0
PredictNoise = Callable[[int, Tensor], Tensor]


def ddim_step(y: Tensor, eps: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """From y_t with predicted noise to y_{t-1}; `before` is abar_{t-1} and `after` abar_t. Exact for the true noise."""
    return (before.sqrt() / after.sqrt()) * (y - (1 - after).sqrt() * eps) + (1 - before).sqrt() * eps


def ddim_chain(start: Float[Tensor, "m d"], predict: PredictNoise, noise: LatentNoise) -> Float[Tensor, "T+1 m d"]:
    """`y_0 .. y_T` from y_T without any noise on the way; `predict(t, y_t)` is the noise in y_t."""
    states = [start]
    for t in range(noise.times, 0, -1):
        states.append(ddim_step(states[-1], predict(t, states[-1]), noise.abar[t - 1], noise.abar[t]))
    return torch.stack(states[::-1])


def public_elbo(
    log_likelihood: Float[Tensor, " m"],
    log_prior: Float[Tensor, " m"],
    start_mean: Float[Tensor, "m d"],
    start_log_sd: Float[Tensor, "m d"],
    states: Float[Tensor, "T+1 m d"],
    noise: LatentNoise,
) -> Float[Tensor, " m"]:
    """The "ELBO" of the public code with sums put right: it exceeds log p(x) where the posterior is narrow.

    `log p(x | z) + log p(z) - KL(q(y_T | x) || N(0, I)) - sum_{t >= 2} |y_{t-1} - mutilde_t|^2 / (2 btilde_t)`.
    """
    w0, w1, btilde = (table[2:, None, None] for table in (noise.w0, noise.w1, noise.btilde))
    off = states[1:-1] - w0 * states[0] - w1 * states[2:]
    steps = (off.square() / (2 * btilde)).sum((0, 2))
    return log_likelihood + log_prior - standard_kl(start_mean, start_log_sd) - steps


def standard_kl(mean: Float[Tensor, "m d"], log_sd: Float[Tensor, "m d"]) -> Float[Tensor, " m"]:
    """`KL(N(mean, sd^2) || N(0, I))`."""
    return 0.5 * (mean.square() + (2 * log_sd).exp() - 1 - 2 * log_sd).sum(-1)


def consistency_loss(
    states: Float[Tensor, "T+1 m d"], times: Int[Tensor, " m"], noise: LatentNoise
) -> Float[Tensor, ""]:
    """Huber distance of y_{t-1} from r's mean given y_t and the chain's own y_0, a time a row; gradients everywhere."""
    rows = torch.arange(states.shape[1], device=states.device)
    w0, w1 = noise.w0[times][:, None], noise.w1[times][:, None]
    return smooth_l1_loss(w0 * states[0] + w1 * states[times, rows], states[times - 1, rows])


def log_kernel_density(
    z: Float[Tensor, "m d"], draws: Float[Tensor, "n d"], bandwidths: tuple[float, ...] = BANDWIDTHS
) -> Float[Tensor, " m"]:
    """An equal mixture of Gaussian kernel estimates, each log density clamped to +-1000 as in the code."""
    squares, d = torch.cdist(z, draws, compute_mode="donot_use_mm_for_euclid_dist").square(), z.shape[1]
    found = []
    for width in bandwidths:
        constant = math.log(len(draws)) + d * math.log(width) + 0.5 * d * math.log(2 * math.pi)
        found.append(((-squares / (2 * width**2)).logsumexp(1) - constant).clamp(-FARTHEST, FARTHEST))
    return torch.stack(found).logsumexp(0) - math.log(len(bandwidths))
