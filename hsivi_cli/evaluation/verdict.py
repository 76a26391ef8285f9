"""One line on whether to rely on the draws: trust, use with care, or do not use, and why.

Two kinds of evidence can carry a verdict, and either is enough. *Weights*: draws weighted without bias towards the
posterior are right as far as their tail allows, which k-hat measures (Vehtari et al. 2024). *Moves*: draws refined by
steps that leave the posterior unchanged are right once they have forgotten where they started. Whatever carries it,
the checks on top (predictive, calibration, draws that are no numbers) can only lower the level.

What nothing here can see from one data set is a mode that no draw has reached; calibration on data simulated from the
prior (`evaluation.calibration`) can, on average over those data.
"""

import math
from dataclasses import dataclass
from typing import Literal

from hsivi_cli.evaluation.calibration import SbcResult
from hsivi_cli.evaluation.predictive_check import PredictiveCheck

Level = Literal["trust", "care", "no"]
KHAT_GOOD, KHAT_BAD = 0.5, 0.7
ESS_GOOD, ESS_BAD = 400, 20  # 400: Vehtari et al. 2021; below 20 not even a mean is known to a quarter sd
RHAT_GOOD, RHAT_BAD = 1.01, 1.05
ACCEPTANCE_GOOD, ACCEPTANCE_BAD = 0.3, 0.05
MEMORY_GOOD, MEMORY_BAD = 0.1, 0.3
NON_FINITE_BAD = 0.01
FEW_REFITS = 100
_ORDER: dict[Level, int] = {"trust": 0, "care": 1, "no": 2}
WORDS: dict[Level, str] = {"trust": "trust", "care": "use with care", "no": "do not use"}


@dataclass(frozen=True)
class Weights:
    """What the importance weights say. `approximate`: they rest on an estimated density, so k-hat does too.

    `drawn` is how many draws were weighted, where the reported ones were resampled from more (None: as many).
    """

    khat: float
    ess: float
    approximate: bool = False
    drawn: int | None = None


@dataclass(frozen=True)
class Moves:
    """What refining says; None where it was not measured.

    `ess` the smallest over parameters, `rhat` the largest, `acceptance` the mean rate of the last stage. `memory`: the
    largest correlation over parameters between where a particle started and where it ended. `noise`: what R-hat exceeds
    1 by through chance alone, where chains, or islands of particles, are short or small. `chains`: how many, where few
    chains leave a correlation by chance.
    """

    ess: float | None = None
    rhat: float | None = None
    acceptance: float | None = None
    memory: float | None = None
    chains: int | None = None
    noise: float = 0.0


@dataclass(frozen=True)
class Verdict:
    """`level` is "trust", "care" or "no"; `reasons` carry the level, `line` is both in one."""

    level: Level
    reasons: tuple[str, ...]
    line: str


@dataclass(frozen=True)
class _Finding:
    level: Level
    text: str


def judge(
    draws: int,
    weights: Weights | None = None,
    moves: Moves | None = None,
    predictive: PredictiveCheck | None = None,
    calibration: SbcResult | None = None,
    non_finite: int = 0,
) -> Verdict:
    """Boil the evidence on `draws` draws down to one line.

    `weights` where the draws were weighted or resampled by them, `moves` where they were refined; with neither, nothing
    vouches for the draws and no level above "care" is given. `non_finite` counts draws, or weights, that are NaN or
    infinite.
    """
    carriers = [found for found in (weights and _of_weights(draws, weights), moves and _of_moves(moves)) if found]
    findings = min(carriers, key=_worst) if carriers else [_Finding("care", _UNCHECKED)]
    supported = bool(carriers) and _worst(findings) < _ORDER["no"]
    findings = [*findings, *_of_checks(draws, predictive, calibration, non_finite, supported)]
    level = max((finding.level for finding in findings), key=_ORDER.__getitem__)
    reasons = tuple(finding.text for finding in findings if finding.level == level)
    return Verdict(level, reasons, f"{WORDS[level]}: {'; '.join(reasons)}")


def khat_limit(draws: int) -> float:
    """Above this k-hat, n draws cannot be corrected: `min(1 - 1 / log10 n, 0.7)` (Vehtari et al. 2024)."""
    return min(1 - 1 / math.log10(draws), KHAT_BAD) if draws > 10 else 0.0


