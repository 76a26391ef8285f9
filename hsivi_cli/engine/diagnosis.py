"""Tells "critic not tracking" from "student diverging", from two averages that cost nothing.

Write the critic as f = f* + error, f* the best critic and g* = f* - eps* the true gap. With g = f - eps*, the critic's
claim is `claim = E s'^2 g^2`, and the Fisher value `fisher = E s'^2 [2 g (zeta/gamma' - eps*) - g^2]` is exactly
`E s'^2 g*^2 - E s'^2 error^2`: the mismatch of student and teacher less the critic's error. Two kinds of error differ:

- noise of the optimiser, independent of g*: claim = mismatch + error, so the half sum of claim and Fisher value is the
  mismatch and their half difference the error. A constant error of this kind is harmless.
- lag, f = eps* + a g* with a < 1: the Fisher value is (2/a - 1) times the claim, so that it exceeds the claim.

So a student that diverges raises the half sum, a critic that is too noisy raises the half difference, and one that lags
makes the Fisher value exceed the claim.
"""

from collections.abc import Sequence
from dataclasses import dataclass

WINDOW = 10  # log lines that are averaged; the Fisher value of a single batch is mostly noise
HISTORY = 500  # log lines that growth is judged against
GROWTH_CEILING = 2.0
LAG_CEILING = 1.5


@dataclass(frozen=True)
class Diagnosis:
    """Averages over the last lines: `mismatch` of student and teacher, `critic_error`, and `advice` in words."""

    mismatch: float
    critic_error: float
    advice: str


def diagnose(fisher: Sequence[float], claim: Sequence[float]) -> Diagnosis:
    """Judge a run from its logged Fisher values and critic's claims, oldest first (equal lengths, at least one)."""
    mismatch, error = averages(fisher[-HISTORY:], claim[-HISTORY:])
    claimed = mismatch[-1] + error[-1]
    if len(fisher) < 2 * WINDOW:
        advice = "too early to tell"
    elif claimed <= 0:
        advice = "critic not tracking: it has not moved; raise --lr-critic"
    elif mismatch[-1] - error[-1] > LAG_CEILING * claimed:
        advice = "critic not tracking: it lags; raise --critic-steps or --lr-critic"
    elif _growth(error) > GROWTH_CEILING:
        advice = "critic not tracking: its error grows; raise --critic-steps, or lower --lr"
    elif _growth(mismatch) > GROWTH_CEILING:
        advice = "student diverging: lower --lr"
    else:
        advice = "healthy"
    return Diagnosis(mismatch[-1], error[-1], advice)


def averages(fisher: Sequence[float], claim: Sequence[float]) -> tuple[list[float], list[float]]:
    """Mismatch and critic error at every line, over the last WINDOW lines."""
    pairs = list(zip(fisher, claim, strict=True))
    return _windows([(c + f) / 2 for f, c in pairs]), _windows([(c - f) / 2 for f, c in pairs])


def _windows(values: Sequence[float]) -> list[float]:
    windows = [values[max(0, i - WINDOW) : i] for i in range(1, len(values) + 1)]
    return [sum(window) / len(window) for window in windows]


def _growth(values: Sequence[float]) -> float:
    """The last average against the smallest whole one, which noise must not make vanish."""
    whole = sorted(values[WINDOW - 1 :])
    floor = max(whole[0], 0.05 * whole[len(whole) // 2])
    return values[-1] / floor if floor > 0 else 1.0
