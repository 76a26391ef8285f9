"""The verdict on many observations: a few poor ones lower it, many forbid; the encoder alone is judged apart."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from hsivi_cli.evaluation.amortised_calibration import calibrate_draws, coverage_curve, density_ranks
from hsivi_cli.evaluation.verdict import Verdict, Weights, judge
from hsivi_cli.methods.amortised_draws import RowDraws
from hsivi_cli.methods.amortised_report import outside, report_on_rows
from hsivi_cli.targets.encoder_check import EncoderCheck

N = 40


def row(khat, route="weights", verdict=None):
    values = torch.linspace(0, 1, N, dtype=torch.float64)[:, None]
    verdict = verdict or judge(2000, Weights(khat, 1500.0))
    return RowDraws(route, values, values[:, 0], values[:, 0], values[0], values[-1], khat, 1500.0, -1.0, 0.1, verdict)


def check(narrow=1.0):
    """An encoder of standard normals whose draws are `narrow` times as wide as they should be."""
    generator = torch.Generator().manual_seed(0)
    truths = torch.randn(300, 1, generator=generator, dtype=torch.float64)
    samples = narrow * torch.randn(300, 99, 1, generator=generator, dtype=torch.float64)
    log_q = (-(truths[:, 0] ** 2), -(samples[:, :, 0] ** 2))
    sbc = calibrate_draws(["z"], truths, samples, log_q, generator)
    return EncoderCheck(sbc, coverage_curve(density_ranks(*log_q, generator), 99), 0)


def report(rows, found=None, **options):
    return report_on_rows("smc-wake", ("z",), rows, found, **options)


@pytest.mark.parametrize(
    ("khats", "level"),
    [
        ([0.2] * 40, "trust"),
        ([0.2] * 39 + [0.6], "trust"),  # k-hat is noisy: one of forty in between is nothing
        ([0.2] * 36 + [0.6] * 4, "care"),
        ([0.2] * 39 + [1.2], "care"),
        ([0.2] * 36 + [1.2] * 4, "no"),
        ([1.2], "no"),
    ],
)
def test_few_poor_rows_lower_the_verdict_and_many_forbid(khats, level):
    verdict = report([row(khat) for khat in khats]).verdict
    assert verdict.level == level
    if level != "trust":
        first = next(i for i, khat in enumerate(khats) if khat > 0.5) + 1
        assert str(first) in verdict.line


def test_tempered_rows_count_by_their_own_verdict():
    good = row(1.5, "smc", Verdict("trust", ("R-hat 1.00",), "trust: R-hat 1.00"))
    found = report([row(0.3), good])
    assert found.verdict.level == "trust"
    assert "1 by tempered SMC" in found.verdict.line


def test_the_encoder_alone_is_judged_apart_where_its_draws_are_corrected():
    narrow, right = check(0.6), check(1.0)
    corrected = report([row(0.2)] * 3, narrow)
    assert corrected.verdict.level == "trust"
    assert "not calibrated" in corrected.encoder
    assert "overconfident" in corrected.encoder
    alone = report([row(0.2, "encoder")] * 3, narrow)
    assert alone.verdict.level == "care"
    assert report([row(0.2, "encoder")] * 3, right).verdict.level == "trust"
    assert report([row(0.2, "encoder")] * 3, inherited=("of the fit", False)).verdict.level == "care"
    assert report([row(0.2, "encoder")] * 3, inherited=("of the fit", True)).verdict.level == "trust"
    assert (report([row(0.2)], narrow).to_json()["calibrated"], report([row(0.2)]).calibrated) == (False, None)
    assert "calibrated in 300" in report([row(0.2)], right).encoder


def test_unchecked_draws_are_never_trusted():
    values = torch.zeros(N, 1, dtype=torch.float64)
    unchecked = RowDraws("encoder", values, values[:, 0], values[:, 0], values[0], values[0])
    assert report([unchecked] * 2, inherited=("as the fit said", None)).verdict.level == "care"
    assert report([unchecked], inherited=("as the fit said", None)).encoder == "as the fit said"


def test_json_is_plain_and_numbers_observations_from_one():
    found = report([row(0.2), row(0.9)], check(), beyond=torch.tensor([0.0, 2.5]))
    fields = json.loads(json.dumps(found.to_json()))
    assert [one["observation"] for one in fields["observations"]] == [1, 2]
    assert fields["observations"][1]["beyond"] == 2.5
    assert fields["observations"][0]["parameters"]["z"]["q5"] == pytest.approx(0.05)
    assert set(fields["sbc"]["coverage"]) == {"0.5", "0.8", "0.9", "0.95"}
    assert np.isfinite(list(fields["sbc"]["p_values"].values())).all()


def test_json_has_no_numbers_that_are_not_finite():
    fields = report([row(math.inf), row(math.nan)]).to_json()
    assert [one["khat"] for one in fields["observations"]] == [None, None]
    json.dumps(fields, allow_nan=False)


def test_observations_outside_of_the_range_are_named_and_unchecked_ones_far_out_are_not_to_be_used():
    beyond = torch.tensor([0.0, 0.4, 7.0])
    assert "2 of 3 observations (3, 2)" in outside(beyond)
    assert "7 standard deviations" in outside(beyond)
    unchecked = replace(row(0.2, "encoder"), verdict=None)
    assert report([unchecked] * 3, beyond=beyond, inherited=("", None)).verdict.level == "no"
    assert report([unchecked] * 3, beyond=beyond.clamp_max(0.5), inherited=("", None)).verdict.level == "care"