def _of_weights(draws: int, weights: Weights) -> list[_Finding]:
    drawn = max(weights.drawn or draws, draws)
    limit = khat_limit(drawn)
    khat = f"k-hat {weights.khat:.2f}"
    found = []
    if weights.khat > limit or math.isnan(weights.khat):
        cause = _TOO_FEW if drawn < 100 else _TOO_FAR
        return [_Finding("no", f"{khat} is above {limit:.2f}: {cause}")]  # the ESS would only repeat it
    if weights.khat > min(KHAT_GOOD, limit):
        found.append(_Finding("care", f"{khat} is between {KHAT_GOOD} and {limit:.2f}: the correction is noisy"))
    else:
        found.append(_Finding("trust", khat))
    found.append(_of_ess(min(weights.ess, draws), f" of {draws}"))
    if weights.approximate and found[0].level == "trust":
        found.append(_Finding("care", f"{khat} rests on an estimated density, so it is approximate"))
    return found


def _of_moves(moves: Moves) -> list[_Finding]:
    found = []
    if moves.rhat is not None:
        limit = RHAT_GOOD + moves.noise
        level = _grade(moves.rhat, limit, RHAT_BAD + moves.noise)
        text = f"R-hat {moves.rhat:.3f}"
        found.append(_Finding(level, text if level == "trust" else f"{text} is above {limit:.3g}: chains disagree"))
    if moves.memory is not None:
        chance = 0.0 if moves.chains is None else 4 / math.sqrt(moves.chains)  # no correlation is not measured as 0
        level = _grade(moves.memory, max(MEMORY_GOOD, chance), max(MEMORY_BAD, chance))
        text = f"correlation {moves.memory:.2f} with the start"
        found.append(_Finding(level, text if level == "trust" else f"{text}: refine for longer"))
    if not found:
        # acceptance and ESS alone do not say whether the moves have arrived
        found.append(_Finding("care", "nothing measured whether the moves have forgotten the fit"))
    if moves.acceptance is not None:
        level = _grade(-moves.acceptance, -ACCEPTANCE_GOOD, -ACCEPTANCE_BAD)
        text = f"{moves.acceptance:.0%} of moves accepted"
        found.append(_Finding(level, text if level == "trust" else f"only {text}"))
    if moves.ess is not None:
        found.append(_of_ess(moves.ess))
    return found


def _of_ess(ess: float, of: str = "") -> _Finding:
    level = _grade(-ess, -ESS_GOOD, -ESS_BAD)
    text = f"{ess:.0f} effective draws{of}"
    return _Finding(level, text if level == "trust" else f"only {text}: ask for more --draws")


def _of_checks(
    draws: int,
    predictive: PredictiveCheck | None,
    calibration: SbcResult | None,
    non_finite: int,
    supported: bool,
) -> list[_Finding]:
    found = []
    if non_finite:
        level: Level = "no" if non_finite > NON_FINITE_BAD * draws else "care"
        found.append(_Finding(level, f"{non_finite} of {draws} draws are not finite"))
    if predictive is not None and predictive.extremes:
        # with nothing else to vouch for the fit, it is as likely to be the culprit as the model is
        worst = ", ".join(f"{check.name} (p = {check.p:.3g})" for check in predictive.extremes)
        culprit = "the model" if supported else "the fit, or the model,"
        text = f"{culprit} does not reproduce the observed {worst}"
        found.append(_Finding("care" if supported else "no", text))
    if predictive is not None and predictive.non_finite:
        found.append(_Finding("care", f"{predictive.non_finite} simulated responses are not finite"))
    if calibration is not None and not calibration.passed:
        # the fit to these data may be fine where fits to data from a wide prior are not: weights tell
        text = f"calibration fails for {_listed(calibration.failing) or 'failed refits'}"
        found.append(_Finding("care" if supported else "no", text))
    elif calibration is not None:
        weak = ", too few to see small faults" if calibration.replications < FEW_REFITS else ""
        found.append(_Finding("trust", f"calibrated in {calibration.replications} simulated data sets{weak}"))
    return found


_TOO_FEW = "too few draws to tell, ask for more --draws"
_TOO_FAR = "the fit is too far from the posterior to be corrected, add --refine smc"
_UNCHECKED = "no weights and no moves check these draws: add --refine hmc"


def _grade(value: float, good: float, bad: float) -> Level:
    if math.isnan(value):
        return "no"
    return "trust" if value <= good else "care" if value <= bad else "no"


def _worst(findings: list[_Finding]) -> int:
    return max(_ORDER[finding.level] for finding in findings)


def _listed(names: tuple[str, ...], limit: int = 3) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
