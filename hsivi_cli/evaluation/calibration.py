"""Simulation-based calibration: fit data simulated from the model's own prior, and see whether the truth is found
where the draws say it should be.

After Talts, Betancourt, Simpson, Vehtari and Gelman (arXiv 1804.06788); quantities that depend on the data, such as
the log likelihood, after Modrák et al. (Bayesian Analysis 20, 2025, arXiv 2211.02383): without one, calibration cannot
see draws that ignore the data. Joint coverage after Lemos et al. (TARP, ICML 2023, arXiv 2302.03026).

The ranks are uniform only if the draws of a refit are independent. Give few (99 is plenty) and good ones: thin a
Markov chain to no more than its effective sample size; resample by importance weights from at least ten times as many,
or else duplicates make honest draws look overconfident.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from hsivi_cli.errors import HsiviError, InputError
from hsivi_cli.evaluation.uniformity import Uniformity, holm, uniformity

Batch = Float64[Tensor, "n d"]
Response = Float[Tensor, " N"]
FALSE_ALARM = 0.01  # chance that a right posterior fails, all parameters together
COVERAGE_LEVELS = (0.5, 0.8, 0.9, 0.95)
FAILED_REFITS = 0.05
JOINT = "(joint)"


@dataclass(frozen=True)
class Coverage:
    """How often the central interval of `level` held the truth: of each parameter `(p,)`; `expected` is the exact
    chance with so many draws, a little off `level`; `se` the binomial standard error of one share.
    """

    level: float
    expected: float
    observed: Float64[np.ndarray, " p"]
    se: float


@dataclass(frozen=True)
class SbcResult:
    """Ranks `(R, p)` of the truth among `draws` draws, and what they say of each column.

    `p_values` are adjusted for their number, so the smallest one is the verdict's; a column fails below 0.01. The
    last column, "(joint)", ranks the distance of the truth from a random point (TARP).
    """

    columns: tuple[str, ...]
    ranks: Int64[np.ndarray, "R p"]
    draws: int
    failed_refits: int
    tests: tuple[Uniformity, ...]
    p_values: Float64[np.ndarray, " p"]
    coverage: tuple[Coverage, ...]
    errors: tuple[str, ...] = field(default=())

    @property
    def replications(self) -> int:
        """Refits that gave draws."""
        return len(self.ranks)

    @property
    def failing(self) -> tuple[str, ...]:
        """Columns whose ranks are not uniform, the worst first."""
        order = np.argsort(self.p_values, kind="stable")
        return tuple(self.columns[j] for j in order if self.p_values[j] < FALSE_ALARM)

    @property
    def max_deviation(self) -> float:
        """Largest distance of any column's rank distribution from the diagonal."""
        return max(test.deviation for test in self.tests)

    @property
    def passed(self) -> bool:
        """No column fails, and hardly a refit did: data that a method cannot fit are not to be left out silently."""
        attempts = self.replications + self.failed_refits
        return not self.failing and self.failed_refits <= FAILED_REFITS * attempts

    @property
    def verdict(self) -> str:
        """One line: passed or failed, on what."""
        attempts = self.replications + self.failed_refits
        refits = f"{self.replications} refits" + (f" ({self.failed_refits} failed)" if self.failed_refits else "")
        if self.failing:
            shapes = ", ".join(f"{name} ({describe_ranks(self, name)})" for name in self.failing[:3])
            more = f" and {len(self.failing) - 3} more" if len(self.failing) > 3 else ""
            return f"calibration failed in {refits}: {shapes}{more}"
        if not self.passed:
            return f"calibration failed: {self.failed_refits} of {attempts} refits gave no draws"
        return f"calibrated in {refits}: largest deviation {self.max_deviation:.2f}, p = {self.p_values.min():.2g}"


