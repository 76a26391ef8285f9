"""What the loop remembers beside a method's state: running means, skipped steps and roll-backs, kept in checkpoints."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

# so many skipped steps in a row, or among the last hundred, are a burst: waiting will not mend it
IN_A_ROW, OF_RECENT, RECENT = 5, 10, 100
LR_FACTOR = 0.5  # of the learning rate at each roll-back


@dataclass
class Progress:
    """Plain JSON, so that a run that is resumed from a checkpoint repeats the straight one in all that it tells.

    `sums` holds sum and count of each metric since the last log line, `skipped` the steps of the whole run in which an
    update was left out, `recent` the latest of them, `rolled_back_to` the step that the last roll-back went to.
    """

    sums: dict[str, list[float]] = field(default_factory=dict)
    skipped: int = 0
    recent: list[int] = field(default_factory=list)
    rollbacks: int = 0
    rolled_back_to: int = -1
    lr_scale: float = 1.0

    def add(self, metrics: dict[str, float]) -> None:
        """Add one step's metrics to the running means; what is not finite has no part in them."""
        for name, value in metrics.items():
            total = self.sums.setdefault(name, [0.0, 0])
            if math.isfinite(value):
                total[0] += value
                total[1] += 1

    def means(self) -> dict[str, float]:
        """Means since the last call; not-a-number where no step had a finite value."""
        means = {name: total / count if count else math.nan for name, (total, count) in self.sums.items()}
        self.sums = {}
        return means

    def skip(self, step: int) -> bool:
        """Note that an update of `step` was skipped; returns whether that makes a burst."""
        self.skipped += 1
        self.recent = [*(before for before in self.recent if before > step - RECENT), step]
        return len(self.recent) >= OF_RECENT or self.recent[-IN_A_ROW:] == list(range(step - IN_A_ROW + 1, step + 1))

    def rolled_back(self, kept: "Progress", step: int) -> "Progress":
        """The progress after a roll-back to a checkpoint of `step` whose progress was `kept`: at a lower rate."""
        return Progress(
            sums=kept.sums,
            skipped=self.skipped,
            rollbacks=self.rollbacks + 1,
            rolled_back_to=step,
            lr_scale=self.lr_scale * LR_FACTOR,
        )

    def to_json(self) -> dict[str, Any]:
        """Its fields as plain JSON."""
        return asdict(self)
