"""Bayesian logistic regression as the variational papers benchmark it (Geffner & Domke 2023, section 6)."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import softplus

from hsivi_cli.errors import InputError
from hsivi_cli.targets.density import Batch, Density, Linearised, Predictive
from hsivi_cli.targets.examples.common import LOG_2PI, numeric_column, rand, randn


def example(data: Mapping[str, Any] | None) -> Density:
    """The 0/1 column `y` (or else the last one) on all others: `w ~ N(0, I)`, intercept included.

    Columns lose their mean and are divided by their population sd (a constant column stays 0, so that its weight keeps
    the prior), then a column of ones comes first. Raises InputError for no data, a response that is not 0/1, one row.
    """
    if data is None:
        raise InputError("the example logistic needs a data file with a 0/1 column: hsivi fit-posterior data.csv ...")
    names = [str(name) for name in data]
    if len(names) < 2:
        raise InputError(f"the example logistic needs a 0/1 column and one more at least: the data has {len(names)}")
    response = "y" if "y" in names else names[-1]
    y = numeric_column(data, response, "logistic regression")
    if len(y) < 2:
        raise InputError(f"logistic regression needs two rows at least: the data has {len(y)}")
    if not bool(((y == 0) | (y == 1)).all()):
        odd = float(y[(y != 0) & (y != 1)][0])
        raise InputError(f"column {response!r} holds {odd:g}: the response of a logistic regression is 0 or 1")
    features = [name for name in names if name != response]
    x = torch.stack([numeric_column(data, name, "logistic regression") for name in features], 1)
    facts = (
        f"response {response!r} on {len(features)} standardised columns and an intercept, w[1]",
        "prior: w ~ normal(0, 1), each, the intercept too",
    )
    return logistic_density(standardise(x), y, facts)


def standardise(x: Float[Tensor, "N p"]) -> Float[Tensor, "N p+1"]:
    """A column of ones beside the columns of `x`, each with mean 0 and population sd 1 (sd 0: left at 0)."""
    centred = x - x.mean(0)
    sd = centred.square().mean(0).sqrt()
    # a constant column's sd is rounding only
    constant = sd <= 1e-12 * (1 + x.abs().amax(0))
    scaled = torch.where(constant, torch.zeros_like(centred), centred / torch.where(constant, torch.ones_like(sd), sd))
    return torch.cat([torch.ones(len(x), 1, dtype=x.dtype), scaled], 1)


def logistic_density(design: Float[Tensor, "N d"], y: Float[Tensor, " N"], facts: tuple[str, ...] = ()) -> Density:
    """`w ~ N(0, I_d)`, `y_i ~ Bernoulli(sigmoid(design_i . w))`, all normalisers included."""
    design = design.double()
    y = y.double()
    dim = design.shape[1]

    def log_likelihood(w: Batch) -> Float[Tensor, "n N"]:
        logit = w @ design.T
        return y * logit - softplus(logit, threshold=40)

    def log_prob(w: Batch) -> Float[Tensor, " n"]:
        return log_likelihood(w).sum(1) - 0.5 * w.square().sum(1) - 0.5 * dim * LOG_2PI

    def gradient(w: Batch) -> Batch:
        return (y - torch.sigmoid(w @ design.T)) @ design - w

    rows, columns = design.numpy(), np.ascontiguousarray(design.numpy().T)

    def linearise(w: np.ndarray) -> Linearised:
        t = 0.5 * np.tanh(w @ (0.5 * columns))  # sigmoid less one half
        variance = 0.25 - t * t
        return (y.numpy() - 0.5 - t) @ rows - w, lambda v: -((v @ columns) * variance) @ rows - v

    def simulate(w: Batch, generator: torch.Generator) -> Float[Tensor, "n N"]:
        return (rand(len(w), len(y), generator=generator) < torch.sigmoid(w @ design.T)).double()

    return Density(
        "logistic",
        dim,
        log_prob,
        lambda w: {"w": w},
        gradient,
        Predictive(
            y,
            simulate,
            log_likelihood,
            lambda n, generator: randn(n, dim, generator=generator),
            lambda response: logistic_density(design, response, facts),
        ),
        facts,
        linearise=linearise,
    )
