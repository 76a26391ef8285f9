"""Is an amortised posterior right on average over the prior? Ranks of many truths in one pass, no refits.

Draw R truths from the prior, simulate an observation of each, and draw L times from the encoder for each observation.
Three views: ranks of every parameter (Talts et al., arXiv 1804.06788); the rank of the truth's own density
log q(truth | x), which gives the coverage of regions of highest density (Hermans et al., "A trust crisis in
simulation-based inference?", TMLR 2022); distances from random points (TARP, Lemos et al., ICML 2023). None of them can
see an encoder that ignores the data and returns the prior; ranks of the log likelihood do (`quantities`, Modrák et al.
2025).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from hsivi_cli.errors import InputError
from hsivi_cli.evaluation.calibration import JOINT, SbcResult, judge_ranks, tarp_ranks
from hsivi_cli.evaluation.uniformity import simultaneous_band

DENSITY = "(density)"
Quantity = tuple[Float[Tensor, " R"], Float[Tensor, "R L"]]
"""Something scalar at the truths and at the draws."""


@dataclass(frozen=True)
class CoverageCurve:
    """Share of truths `observed` (L,) inside the regions of highest density of credibility `levels` (L,).

    Of a right posterior all lie between `lower` and `upper` together in 95 of 100 cases. Below `lower` it is
    overconfident. `deviation` is the largest distance from the diagonal, signed: negative where overconfident.
    """

    levels: Float64[np.ndarray, " L"]
    observed: Float64[np.ndarray, " L"]
    lower: Float64[np.ndarray, " L"]
    upper: Float64[np.ndarray, " L"]

    @property
    def deviation(self) -> float:
        """Largest distance of the curve from the diagonal, with its sign."""
        off = self.observed - self.levels
        return float(off[np.abs(off).argmax()])

    @property
    def inside(self) -> bool:
        """Whether the whole curve lies within its band."""
        return bool(((self.observed >= self.lower - 1e-12) & (self.observed <= self.upper + 1e-12)).all())


def ranks_of_truths(
    truths: Float[Tensor, "R p"], samples: Float[Tensor, "R L p"], generator: torch.Generator
) -> Int64[Tensor, "R p"]:
    """How many of a row's draws lie below its truth, in each column; ties are split at random, uniformly."""
    if samples.shape[:1] != truths.shape[:1] or samples.shape[2:] != truths.shape[1:]:
        raise InputError(f"draws of shape {tuple(samples.shape)} do not go with truths of {tuple(truths.shape)}")
    if not bool(torch.isfinite(samples).all()):
        raise InputError("draws that are not finite cannot be ranked")
    below = (samples < truths[:, None]).sum(1)
    ties = (samples == truths[:, None]).sum(1)
    share = torch.rand(ties.shape, generator=generator, dtype=torch.float64)
    return below + (share * (ties + 1)).long()


def density_ranks(
    at_truths: Float[Tensor, " R"], at_samples: Float[Tensor, "R L"], generator: torch.Generator
) -> Int64[Tensor, " R"]:
    """How many draws have a higher log density than the truth: 0 at the mode; uniform for a right posterior.

    A truth without density (-inf) has the highest rank.
    """
    low = torch.finfo(torch.float64).min
    truths, samples = (values.double().nan_to_num(nan=low, neginf=low) for values in (at_truths, at_samples))
    return ranks_of_truths(-truths[:, None], -samples[:, :, None], generator)[:, 0]


def coverage_curve(ranks: Int64[Tensor, " R"], draws: int) -> CoverageCurve:
    """Expected coverage of the regions of highest density, from `density_ranks` among `draws` draws."""
    levels, lower, upper = simultaneous_band(len(ranks), draws)
    below = np.bincount(ranks.numpy(), minlength=draws + 1).cumsum()[:-1]
    return CoverageCurve(levels, below / len(ranks), lower, upper)


def calibrate_draws(
    columns: Sequence[str],
    truths: Float[Tensor, "R p"],
    samples: Float[Tensor, "R L p"],
    log_q: Quantity,
    generator: torch.Generator,
    quantities: Mapping[str, Quantity] | None = None,
) -> SbcResult:
    """Test an encoder's draws for R simulated observations; every column by its ranks.

    To the `columns` of truths and draws come the `quantities` (the log likelihood, against encoders that ignore the
    data), the density `log_q` and the distance from a random prior point, "(joint)". Show with `plot_sbc`.
    """
    if len(columns) != truths.shape[1]:
        raise InputError(f"calibration: {len(columns)} names for {truths.shape[1]} columns")
    if len(truths) < 2:
        raise InputError("calibration needs two simulated observations at least")
    ranks = [ranks_of_truths(truths, samples, generator)]
    for at_truths, at_samples in (quantities or {}).values():
        ranks.append(samples.shape[1] - density_ranks(at_truths, at_samples, generator)[:, None])
    ranks.append(density_ranks(*log_q, generator)[:, None])
    scale = truths.std(0).clamp_min(torch.finfo(torch.float64).tiny)
    # prior draws that have nothing to do with the row's truth: those of the other rows
    shift = int(torch.randint(1, len(truths), (), generator=generator))
    references = truths.roll(shift, 0)
    ranks.append(tarp_ranks(truths / scale, samples / scale, references / scale, generator)[:, None])
    names = (*columns, *(quantities or {}), DENSITY, JOINT)
    return judge_ranks(names, torch.cat(ranks, 1).numpy(), samples.shape[1])
