"""Can a classifier tell two samples apart? The test of the simulation-based inference benchmark.

C2ST (Lopez-Paz and Oquab, ICLR 2017) as Lueckmann, Boelts, Greenberg, Goncalves and Macke (AISTATS 2021) have it, so
that figures can be compared: the accuracy of scikit-learn's MLP with two ReLU layers of 10 d units and Adam, on
held-out data, mean of five folds, both samples standardised by mean and standard deviation of the first. 0.5 is the
best there is, 1 means no overlap.
"""

import math
import warnings
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from hsivi_cli.errors import InputError

FOLDS, UNITS, EPOCHS = 5, 10, 1000


@dataclass(frozen=True)
class TwoSample:
    """`accuracy` on held-out draws, its standard error over so many draws, and the accuracy in each fold."""

    accuracy: float
    se: float
    folds: tuple[float, ...]


def classifier_accuracy(
    reference: Float[np.ndarray, "n d"], sample: Float[np.ndarray, "m d"], seed: int = 1
) -> TwoSample:
    """C2ST of `sample` against `reference`, rows are draws; give as many of either, or 0.5 is not chance.

    The error is binomial: it knows nothing of the luck of training. Takes about a minute on one core for 10,000 draws
    each in two dimensions. Raises InputError for samples that cannot be compared.
    """
    x, y = np.asarray(reference, np.float64), np.asarray(sample, np.float64)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or x.shape[1] == 0:
        raise InputError(f"samples of shapes {x.shape} and {y.shape} cannot be compared: (n, d) and (m, d) are wanted")
    if min(len(x), len(y)) < FOLDS:
        raise InputError(f"samples of {len(x)} and {len(y)} draws: {FOLDS} each at least are needed")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise InputError("a sample holds values that are not finite")
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.model_selection import KFold, cross_val_score
    from sklearn.neural_network import MLPClassifier

    spread = x.std(0, ddof=1)
    spread[spread == 0] = 1.0
    features = (np.concatenate([x, y]) - x.mean(0)) / spread
    labels = np.repeat([0, 1], [len(x), len(y)])
    units = UNITS * x.shape[1]
    classifier = MLPClassifier((units, units), activation="relu", solver="adam", max_iter=EPOCHS, random_state=seed)
    folds = KFold(FOLDS, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # 1000 epochs are the benchmark's, enough or not
        found = cross_val_score(classifier, features, labels, cv=folds, scoring="accuracy")
    accuracy = float(found.mean())
    se = math.sqrt(max(accuracy * (1 - accuracy), 0.0) / len(labels))
    return TwoSample(accuracy, se, tuple(float(fold) for fold in found))
