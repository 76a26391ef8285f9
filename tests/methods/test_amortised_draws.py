"""Draws for many observations: independent of one another, corrected where the encoder is off, refused if lost."""

import math
from dataclasses import replace

import pytest
import torch
from conjugate import NORMAL, SD, conjugate_target

from hsivi_cli.methods.amortised_draws import draw_rows, names_of
from hsivi_cli.networks.posterior_encoder import EncoderConfig, build_encoder

OBSERVED = torch.tensor([[1.0, -0.5], [0.3, 0.2], [-0.8, 0.6]], dtype=torch.float64)
FAR = torch.tensor([[9.0, 9.0]], dtype=torch.float64)  # prior draws, which this encoder gives, are useless there
LOG_Z = NORMAL(0.0, math.sqrt(1.25)).log_prob(OBSERVED).sum(1)


@pytest.fixture(scope="module")
def prior_encoder():
    """An encoder that ignores the data: untrained, it is the prior."""
    encoder = build_encoder(EncoderConfig(family="gaussian", hidden=(4,)), 2, (2,))
    z = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    encoder.fit_scales(z, z)
    return encoder


def drawn(encoder, x=OBSERVED, n=2000, target="conjugate", **options):
    target = conjugate_target(x) if target == "conjugate" else target
    return draw_rows(encoder, x, n, 7, lambda z: {"z": z}, target, **options)


def test_weights_turn_the_prior_into_the_posterior(prior_encoder):
    for row, x, log_z in zip(drawn(prior_encoder), OBSERVED, LOG_Z, strict=True):
        assert row.route == "weights"
        assert row.verdict.level == "trust"
        assert row.log_z == pytest.approx(float(log_z), abs=4 * row.log_z_se)
        for mean in (row.mean, row.values.mean(0)):
            assert torch.allclose(mean, 0.8 * x, atol=5 * SD / math.sqrt(row.ess))
        for sd in (row.sd, row.values.std(0)):
            assert torch.allclose(sd, torch.full((2,), SD).double(), rtol=0.15)
    left_alone = drawn(prior_encoder, refine="none")[0]
    assert left_alone.route == "encoder"
    assert torch.allclose(left_alone.mean, torch.zeros(2).double(), atol=0.1)  # the prior's, not 0.8 x


def test_a_row_knows_nothing_of_the_others(prior_encoder):
    whole = drawn(prior_encoder, n=300)
    for count in (1, 2):
        part = drawn(prior_encoder, OBSERVED[:count], n=300)
        for one, other in zip(part, whole[:count], strict=True):
            assert torch.equal(one.values, other.values)
            assert one.khat == other.khat


def test_blocks_do_not_matter(prior_encoder, monkeypatch):
    whole = drawn(prior_encoder, n=300)
    monkeypatch.setattr("hsivi_cli.methods.amortised_draws.BLOCK", 1)
    for one, other in zip(drawn(prior_encoder, n=300), whole, strict=True):
        assert torch.allclose(one.values, other.values, rtol=1e-12, atol=1e-12)


def test_where_weights_fail_samplers_step_in(prior_encoder):
    (row,) = drawn(prior_encoder, FAR, n=1000)
    assert row.route == "smc"
    assert row.khat > 0.7
    assert row.verdict.level == "trust"
    assert torch.allclose(row.mean, 0.8 * FAR[0], atol=0.1)
    assert torch.allclose(row.sd, torch.full((2,), SD).double(), rtol=0.15)
    assert row.log_z == pytest.approx(float(NORMAL(0.0, math.sqrt(1.25)).log_prob(FAR).sum()), abs=5 * row.log_z_se)
    (left_alone,) = drawn(prior_encoder, FAR, refine="none")
    assert left_alone.verdict.level == "no"


def test_evidence_that_samplers_found_and_the_draws_lack_calls_for_samplers(prior_encoder):
    enough, more = LOG_Z.clone(), LOG_Z + torch.tensor([0.0, 1.0, 0.0])
    assert [row.route for row in drawn(prior_encoder, least_log_z=enough)] == ["weights"] * 3
    assert [row.route for row in drawn(prior_encoder, least_log_z=more)] == ["weights", "smc", "weights"]


def test_without_the_model_draws_are_unchecked(prior_encoder):
    for row in drawn(prior_encoder, n=50, target=None):
        assert row.route == "encoder"
        assert row.verdict is None
        assert row.values.shape == (50, 2)
        assert bool(row.log_prob.isnan().all())
        assert bool(row.log_approx.isfinite().all())
        assert math.isnan(row.khat)


def test_draws_that_are_all_impossible_are_not_to_be_used(prior_encoder):
    target = replace(
        conjugate_target(OBSERVED), log_likelihood=lambda z, x: torch.full(z.shape[:2], -math.inf, dtype=torch.float64)
    )
    for row in drawn(prior_encoder, n=50, target=target, refine="none"):
        assert row.verdict.level == "no"
        assert row.log_z == -math.inf


def test_names_are_stans():
    assert names_of(lambda z: {"z": z, "total": z.sum(1)}, 2) == ["z[1]", "z[2]", "total"]
