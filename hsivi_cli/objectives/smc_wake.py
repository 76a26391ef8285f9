"""Losses of amortised inference by the inclusive KL, `E_x KL(p(z | x) || q(z | x))` (SMC-Wake, arXiv 2403.10610).

All take `log q(z | x)` at particles and are means over the n observations of a minibatch; only their gradients mean
anything. Weights and evidences are constants: whatever comes in besides `log q` is detached. Weights may be -inf, at
which `log q` may be anything; an observation whose weights are all zero adds nothing.
"""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

LogQ = Float[Tensor, "n k"]


def all_runs_loss(
    log_q: Float[Tensor, "n m k"], log_weight: Float[Tensor, "n m k"], log_z: Float[Tensor, "n m"]
) -> Float[Tensor, ""]:
    """Estimator (a): `-sum_m P_m sum_k w_k^m log q(z_k^m)`, with the m runs of an observation weighted by evidence.

    `P_m = Zhat_m / sum_l Zhat_l`. Consistent as m grows, for any number of particles. `log_weight` is normalised over
    k; a run that is not there has a `log_z` of -inf.
    """
    share = _normalised(log_z.detach())[..., None]
    return -_expectation(log_q.flatten(1), (share + log_weight.detach()).flatten(1)).mean()


def retained_draws_loss(log_q: Float[Tensor, "n m r"], log_z: Float[Tensor, "n m"]) -> Float[Tensor, ""]:
    """Estimator (b): as (a), each run standing in by r draws from its own weighted particles, kept since it ended."""
    return all_runs_loss(log_q, torch.full_like(log_q, -math.log(log_q.shape[-1])), log_z)


def newest_run_loss(
    log_q: LogQ,
    log_weight: Float[Tensor, "n k"],
    log_z: Float[Tensor, " n"],
    log_mean_z: Float[Tensor, " n"],
    largest: float = math.inf,
) -> Float[Tensor, ""]:
    """Estimator (c): `-(Zhat / Zbar) sum_k w_k log q(z_k)` of the newest run, Zbar the mean evidence of all so far.

    Unbiased as their number grows; its variance stays, with a heavy tail, so that ratios above `largest` are cut there.
    """
    ratio = (log_z - log_mean_z).detach().exp().nan_to_num(nan=0.0).clamp_max(largest)
    return -(ratio * _expectation(log_q, log_weight.detach())).mean()


def self_normalised_loss(log_q: LogQ, log_weight: Float[Tensor, "n k"]) -> Float[Tensor, ""]:
    """`-sum_k w_k log q(z_k)` of one run: naive of the newest, with a bias of order 1/k; PIMH of the chain's state.

    With the run that a particle independent Metropolis-Hastings chain has accepted (`pimh_accepts`) there is no bias.
    """
    return -_expectation(log_q, log_weight.detach()).mean()


def pimh_accepts(
    log_z: Float[Tensor, " n"], proposed_log_z: Float[Tensor, " n"], uniform: Float[Tensor, " n"]
) -> Bool[Tensor, " n"]:
    """Where a fresh run takes the state's place, with probability `min(1, Zhat' / Zhat)` (Andrieu et al. 2010, 4.2).

    The particles and evidence of the state then have exactly the posterior's mean in the long run. A state of evidence
    zero always gives way.
    """
    return (uniform.log() < proposed_log_z - log_z) | (log_z == -math.inf)


def wake_loss(log_q: LogQ, log_joint: Float[Tensor, "n k"]) -> Float[Tensor, ""]:
    """Reweighted wake-sleep: particles from q itself, weighted by `p(z) p(x | z) / q(z | x)` (Bornschein, Bengio 2015).

    Biased of order 1/k, and unbounded below as q collapses to a point.
    """
    return self_normalised_loss(log_q, _normalised(log_joint.detach() - log_q.detach()))


def defensive_wake_loss(
    log_q: LogQ, log_prior: Float[Tensor, "n k"], log_likelihood: Float[Tensor, "n k"], prior_share: float = 0.5
) -> Float[Tensor, ""]:
    """Wake with `prior_share` of the particles drawn from the prior and the others from q, weighted by their mixture.

    The mixture in the denominator, `share p(z) + (1 - share) q(z | x)` for every particle, bounds all weights.
    """
    log_prior, log_likelihood = log_prior.detach(), log_likelihood.detach()
    from_q = math.log1p(-prior_share) + log_q.detach()
    log_mixture = torch.logaddexp(math.log(prior_share) + log_prior, from_q)
    return self_normalised_loss(log_q, _normalised(log_prior + log_likelihood - log_mixture))


def sleep_loss(log_q: Float[Tensor, " n"]) -> Float[Tensor, ""]:
    """NPE: `-log q(z | x)` at simulated pairs, which needs a simulator and nothing else."""
    return -log_q.mean()


def climbing_choice(log_joint: LogQ, log_q: LogQ, uniform: Float[Tensor, " n"]) -> Int[Tensor, " n"]:
    """Which particle Markovian score climbing retains: conditional importance sampling (Naesseth et al. 2020).

    Of k particles an observation the first is the one retained before, the others are fresh draws from q. One is chosen
    by the weights `p(z) p(x | z) / q(z | x)`; its loss is `sleep_loss`. Where all weights are zero the first stays.
    """
    share = _normalised((log_joint - log_q).detach()).exp()
    edges = share.cumsum(1)
    chosen = torch.searchsorted(edges, (uniform * edges[:, -1])[:, None].contiguous(), right=True)[:, 0]
    return torch.where(edges[:, -1] > 0, chosen.clamp_max(log_q.shape[1] - 1), 0)


def _expectation(log_q: LogQ, log_weight: Float[Tensor, "n k"]) -> Float[Tensor, " n"]:
    """`sum_k w_k log q_k`; a particle of weight zero counts as nothing even where q is zero or no number."""
    weight = log_weight.exp().to(log_q.dtype)
    return torch.where(weight > 0, weight * log_q, 0.0).sum(1)


def _normalised(log_weight: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
    """Log weights that sum to 1, NaN counting as zero; all -inf where there is nothing to share out."""
    log_weight = torch.where(log_weight.isnan(), -math.inf, log_weight.double())
    total = log_weight.logsumexp(1, keepdim=True)
    return torch.where(total > -math.inf, log_weight - total, -math.inf)
