"""The two objectives of a semi-implicit layer for a log density (HSIVI-LB and HSIVI-SM, arXiv 2310.17153).

A layer's marginal `q(x) = E q(x | y)` has no closed form. HSIVI-LB puts a mixture of J + 1 of its conditionals in its
place (the surrogate bound of SIVI, arXiv 1805.11183); HSIVI-SM learns the difference of scores by a critic instead.

Both live on one fact. Given J + 1 independent inputs, with the own one at a random place among them, x is drawn from
the mixture of their conditionals *exactly*. So
- the weights `p / mixture` are unbiased for every J, and the bound is Jensen's inequality;
- the mean of the mixture's derivative in its own parameters is zero: the bound's gradient is that along x alone, and
  this form of it vanishes draw by draw where q fits (Roeder et al. 2017, arXiv 1703.09194, for a plain q);
- the mixture's score is the mean of `grad log q(x | y)` given x and the inputs: the same regression target for a critic
  with less noise (Rao-Blackwell).
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Mixture:
    """Log density and score at n points, `log_density` of shape (n,) and `score` of shape (n, d); no gradients."""

    log_density: Float[Tensor, " n"]
    score: Float[Tensor, "n d"]


@torch.no_grad()
def mixture_at(
    x: Float[Tensor, "n d"], means: Float[Tensor, "m d"], log_sigma: Float[Tensor, "s d"], extra: int
) -> Mixture:
    """`1/(J+1) sum_{j=0..J} N(x_i; means_j, diag sigma_j^2)` with J = `extra`, where `x_i` came from component i.

    Row i takes its own component and the next J ones around the circle of all m. These are other chains: independent of
    the pair `(y_i, x_i)` and of each other, as the bound asks. `log_sigma` has one row, or one a component. Raises
    ValueError unless n <= m and J <= m - 1.
    """
    n, m = len(x), len(means)
    if not (n <= m and 0 <= extra < m):
        raise ValueError(f"{extra} further components for {n} points need more than {m} means")
    logits, precision, origin = _logits(x, means, log_sigma)
    if extra < m - 1:
        ahead = (torch.arange(m, device=x.device) - torch.arange(n, device=x.device).unsqueeze(-1)) % m
        logits.masked_fill_(ahead > extra, -math.inf)
    top = logits.amax(1, keepdim=True)
    weight = logits.sub_(top).exp_()
    total = weight.sum(1, keepdim=True)
    pull = weight @ (precision * (means - origin)) / total
    push = precision if len(precision) == 1 else weight @ precision / total
    log_density = (top + total.log()).squeeze(1) - math.log(extra + 1)
    if len(precision) == 1:
        log_density = log_density - 0.5 * ((x - origin).square() * precision).sum(1)
    return Mixture(log_density, pull - push * (x - origin))


def log_mixture_sum(
    x: Float[Tensor, "n d"], means: Float[Tensor, "m d"], log_sigma: Float[Tensor, "s d"]
) -> Float[Tensor, " n"]:
    """`log sum_j N(x_i; means_j, diag sigma_j^2)` over all m components."""
    logits, precision, origin = _logits(x, means, log_sigma)
    log_sum = logits.logsumexp(1)
    return log_sum - 0.5 * ((x - origin).square() * precision).sum(1) if len(precision) == 1 else log_sum


def _logits(x: Tensor, means: Tensor, log_sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`log N(x_i; means_j, .)` of every pair as one matrix product, float64, for the squares are multiplied out.

    Where sigma is shared, the square of x, alike for all components, is left out.
    """
    # the distance of a pair does not know the origin: near it the squares lose the fewest digits
    origin = means.mean(0)
    u, v, precision = x - origin, means - origin, (-2 * log_sigma).exp()
    scaled = v * precision
    constant = -0.5 * (scaled * v).sum(1) - log_sigma.sum(1) - 0.5 * x.shape[1] * math.log(2 * math.pi)
    if len(precision) == 1:
        return torch.addmm(constant, u, scaled.T), precision, origin
    both = torch.cat([scaled, -0.5 * precision], 1)
    return torch.addmm(constant, torch.cat([u, u.square()], 1), both.T), precision, origin


def surrogate_bound(log_p: Float[Tensor, " n"], log_mix: Float[Tensor, " n"]) -> Float[Tensor, ""]:
    """HSIVI-LB of a layer, `mean_i log p_k(x_i) - log_mixture_i`: below `log Z_k - KL(q, p_k)`, closer as J grows.

    Draws of density zero are left out, unless all are: one such draw among many must not end a run.
    """
    terms = log_p - log_mix
    possible = terms.detach() > -torch.inf
    return terms[possible].mean() if bool(possible.any()) else terms.mean()


def fisher_minimax(critic: Float[Tensor, "*k n d"], difference: Float[Tensor, "*k n d"]) -> Float[Tensor, "*k"]:
    """HSIVI-SM of every layer, `mean_i 2 f.(S_k - grad log q(x | y)) - |f|^2`: the critic maximises it, q minimises.

    `difference` is `S_k(x)` minus the score of the conditional, `-zeta / sigma` for `x = mu(y) + sigma zeta`, or of the
    mixture of `mixture_at`. At the best critic, `f = S_k - grad log q`, it is the Fisher divergence of the marginal
    from the bridge. Leading dimensions are layers.
    """
    return (2 * critic * difference - critic**2).sum(-1).mean(-1)
