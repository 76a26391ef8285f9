"""What the draws say of each parameter: mean, spread, quantiles, and how far the Monte Carlo error reaches."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from hsivi_cli.errors import InputError
from hsivi_cli.evaluation.pareto import tail_shape

QUANTILES = (0.05, 0.5, 0.95)


@dataclass(frozen=True)
class ParameterSummary:
    """One scalar parameter.

    `ess` is the number of independent draws whose mean would be as uncertain as this one, `mcse` the standard error of
    `mean`, `sd / sqrt(ess)`. `khat` (weighted draws only) is the larger of the tail shapes of the weights and of the
    weights times the distance from the mean: what the mean of this parameter rests on. `rhat` (several chains only).
    """

    name: str
    mean: float
    sd: float
    q5: float
    q50: float
    q95: float
    ess: float
    mcse: float
    khat: float | None = None
    rhat: float | None = None


def summarise(
    columns: Sequence[str],
    values: Float64[Tensor, "n p"],
    log_weight: Float64[Tensor, " n"] | None = None,
    ess: float | None = None,
    chains: int = 1,
) -> list[ParameterSummary]:
    """Summarise n draws of p named scalars; values that are not finite show as NaN.

    Four kinds of draws: independent (the default); weighted by `log_weight` (pass the smoothed ones, normalised or
    not); resampled by weights, worth `ess` independent ones; Markov chains, whose rows follow one another chain by
    chain: then `ess` is the smallest of bulk and tail ESS, and `rhat` is given (Vehtari et al. 2021, through ArviZ).
    Raises InputError where names and columns, or rows and chains, do not match.
    """
    x = np.asarray(values.detach().double().cpu())
    if x.ndim != 2 or x.shape[1] != len(columns):
        raise InputError(f"{len(columns)} names for draws of shape {x.shape}: one name a column is needed")
    if not len(x):
        raise InputError("there are no draws to summarise")
    if chains < 1 or len(x) % chains:
        raise InputError(f"{len(x)} draws are not {chains} chains of one length")
    with np.errstate(invalid="ignore"):  # infinite draws give NaN, which is meant to show
        if log_weight is not None:
            return _weighted(columns, x, log_weight.detach().double().cpu())
        mean = x.mean(0)
        sd = x.std(0, ddof=1) if len(x) > 1 else np.full(x.shape[1], math.nan)
        low, middle, high = np.quantile(x, QUANTILES, axis=0)
    worth = np.full(len(columns), float(ess or len(x)))
    rhat: list[float] | list[None] = [None] * len(columns)
    if chains > 1:
        worth, rhat = _of_chains(x, chains)
    return [
        ParameterSummary(
            name=name,
            mean=float(mean[j]),
            sd=float(sd[j]),
            q5=float(low[j]),
            q50=float(middle[j]),
            q95=float(high[j]),
            ess=float(worth[j]),
            mcse=float(sd[j]) / math.sqrt(worth[j]) if worth[j] > 0 else math.nan,
            rhat=rhat[j],
        )
        for j, name in enumerate(columns)
    ]


def weighted_quantiles(
    x: Float64[np.ndarray, " n"], weight: Float64[np.ndarray, " n"], probability: Sequence[float]
) -> Float64[np.ndarray, " q"]:
    """Quantiles of weighted draws: `numpy.quantile`'s (linear) where all weights are equal; no zero weight counts.

    Draw i sits at the middle of its own weight in the cumulative sum, stretched so that the extremes sit at 0 and 1.
    """
    order = np.argsort(x, kind="stable")
    order = order[weight[order] > 0]
    x, weight = x[order], weight[order]
    place = np.cumsum(weight) - weight / 2
    span = place[-1] - place[0]
    if span <= 0:
        return np.full(len(probability), x[0])
    return np.interp(np.asarray(probability), (place - place[0]) / span, x)


def _weighted(
    columns: Sequence[str], x: Float64[np.ndarray, "n p"], log_weight: Float64[Tensor, " n"]
) -> list[ParameterSummary]:
    log_weight = log_weight - log_weight.logsumexp(0)
    weight = log_weight.exp().numpy()
    x = np.where(weight[:, None] > 0, x, 0.0)  # 0 * inf is NaN, but a draw of no weight says nothing
    freedom = 1 - float((weight**2).sum())  # n - 1 over n at equal weights
    whole = tail_shape(log_weight)
    found = []
    for name, column in zip(columns, x.T, strict=True):
        mean = float(weight @ column)
        deviation = column - mean
        if freedom > 0:
            sd = math.sqrt(float(weight @ deviation**2) / freedom)
            mcse = math.sqrt(float(weight**2 @ deviation**2) / freedom)  # Owen, Monte Carlo, chapter 9
        else:
            sd = mcse = math.nan
        with np.errstate(divide="ignore"):
            log_distance = torch.from_numpy(np.log(np.abs(deviation)))
        worth = (sd / mcse) ** 2 if mcse > 0 else 1 / float((weight**2).sum())
        low, middle, high = (float(q) for q in weighted_quantiles(column, weight, QUANTILES))
        khat = max(whole, tail_shape(log_weight + log_distance)) if sd > 0 else whole
        found.append(ParameterSummary(name, mean, sd, low, middle, high, worth, mcse, khat))
    return found


def _of_chains(x: Float64[np.ndarray, "n p"], chains: int) -> tuple[Float64[np.ndarray, " p"], list[float]]:
    """The smaller of bulk and tail ESS, and rank-normalised split R-hat, of each column."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ArviZ announces its next version once a day
        import arviz

        by_chain = x.reshape(chains, -1, x.shape[1])
        ess = [
            min(float(arviz.ess(by_chain[..., j], method=method)) for method in ("bulk", "tail"))
            for j in range(x.shape[1])
        ]
        rhat = [float(arviz.rhat(by_chain[..., j])) for j in range(x.shape[1])]
    return np.asarray(ess), rhat
