"""Bounds on log p(x) from k weighted draws a row: the ELBO and the importance-weighted bound.

A weight is unbiased if `E exp(log_weight) = p(x)`; then both are lower bounds in expectation, the second one
monotone in k (Burda, Grosse, Salakhutdinov 2016, arXiv 1509.00519).
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor


def evidence_lower_bound(log_weight: Float[Tensor, "k n"]) -> Float[Tensor, " n"]:
    """The mean of the log weights."""
    return log_weight.mean(0)


def importance_weighted_bound(log_weight: Float[Tensor, "k n"]) -> Float[Tensor, " n"]:
    """`log 1/k sum_k exp(log_weight)`, k >= 1."""
    return log_weight.logsumexp(0) - math.log(len(log_weight))


def importance_weighted_bounds(log_weight: Float[Tensor, "k n"], counts: tuple[int, ...]) -> Float[Tensor, "c n"]:
    """The bound of each count, from the same draws cut into as many whole groups as there are."""
    bounds = []
    for count in counts:
        groups = log_weight[: len(log_weight) // count * count].unflatten(0, (-1, count))
        bounds.append((groups.logsumexp(1) - math.log(count)).mean(0))
    return torch.stack(bounds)
