"""The exact auxiliary-variable bound of a diffusion posterior, and its sleep loss (DDVI, arXiv 2401.02739).

With the noising process r (`bridges/latent_noise.py`) and the reverse chain q(y_T | x) prod_t q(y_{t-1} | y_t, x),

    log p(x) >= E_q [log p(x | y_0) + log p(y_0) + sum_t log r(y_t | y_{t-1}) - log q(y_T | x)
                     - sum_t log q(y_{t-1} | y_t, x)],                                                        (1)

whose gap is the divergence of q(y_{0:T} | x) from p(z | x) r(y_{1:T} | z). Everything is in nats and a full sum over
dimensions and steps. Chains are m rows, (m, d) a state; the noise tables have the chain's type.

The DDPM-style rewriting, a sum of `KL(q(y_{t-1} | y_t, x) || r(y_{t-1} | y_t, y_0))` with y_0 from the same chain, is
not (1): under q run backwards, y_{t-1} given y_0 is not distributed as q(y_{t-1} | y_t, x). `sampled_end_form` has it,
for the tests to show that it is wrong; nothing learns from it.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hsivi_cli.bridges.latent_noise import LatentNoise
from hsivi_cli.transitions.reverse_chain import Chain

LOG_TWO_PI = math.log(2 * math.pi)


def pathwise_bound(log_joint: Float[Tensor, " m"], chain: Chain, noise: LatentNoise) -> Float[Tensor, " m"]:
    """Estimator (a): the log ratio in (1) of one chain; `log_joint` is `log p(x, y_0)`.

    Its exponential has mean p(x) exactly, and where q is exact every chain gives log p(x).
    """
    beta, root = noise.beta[1:, None], noise.alpha[1:, None, None].sqrt()
    ahead = torch.addcmul(chain.states[1:], chain.states[:-1], root, value=-1).square().sum(-1)
    own = chain.noise.square().sum(-1)
    # the two-pi of r and of q cancel, step by step
    steps = 0.5 * (own - ahead / beta) + chain.log_sd.sum(-1)
    d = chain.states.shape[-1]
    constant = -0.5 * d * noise.beta[1:].log().sum()
    return log_joint + steps.sum(0) + constant - start_log_density(chain)


def per_step_bound(log_joint: Float[Tensor, " m"], chain: Chain, noise: LatentNoise) -> Float[Tensor, " m"]:
    """Estimator (b): each step's ratio in closed form given y_t, and the entropy of q(y_T | x):

        E[log r(y_t | y_{t-1}) - log q(y_{t-1} | y_t, x) | y_t]
            = -KL(N(mu_t, s_t^2) || N(y_t / sqrt(alpha_t), beta_t / alpha_t)) - d/2 log alpha_t.              (3)

    The same mean as (a); noisier where q is near the optimum. Its exponential means nothing.
    """
    alpha, beta = noise.alpha[1:, None, None], noise.beta[1:, None, None]
    target = chain.states[1:] / alpha.sqrt()
    ratio = alpha / beta
    squares = (2 * chain.log_sd).exp() + (chain.mean - target).square()
    kl = 0.5 * (ratio * squares - 1 - ratio.log()) - chain.log_sd
    d = chain.states.shape[-1]
    entropy = chain.start_log_sd.sum(-1) + 0.5 * d * (1 + LOG_TWO_PI)
    return log_joint - kl.sum((0, 2)) - 0.5 * d * noise.alpha[1:].log().sum() + entropy


def start_log_density(chain: Chain) -> Float[Tensor, " m"]:
    """`log q(y_T | x)` of the chains' own starts."""
    d = chain.start_noise.shape[-1]
    return -0.5 * chain.start_noise.square().sum(-1) - chain.start_log_sd.sum(-1) - 0.5 * d * LOG_TWO_PI


def sleep_start(
    z: Float[Tensor, "n d"], mean: Float[Tensor, "n d"], log_sd: Float[Tensor, "n d"], noise: LatentNoise
) -> Float[Tensor, " n"]:
    """`E log q(y_T | x)` under r(y_T | z), in closed form; the first term of (4)."""
    abar = noise.abar[-1]
    return _cross(abar.sqrt() * z - mean, 1 - abar, log_sd)


def sleep_step(
    z: Float[Tensor, "*n d"],
    y: Float[Tensor, "*n d"],
    times: Int[Tensor, "*n"],
    mean: Float[Tensor, "*n d"],
    log_sd: Float[Tensor, "*n d"],
    noise: LatentNoise,
) -> Float[Tensor, "*n"]:
    """`E log q(y_{t-1} | y_t, x)` under r(y_{t-1} | y_t, z), in closed form; y is y_t of that row's time.

    At t = 1 it is log q(z | y_1, x), there being no noise left; nothing is divided by btilde_1 = 0. It differs from
    `-KL(r || q)` by the entropy of r, a constant.
    """
    w0, w1, btilde = (table[times][..., None] for table in (noise.w0, noise.w1, noise.btilde))
    return _cross(w0 * z + w1 * y - mean, btilde, log_sd)


def sleep_loss(
    start: Float[Tensor, " n"],
    steps: Float[Tensor, "k n"],
    noise: LatentNoise,
    extra: Float[Tensor, " n"] | None = None,
) -> Float[Tensor, ""]:
    """Minus (4), the mean over fantasies, from `steps` at k times of each fantasy drawn uniformly, scaled to all T.

    `extra` (n,) is log q of what else the posterior says, such as a class.
    """
    found = start + noise.times * steps.mean(0)
    return -(found if extra is None else found + extra).mean()


def sampled_end_form(log_joint: Float[Tensor, " m"], chain: Chain, noise: LatentNoise) -> Float[Tensor, " m"]:
    """A published mistake, kept as a control: (1) with divergences from r(y_{t-1} | y_t, y_0), y_0 of the same chain.

    Off by many nats even where q is exact. Not a bound, not an estimator of (1).
    """
    z, abar = chain.z, noise.abar[-1]
    arrival = _log_normal(chain.states[-1] - abar.sqrt() * z, 1 - abar)
    w0, w1, btilde = (table[2:, None, None] for table in (noise.w0, noise.w1, noise.btilde))
    off = chain.mean[1:] - w0 * z - w1 * chain.states[2:]
    variance = (2 * chain.log_sd[1:]).exp()
    kl = 0.5 * ((variance + off.square()) / btilde - 1 + btilde.log()) - chain.log_sd[1:]
    last = (-0.5 * chain.noise[0].square() - chain.log_sd[0] - 0.5 * LOG_TWO_PI).sum(-1)
    return log_joint + arrival - start_log_density(chain) - kl.sum((0, 2)) - last


def _cross(off: Tensor, variance: Tensor, log_sd: Tensor) -> Tensor:
    """`E log N(y; mean, s^2)` for y of the given variance whose mean is `off` away, summed over dimensions."""
    spread = (off.square() + variance) * (-2 * log_sd).exp()
    return -(0.5 * spread + log_sd).sum(-1) - 0.5 * off.shape[-1] * LOG_TWO_PI


def _log_normal(off: Tensor, variance: Tensor) -> Tensor:
    return -0.5 * (off.square() / variance + variance.log() + LOG_TWO_PI).sum(-1)
