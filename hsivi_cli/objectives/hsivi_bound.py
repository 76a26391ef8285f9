"""The two objectives of a semi-implicit layer for a log density (HSIVI-LB and HSIVI-SM, arXiv 2310.17153).

A layer's marginal `q(x) = E q(x | y)` has no closed form. HSIVI-LB puts a mixture of J + 1 of its conditionals in its
place (the surrogate bound of SIVI, arXiv 1805.11183); HSIVI-SM learns the difference of scores by a critic instead.
Leading dimensions are layers.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor


def pairwise_log_density(
    x: Float[Tensor, "*k n d"], means: Float[Tensor, "*k m d"], log_sigma: Float[Tensor, "*k d"]
) -> Float[Tensor, "*k n m"]:
    """`log N(x_i; means_j, diag sigma^2)` of every pair; float64, for the squares are expanded into matrix products."""
    scale = (-log_sigma).exp().unsqueeze(-2)
    # the distance of a pair does not know the origin: near it the expanded squares lose the fewest digits
    origin = means.detach().mean(-2, keepdim=True)
    u, v = (x - origin) * scale, (means - origin) * scale
    squares = (u**2).sum(-1).unsqueeze(-1) + (v**2).sum(-1).unsqueeze(-2)
    normaliser = log_sigma.sum(-1) + 0.5 * x.shape[-1] * math.log(2 * math.pi)
    return u @ v.transpose(-1, -2) - 0.5 * squares - normaliser[..., None, None]


def log_mixture(
    x: Float[Tensor, "*k n d"], means: Float[Tensor, "*k m d"], log_sigma: Float[Tensor, "*k d"], extra: int
) -> Float[Tensor, "*k n"]:
    """`log 1/(J+1) sum_{j=0..J} q(x_i | y_i^(j))` with J = `extra`, `means_j = mu(y_j)` and `x_i ~ q(. | y_i)`, m >= n.

    Row i takes its own mean and the next J ones around the circle of all m. These are other chains: independent of the
    pair `(y_i, x_i)` and of each other, as the bound asks. J <= m - 1, else ValueError. Differentiable once.
    """
    n, m = x.shape[-2], means.shape[-2]
    if not (n <= m and 0 <= extra < m):
        raise ValueError(f"{extra} further components for {n} points need more than {m} means")
    with torch.no_grad():
        pairs = pairwise_log_density(x, means, log_sigma)
        if extra < m - 1:
            columns = torch.arange(m, device=x.device)
            ahead = (columns - torch.arange(n, device=x.device).unsqueeze(-1)) % m
            pairs.masked_fill_(ahead > extra, -math.inf)
        log_sum = pairs.logsumexp(-1)
        responsibility = (pairs - log_sum.unsqueeze(-1)).exp_()
    # The gradient of a log-sum-exp is the mean gradient under the responsibilities, which is three small products:
    # half the time of differentiating the pairs.
    scale = (-log_sigma).exp().unsqueeze(-2)
    u, v = x * scale, means * scale
    expected = (u * (responsibility @ v)).sum(-1) - 0.5 * (u**2).sum(-1) - log_sigma.sum(-1, keepdim=True)
    expected = expected - 0.5 * (responsibility @ (v**2).sum(-1, keepdim=True)).squeeze(-1)
    return log_sum - math.log(extra + 1) + (expected - expected.detach())


def surrogate_bound(log_p: Float[Tensor, "*k n"], log_mix: Float[Tensor, "*k n"]) -> Float[Tensor, "*k"]:
    """HSIVI-LB of every layer, `mean_i log p_k(x_i) - log_mixture_i`: below `log Z_k - KL(q, p_k)`, closer as J grows.

    Given the J + 1 inputs, with the own one at a random place among them, `x` is drawn from the mixture itself. So
    `E exp(log_p - log_mix) = Z_k` holds exactly for every J, and the bound is Jensen's inequality.
    """
    return (log_p - log_mix).mean(-1)


def fisher_minimax(critic: Float[Tensor, "*k n d"], difference: Float[Tensor, "*k n d"]) -> Float[Tensor, "*k"]:
    """HSIVI-SM of every layer, `mean_i 2 f.(S_k - grad log q(x | y)) - |f|^2`: the critic maximises it, q minimises.

    `difference` is `S_k(x) - grad log q(x | y)`, the second term being `-zeta / sigma` for `x = mu(y) + sigma zeta`.
    At the best critic, `f = S_k - grad log q`, it is the Fisher divergence of the marginal from the bridge.
    """
    return (2 * critic * difference - critic**2).sum(-1).mean(-1)