def run_sbc(
    draw_prior: Callable[[int, torch.Generator], Batch],
    simulate: Callable[[Batch, torch.Generator], Float[Tensor, "n N"]],
    refit_draws: Callable[[Response, int, int], Batch],
    replications: int,
    draws: int,
    generator: torch.Generator,
    columns: Sequence[str] | None = None,
    quantities: Callable[[Batch, Response], Float64[Tensor, "n p"]] | None = None,
    on_refit: Callable[[int], object] | None = None,
) -> SbcResult:
    """Draw `replications` truths from the prior, simulate a response each, and rank the truth among the refit's draws.

    `refit_draws(response, draws, r)` returns (nearly) independent posterior draws `(draws, d)` given the response of
    replication r. `quantities(z, response)` is what is ranked, `columns` name it; by default z itself. Ties between
    the truth and draws are broken at random. A refit that raises HsiviError or returns NaN counts as failed. Raises
    InputError where nothing could be tested.
    """
    if replications < 1 or draws < 1:
        raise InputError(f"calibration needs a replication and a draw at least, not {replications} and {draws}")
    quantities = quantities or (lambda z, response: z)
    truths = draw_prior(replications, generator)
    references = draw_prior(replications, generator)
    responses = simulate(truths, generator)
    scale = torch.cat([truths, references]).std(0).clamp_min(torch.finfo(torch.float64).tiny)
    ranks: list[Tensor] = []
    errors: list[str] = []
    for r in range(replications):
        try:
            z = _checked(refit_draws(responses[r], draws, r), draws)
            found = quantities(torch.cat([truths[r : r + 1], z]), responses[r])
            distance = ((torch.cat([truths[r : r + 1], z]) - references[r]) / scale).norm(dim=1)
            ranks.append(rank_of_first(torch.cat([found, distance[:, None]], 1), generator))
        except HsiviError as err:
            errors.append(str(err))
        if on_refit is not None:
            on_refit(r + 1)
    if not ranks:
        raise InputError(f"calibration: none of {replications} refits gave draws, the first because: {errors[0]}")
    names = tuple(columns) if columns is not None else tuple(f"z[{j + 1}]" for j in range(len(ranks[0]) - 1))
    if len(names) != len(ranks[0]) - 1:
        raise InputError(f"calibration: {len(names)} names for {len(ranks[0]) - 1} quantities")
    return judge_ranks((*names, JOINT), torch.stack(ranks).numpy(), draws, tuple(errors))


def judge_ranks(
    columns: Sequence[str], ranks: Int64[np.ndarray, "R p"], draws: int, errors: tuple[str, ...] = ()
) -> SbcResult:
    """Test ranks `(R, p)` of the truth among `draws` draws, however they were come by."""
    tests = tuple(uniformity(column, draws) for column in ranks.T)
    p_values = holm(np.array([test.p for test in tests]))
    coverage = tuple(coverage_of_ranks(ranks, draws, level) for level in COVERAGE_LEVELS)
    return SbcResult(tuple(columns), ranks, draws, len(errors), tests, p_values, coverage, errors)


def rank_of_first(values: Float64[Tensor, "n p"], generator: torch.Generator) -> Int64[Tensor, " p"]:
    """How many of the rows 1.. lie below row 0, in each column; ties are split at random, uniformly."""
    truth, drawn = values[0], values[1:]
    below, ties = (drawn < truth).sum(0), (drawn == truth).sum(0)
    share = torch.rand(len(ties), generator=generator, dtype=torch.float64)
    return below + (share * (ties + 1)).long()


def tarp_ranks(
    truths: Float64[Tensor, "R p"],
    samples: Float64[Tensor, "R L p"],
    references: Float64[Tensor, "R p"],
    generator: torch.Generator,
) -> Int64[Tensor, " R"]:
    """How many draws are nearer to a reference point than the truth is (TARP, Lemos et al. 2023).

    Uniform among 0 .. L if the posterior is right, provided that `references` do not depend on the truths. Scale the
    columns first. Judge with `judge_ranks`: the share of ranks up to c L is the expected coverage at credibility c.
    """
    together = torch.cat([truths[:, None], samples], 1)
    distance = (together - references[:, None]).norm(dim=2)
    return torch.stack([rank_of_first(one[:, None], generator)[0] for one in distance])


def coverage_of_ranks(ranks: Int64[np.ndarray, "R p"], draws: int, level: float) -> Coverage:
    """Share of truths inside the central interval of the draws, from their ranks alone."""
    place = (np.arange(draws + 1) + 0.5) / (draws + 1)
    inside = np.abs(place - 0.5) < level / 2
    expected = float(inside.mean())
    se = float(np.sqrt(expected * (1 - expected) / len(ranks)))
    return Coverage(level, expected, inside[ranks].mean(0), se)


def describe_ranks(result: SbcResult, column: str) -> str:
    """What is wrong in a word: biased low or high, overconfident, or too wide; "misshapen" for anything else."""
    ranks = (result.ranks[:, result.columns.index(column)] + 0.5) / (result.draws + 1)
    n = len(ranks)
    shift = float((ranks.mean() - 0.5) * np.sqrt(12 * n))  # standard errors of a uniform's mean
    spread = float((((ranks - 0.5) ** 2).mean() - 1 / 12) * np.sqrt(180 * n))  # and of its variance
    if max(abs(shift), abs(spread)) < 3:
        return "misshapen"
    if abs(shift) > abs(spread):
        return "biased low" if shift > 0 else "biased high"
    return "overconfident" if spread > 0 else "too wide"


def _checked(z: Batch, draws: int) -> Batch:
    if len(z) != draws:
        raise InputError(f"a refit gave {len(z)} draws instead of {draws}")
    if not bool(z.isfinite().all()):
        raise InputError("a refit gave draws that are not finite")
    return z
