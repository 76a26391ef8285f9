"""L-BFGS from many points at once: scipy's optimiser for each, their evaluations made together in one batch.

A model in plain torch costs as much for one draw as for twenty, so climbs in step cost what the longest of them costs.
"""

import math
import threading
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hsivi_cli.targets.density import Density

ITERATIONS = 200
ENTRIES = 20_000_000  # responses times points in one evaluation

Fall = Callable[[np.ndarray], tuple[float, np.ndarray]]


def ascend(density: Density, starts: Float[Tensor, "m d"]) -> Float[Tensor, "m d"]:
    """The highest points that L-BFGS passes from each of `starts`.

    Raises whatever the density raises.
    """
    together = _Together(density, len(starts))
    best = [_Best(start) for start in starts]
    threads = []
    for i, start in enumerate(starts.numpy()):
        climb = threading.Thread(target=together.run, args=(i, start, best[i]), daemon=True)
        climb.start()
        threads.append(climb)
    together.serve()
    for climb in threads:
        climb.join()
    return torch.stack([one.z for one in best])


class _Best:
    """The highest point of one climb so far."""

    def __init__(self, z: Tensor) -> None:
        self.z, self.value = z, math.inf


class _Together:
    """Threads ask for the value and gradient at a point each; once all that still climb have asked, one batch answers.

    The batches do not depend on the threads' timing, so results do not either.
    """

    def __init__(self, density: Density, climbs: int) -> None:
        self.density, self.climbing = density, climbs
        self.asked: dict[int, np.ndarray] = {}
        self.answers: dict[int, tuple[float, np.ndarray]] = {}
        self.stopped = False
        self.changed = threading.Condition()

    def run(self, i: int, start: np.ndarray, best: _Best) -> None:
        """One climb, in its own thread."""
        import scipy.optimize

        def fall(x: np.ndarray) -> tuple[float, np.ndarray]:
            value, gradient = self.ask(i, x.copy())
            if not (math.isfinite(value) and np.isfinite(gradient).all()):
                return 1e100, np.zeros_like(x)
            if -value < best.value:
                best.value, best.z = -value, torch.from_numpy(x.copy())
            return -value, -gradient

        options = {"maxiter": ITERATIONS, "maxfun": 3 * ITERATIONS, "maxcor": 20, "gtol": 1e-7, "ftol": 1e-13}
        try:
            scipy.optimize.minimize(fall, start, jac=True, method="L-BFGS-B", options=options)
        except _Stopped:
            pass
        finally:
            with self.changed:
                self.climbing -= 1
                self.changed.notify_all()

    def ask(self, i: int, z: np.ndarray) -> tuple[float, np.ndarray]:
        """Value and gradient at one point, when the batch that it is part of has been evaluated."""
        with self.changed:
            self.asked[i] = z
            self.changed.notify_all()
            self.changed.wait_for(lambda: i in self.answers or self.stopped)
            if self.stopped:
                raise _Stopped
            return self.answers.pop(i)

    def serve(self) -> None:
        """Answer until every climb has ended; the caller's thread alone evaluates the density."""
        try:
            while True:
                with self.changed:
                    self.changed.wait_for(lambda: len(self.asked) == self.climbing)
                    if not self.climbing:
                        return
                    order = sorted(self.asked)
                    z = torch.from_numpy(np.stack([self.asked.pop(i) for i in order]))
                value, gradient = _evaluate(self.density, z)
                with self.changed:
                    self.answers = {i: (float(v), g.numpy()) for i, v, g in zip(order, value, gradient, strict=True)}
                    self.changed.notify_all()
        finally:  # an error or Ctrl-C must not leave climbs that wait for ever
            with self.changed:
                self.stopped = True
                self.changed.notify_all()


class _Stopped(Exception):
    """Ends a climb whose evaluations will not come."""


def _evaluate(density: Density, z: Float[Tensor, "m d"]) -> tuple[Float[Tensor, " m"], Float[Tensor, "m d"]]:
    rows = max(1, ENTRIES // (density.responses + density.dim))
    with torch.no_grad():
        pieces = [density.value_and_gradient(part) for part in z.split(rows)]
    return torch.cat([value for value, _ in pieces]).double(), torch.cat([slope for _, slope in pieces]).double()
