"""Improper posteriors are refused and weak data are named; proper ones pass."""

import numpy as np
import pandas as pd
import pytest

from hsivi_cli.errors import InputError
from hsivi_cli.targets.regression import regression_density
from hsivi_cli.targets.regression_checks import separating_direction

RNG = np.random.default_rng(0)
N = 100
F = pd.DataFrame({"x": RNG.normal(size=N), "w": RNG.normal(size=N)})
F["y"] = F["x"] + RNG.normal(size=N)
F["c"], F["tenth"], F["z"], F["year"] = 5.0, 0.1, 2 * F["x"] - F["w"] + 3, 2000 + np.arange(N) / 10
F["line"] = 1 + 2 * F["x"]
F["split"] = (F["x"] > 0) * 1
F["almost"] = np.where(F["w"] > 0, 1, (F["x"] > 0) * 1)
F["up"] = (F["w"] > 0) * 1
F["count"] = np.where(F["x"] > 0, RNG.poisson(3, N) + 1, 0)
F["side"] = np.where(F["x"] > 0, "u", "v")
F["ones"], F["zeros"] = 1, 0
FLAT = ["b=flat", "Intercept=flat"]


def open_(formula, family, priors=(), frame=F):
    return regression_density(frame, formula, family, priors)


@pytest.mark.parametrize(
    ("formula", "family", "priors", "words"),
    [
        ("y ~ x + c", "gaussian", [], 'predictor "c" is the same in every row'),
        ("y ~ x + tenth", "gaussian", [], 'predictor "tenth" is the same in every row'),
        ("y ~ x + c", "gaussian", FLAT, 'predictor "c" is the same in every row'),
        ("y ~ x + tenth", "gaussian", FLAT, 'predictor "tenth" is the same in every row'),
        ("y ~ x + w + z", "gaussian", FLAT, '"z" is a linear combination of x, w, so with flat priors'),
        ("split ~ x", "bernoulli", FLAT, "x separate the outcomes"),
        ("almost ~ up + w", "bernoulli", ["b=flat"], "separate the outcomes"),
        ("split ~ side", "bernoulli", FLAT, r"side\[v\] separate"),
        ("ones ~ x", "bernoulli", FLAT, "all rows have the same outcome"),
        ("zeros ~ x", "poisson", FLAT, "all rows have the same outcome"),
        ("count ~ side", "poisson", FLAT, r"side\[v\] single out rows whose counts are all 0"),
        ("count ~ side + w", "negative-binomial", FLAT, r"side\[v\]"),
        ("ones ~ x", "gaussian", [], "is 1 in every row"),
        ("line ~ x", "gaussian", [], "without error"),
        ("line ~ x + w", "student-t", FLAT, "without error"),
        ("y ~ x", "student-t", ["nu=flat"], "flat prior on nu"),
        ("y ~ (1 | side)", "gaussian", ["sd=flat"], "2 groups"),
    ],
)
def test_refusals(formula, family, priors, words):
    with pytest.raises(InputError, match=words) as caught:
        open_(formula, family, priors)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("formula", "family", "priors", "words"),
    [
        ("y ~ x + tenth", "gaussian", ["tenth=normal(0, 1)"], "tenth is the same in every row"),
        ("y ~ x + w + z", "gaussian", [], '"z" is a linear combination of x, w'),
        ("y ~ x + w + z", "gaussian", ["b=flat", "z=normal(0, 1)"], "linear combination"),
        ("split ~ x", "bernoulli", [], "the priors' doing"),
        ("ones ~ x", "bernoulli", [], "all rows have the same outcome"),
    ],
)
def test_proper_priors_pass_with_a_word(formula, family, priors, words):
    assert any(words in fact for fact in open_(formula, family, priors).facts)


@pytest.mark.parametrize(
    ("formula", "family", "priors"),
    [
        ("y ~ x + year", "gaussian", FLAT),
        ("y ~ year + I(year ** 2)", "gaussian", FLAT),
        ("split ~ w", "bernoulli", FLAT),
        ("almost ~ x", "bernoulli", FLAT),
        ("count ~ x + w", "poisson", FLAT),
        ("line ~ x", "gaussian", ["sigma=lognormal(0, 1)"]),
        ("y ~ 0 + c", "gaussian", FLAT[:1]),
    ],
)
def test_sound_data_pass_in_silence(formula, family, priors):
    facts = open_(formula, family, priors).facts
    assert not any("prior" in fact and not fact.startswith("prior ") for fact in facts), facts


def test_rows_against_flat_coefficients():
    with pytest.raises(InputError, match="2 rows cannot determine 3 coefficients"):
        open_("y ~ x + w", "gaussian", FLAT, F[:2])
    open_("y ~ x + w", "gaussian", FLAT, F[:3])  # sigma has a proper prior
    with pytest.raises(InputError, match="leave a flat sigma undetermined"):
        open_("y ~ x + w", "gaussian", [*FLAT, "sigma=flat"], F[:4])
    open_("y ~ x + w", "gaussian", [*FLAT, "sigma=flat"], F[:5])
    with pytest.raises(InputError, match="one row"):
        open_("y ~ x", "gaussian", [], F[:1])
    assert any("2 rows for 3 coefficients" in fact for fact in open_("y ~ x + w", "gaussian", [], F[:2]).facts)


@pytest.mark.parametrize("rows", [60, 30_000])
def test_the_linear_programme_against_a_construction(rows):
    X = np.random.default_rng(1).normal(size=(rows, 4))
    hidden = X @ np.array([1.0, -2.0, 0.5, 3.0])
    X, hidden = X[np.abs(hidden) > 0.05], hidden[np.abs(hidden) > 0.05]
    sides = np.sign(hidden)
    direction = separating_direction(X, sides)
    assert direction is not None
    length = np.sqrt((X**2).mean(0))
    assert (sides * (X @ (direction / length)) >= -1e-6).all()
    i, j = (sides * hidden).argsort()[-2:]
    sides[i] = -sides[i]  # one row deep on the wrong side is enough
    assert separating_direction(X, sides) is None
    del j
