"""Steps of stochastic variational inference from an encoder's answer: semi-amortised inference, and amortisation gaps.

Kim et al., "Semi-Amortized Variational Autoencoders", ICML 2018 (arXiv 1802.02550). Each row's mean and log standard
deviation climb the row's own ELBO; with `create_graph` the climb can be differentiated, back to the encoder.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Bound = Callable[[Tensor, Tensor], Tensor]
"""(mean (n, d), log_sd (n, d)) -> ELBO of each row (n,), differentiable."""

MOST_MEAN, MOST_LOG_SD = 1.0, 0.5
"""Largest step of a coordinate under the natural rule, in prior deviations and in nats."""


@dataclass(frozen=True)
class SviConfig:
    """Plain JSON fields. Rule "natural": steps in units of q itself, at a rate that falls to zero over the steps.

    "sgd" is the published one, gradient steps with momentum 0.5 and a row's gradient clipped at 5, rate 1. A weak rule
    makes whatever is compared with it look good: many steps must reach the row's optimum.
    """

    steps: int = 20
    lr: float = 0.5
    rule: Literal["natural", "sgd"] = "natural"
    momentum: float = 0.5
    clip: float = 5.0
    samples: int = 1


def refine(
    bound: Bound,
    mean: Float[Tensor, "n d"],
    log_sd: Float[Tensor, "n d"],
    config: SviConfig,
    create_graph: bool = False,
) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n d"]]:
    """Mean and log sd after the steps. Rows do not meet: each has its own gradient, rate and clip."""
    if not create_graph:
        mean, log_sd = mean.detach().requires_grad_(), log_sd.detach().requires_grad_()
    speed = (torch.zeros_like(mean), torch.zeros_like(log_sd))
    for index in range(config.steps):
        with torch.enable_grad():
            up, widen = torch.autograd.grad(bound(mean, log_sd).sum(), (mean, log_sd), create_graph=create_graph)
        if config.rule == "natural":
            # the Fisher information of N(m, h^2) is 1/h^2 for m and 2 for log h
            rate = config.lr * 0.5 * (1 + math.cos(math.pi * index / config.steps))
            up = (rate * (2 * log_sd).exp() * up).clamp(-MOST_MEAN, MOST_MEAN)
            widen = (rate * 0.5 * widen).clamp(-MOST_LOG_SD, MOST_LOG_SD)
        else:
            size = (up**2 + widen**2).sum(-1, keepdim=True).add(1e-20).sqrt()
            share = (config.clip / size).clamp_max(1.0) * config.lr
            speed = (config.momentum * speed[0] + share * up, config.momentum * speed[1] + share * widen)
            up, widen = speed
        mean, log_sd = mean + up, log_sd + widen
        if not create_graph:
            mean, log_sd = mean.detach().requires_grad_(), log_sd.detach().requires_grad_()
    return (mean, log_sd) if create_graph else (mean.detach(), log_sd.detach())
