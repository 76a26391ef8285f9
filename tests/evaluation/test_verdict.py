import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hsivi_cli.evaluation.calibration import judge_ranks
from hsivi_cli.evaluation.predictive_check import check_predictive
from hsivi_cli.evaluation.verdict import Moves, Weights, judge, khat_limit

GOOD = Weights(0.2, 3500.0)
ORDER = ("trust", "care", "no")
ARRIVED = Moves(ess=2000.0, rhat=1.004, acceptance=0.8, memory=0.03)


def predictive(shift):
    y = torch.randn(100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def simulate(z, g):
        return shift + torch.randn(len(z), 100, generator=g, dtype=torch.float64)

    return check_predictive(torch.zeros(500, 1), y, simulate, torch.Generator().manual_seed(1))


def calibration(right, refits=100):
    ranks = np.random.default_rng(0).integers(0, 100 if right else 60, (refits, 2))
    return judge_ranks(["alpha", "beta"], ranks, 99)


def test_good_weights_earn_trust():
    verdict = judge(4000, GOOD)
    assert verdict.level == "trust"
    assert verdict.line == "trust: k-hat 0.20; 3500 effective draws of 4000"


@pytest.mark.parametrize(
    ("khat", "ess", "level"),
    [
        (0.49, 400, "trust"),
        (-0.3, 4000, "trust"),
        (0.51, 4000, "care"),
        (0.69, 4000, "care"),
        (0.71, 4000, "no"),
        (math.inf, 4000, "no"),
        (math.nan, 4000, "no"),
        (0.2, 399, "care"),
        (0.2, 19, "no"),
        (0.2, math.nan, "no"),
    ],
)
def test_levels_of_weights(khat, ess, level):
    assert judge(4000, Weights(khat, ess)).level == level


def test_the_limit_is_lower_for_few_draws():
    assert khat_limit(10**6) == 0.7
    assert khat_limit(100) == pytest.approx(0.5)
    assert khat_limit(5) == 0
    assert judge(100, Weights(0.6, 90)).level == "no"
    assert "too few draws" in judge(50, Weights(math.inf, 40)).line


@given(
    khat=st.floats(-1, 2),
    worse=st.floats(0, 1),
    ess=st.floats(1, 4000),
    fewer=st.floats(0, 1),
    broken=st.integers(0, 100),
)
def test_worse_evidence_never_earns_a_better_level(khat, worse, ess, fewer, broken):
    before = judge(4000, Weights(khat, ess))
    after = judge(4000, Weights(khat + worse, ess * fewer), non_finite=broken)
    assert ORDER.index(after.level) >= ORDER.index(before.level)
    assert after.reasons
    assert "\n" not in after.line


def test_resampling_from_more_draws_counts_for_the_limit_and_not_for_the_ess():
    verdict = judge(200, Weights(0.55, 9000.0, drawn=20_000))
    assert verdict.level == "care"  # 200 draws alone could not tell
    assert "between 0.5 and 0.70" in verdict.line
    assert "200 effective draws of 200" in verdict.line
    assert judge(200, Weights(0.6, 90.0)).level == "no"


def test_a_bad_khat_says_what_to_do_next_once():
    verdict = judge(4000, Weights(1.3, 5.0))
    assert verdict.line == (
        "do not use: k-hat 1.30 is above 0.70: the fit is too far from the posterior to be corrected, add --refine smc"
    )


def test_nothing_checked_is_never_trusted():
    verdict = judge(4000)
    assert verdict.level == "care"
    assert "--refine" in verdict.line
    assert judge(4000, predictive=predictive(0.0), calibration=calibration(True)).level == "care"


def test_an_estimated_density_is_never_trusted_by_its_weights_alone():
    assert judge(4000, Weights(0.2, 3500, approximate=True)).level == "care"
    assert judge(4000, Weights(0.9, 3500, approximate=True)).level == "no"
    assert judge(4000, Weights(0.2, 3500, approximate=True), ARRIVED).level == "trust"


def test_moves_that_arrived_replace_bad_weights_and_good_weights_need_no_moves():
    assert judge(4000, Weights(1.3, 5), ARRIVED).level == "trust"
    assert judge(4000, None, ARRIVED).level == "trust"
    stuck = Moves(ess=2000.0, rhat=1.2, acceptance=0.01, memory=0.9)
    assert judge(4000, Weights(1.3, 5), stuck).level == "no"
    assert judge(4000, GOOD, stuck).level == "trust"


@pytest.mark.parametrize(
    ("moves", "level"),
    [
        (Moves(rhat=1.03), "care"),
        (Moves(rhat=1.2), "no"),
        (Moves(memory=0.2), "care"),
        (Moves(memory=0.5), "no"),
        (Moves(memory=0.05, acceptance=0.1), "care"),
        (Moves(memory=0.05, acceptance=0.01), "no"),
        (Moves(memory=0.05, acceptance=0.9), "trust"),
        (Moves(rhat=1.0, ess=50.0), "care"),
        (Moves(ess=4000.0, acceptance=0.9), "care"),  # high acceptance alone is no arrival
        (Moves(rhat=math.nan), "no"),
        (Moves(rhat=1.03, noise=0.03), "trust"),
        (Moves(rhat=1.2, noise=0.03), "no"),
    ],
)
def test_levels_of_moves(moves, level):
    assert judge(4000, None, moves).level == level


def test_a_correlation_that_chance_leaves_between_few_chains_is_none():
    few = Moves(ess=2000.0, rhat=1.0, acceptance=0.8, memory=0.12, chains=1000)
    assert judge(4000, None, few).level == "trust"
    assert judge(4000, None, replace(few, chains=4000)).level == "care"
    assert judge(4000, None, replace(few, memory=0.6)).level != "trust"


def test_predictive_extremes_blame_the_model_only_where_the_fit_is_supported():
    assert judge(4000, GOOD, predictive=predictive(0.0)).level == "trust"
    supported = judge(4000, GOOD, predictive=predictive(1.0))
    assert supported.level == "care"
    assert "the model does not reproduce the observed mean (p = 1" in supported.line
    assert judge(4000, predictive=predictive(1.0)).level == "no"
    assert "the fit, or the model, does not" in judge(4000, Weights(2.0, 3), predictive=predictive(1.0)).line


def test_calibration():
    assert "calibrated in 100 simulated" in judge(4000, GOOD, calibration=calibration(True)).line
    assert "too few" in judge(4000, GOOD, calibration=calibration(True, 20)).line
    assert "too few" not in judge(4000, GOOD, calibration=calibration(True)).line
    failed = judge(4000, GOOD, calibration=calibration(False))
    assert failed.level == "care"
    assert "alpha" in failed.line
    assert judge(4000, calibration=calibration(False)).level == "no"


def test_draws_that_are_no_numbers():
    assert judge(4000, GOOD, non_finite=1).level == "care"
    assert judge(4000, GOOD, non_finite=41).level == "no"
    assert "41 of 4000 draws are not finite" in judge(4000, GOOD, non_finite=41).line
