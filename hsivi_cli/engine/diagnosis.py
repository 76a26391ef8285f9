"""Tells "critic not tracking" from "student diverging", from two averages that cost nothing.

Write the critic as f = f* + error, f* the best critic and g* = f* - eps* the true gap. With g = f - eps*, the critic's
claim is `E s'^2 g^2 = mismatch + critic_error` and the Fisher value is `E s'^2 [2 g (zeta/gamma' - eps*) - g^2] =
mismatch - critic_error`, where mismatch = `E s'^2 g*^2` is the Fisher divergence itself (for an error without
correlation to g*). Half their sum and half their difference are the two curves to watch: a student that diverges raises
the mismatch, a critic that cannot follow raises its own error. A constant critic error is the noise of its optimiser,
and harmless.
"""

from collections.abc import Sequence
from dataclasses import dataclass

WINDOW = 10  # log lines that are averaged; the Fisher value of a single batch is mostly noise
GROWTH_CEILING = 2.0


@dataclass(frozen=True)
class Diagnosis:
    """Averages over the last lines: `mismatch` of student and teacher, `critic_error`, and `advice` in words."""

    mismatch: float
    critic_error: float
    advice: str

    @property
    def tracking(self) -> float:
        """Share of the critic's claim that is real, 0 to 1."""
        claim = self.mismatch + self.critic_error
        return self.mismatch / claim if claim > 0 else 1.0


def diagnose(fisher: Sequence[float], critic_gap: Sequence[float]) -> Diagnosis:
    """Judge a run from its logged Fisher values and critic gaps, oldest first (equal lengths, at least one)."""
    pairs = list(zip(fisher, critic_gap, strict=True))
    mismatch = _averages([(gap + value) / 2 for value, gap in pairs])
    error = _averages([(gap - value) / 2 for value, gap in pairs])
    if len(pairs) < 2 * WINDOW:
        advice = "too early to tell"
    elif _growth(error) > GROWTH_CEILING:
        advice = "critic not tracking: raise --critic-steps, or lower --lr"
    elif _growth(mismatch) > GROWTH_CEILING:
        advice = "student diverging: lower --lr"
    else:
        advice = "healthy"
    return Diagnosis(mismatch[-1], error[-1], advice)


def _averages(values: Sequence[float]) -> list[float]:
    """Means over the last WINDOW values at every point, at least zero: they estimate averages of squares."""
    windows = [values[max(0, i - WINDOW) : i] for i in range(1, len(values) + 1)]
    return [max(sum(window) / len(window), 0.0) for window in windows]


def _growth(averages: Sequence[float]) -> float:
    """The last average against the smallest whole one."""
    smallest = min(averages[WINDOW - 1 :])
    return averages[-1] / smallest if smallest > 0 else 1.0
