"""Tells "critic not tracking" from "student diverging", from two averages that cost nothing.

With g = f - eps*, the Fisher value `E s'^2 [2 g (zeta/gamma' - eps*) - g^2]` equals `E s'^2 g^2` exactly when f is the
best critic. Their ratio is therefore 1 for a critic that tracks the student, and falls towards or below 0 for one that
does not. If the critic tracks, the Fisher value can be believed, and its growth means that the student moves away from
the teacher.
"""

from collections.abc import Sequence
from dataclasses import dataclass

WINDOW = 10  # log lines that are averaged; the ratio of single batches is noise
TRACKING_FLOOR = 0.3
GROWTH_CEILING = 2.0


@dataclass(frozen=True)
class Diagnosis:
    """`tracking` is the ratio (1 is perfect), `growth` the Fisher value against its best so far; `advice` in words."""

    tracking: float
    growth: float
    advice: str


def diagnose(fisher: Sequence[float], critic_gap: Sequence[float]) -> Diagnosis:
    """Judge a run from its logged Fisher values and critic gaps, oldest first (equal lengths, at least one)."""
    means = [sum(fisher[max(0, i - WINDOW) : i]) / min(i, WINDOW) for i in range(1, len(fisher) + 1)]
    gap = sum(critic_gap[-WINDOW:]) / len(critic_gap[-WINDOW:])
    tracking = means[-1] / gap if gap > 0 else 1.0
    settled = [value for value in means[WINDOW:] if value > 0]
    growth = means[-1] / min(settled) if settled else 1.0
    if len(fisher) < WINDOW:
        return Diagnosis(tracking, growth, "too early to tell")
    if tracking < TRACKING_FLOOR:
        return Diagnosis(tracking, growth, "critic not tracking: raise --critic-steps or --lr-critic, or lower --lr")
    if growth > GROWTH_CEILING:
        return Diagnosis(tracking, growth, "student diverging: lower --lr")
    return Diagnosis(tracking, growth, "healthy")
