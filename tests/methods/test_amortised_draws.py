"""Draws for many observations: independent of one another, corrected where the encoder is off, refused if lost."""

import math
from dataclasses import replace

import pytest
import torch
from conjugate import NORMAL, SD, conjugate_target

from hsivi_cli.methods import amortised_draws
from hsivi_cli.methods.amortised_draws import Evidence, draw_rows, names_of, sampled_evidence
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
    assert left_alone.verdict.level != "trust"  # k-hat says that weights would mend them, and nothing has
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


class OneMode:
    """A posterior of x = |z| + 0.3 e, z ~ N(0, 3), that has settled on z > 0: its weights are as even as can be."""

    noise_dim = dim = 1

    def sample(self, noise, x):
        return x[:, None] + 0.3 * noise

    def log_prob(self, z, x, precise=False):
        return NORMAL(x[:, None], 0.3).log_prob(z).sum(-1)


class BothModes(OneMode):
    """The whole posterior: its sign is one more number."""

    noise_dim = 2

    def sample(self, noise, x):
        return (x[:, None] + 0.3 * noise[..., :1]) * noise[..., 1:].sign()

    def log_prob(self, z, x, precise=False):
        return NORMAL(x[:, None], 0.3).log_prob(z.abs()).sum(-1) - math.log(2)


def bimodal(x):
    target = conjugate_target(x)
    return replace(
        target,
        dim=1,
        log_prior=lambda z: NORMAL(0.0, 3.0).log_prob(z).sum(-1),
        log_likelihood=lambda z, x: NORMAL(z.abs(), 0.3).log_prob(x[:, None]).sum(-1),
        sample_prior=lambda n, g: 3 * torch.randn(n, 1, generator=g, dtype=torch.float64),
    )


X = torch.tensor([[2.0], [3.0], [4.5]], dtype=torch.float64)


def test_a_mode_that_the_encoder_never_visits_is_found_by_samplers():
    for row, x in zip(draw_rows(OneMode(), X, 2000, 0, lambda z: {"z": z}, bimodal(X)), X, strict=True):
        assert row.route == "smc"
        assert row.khat < 0.5  # which weights cannot see
        assert float((row.values > 0).double().mean()) == pytest.approx(0.5, abs=0.1)
        assert float(row.values.abs().mean()) == pytest.approx(float(x), abs=0.1)  # the row's own posterior
    for row in draw_rows(OneMode(), X, 2000, 0, lambda z: {"z": z}, bimodal(X), "none"):
        assert row.route == "encoder"
        assert row.verdict.level == "no"
    for refine in ("auto", "none"):
        rows = draw_rows(BothModes(), X, 2000, 0, lambda z: {"z": z}, bimodal(X), refine)
        assert {row.route for row in rows} == {"weights" if refine == "auto" else "encoder"}
        assert {row.verdict.level for row in rows} == {"trust"}


def test_the_seed_names_the_draws_of_every_route():
    one, same, other = (draw_rows(OneMode(), X, 100, seed, lambda z: {"z": z}, bimodal(X)) for seed in (0, 0, 1))
    for row, again, different in zip(one, same, other, strict=True):
        assert torch.equal(row.values, again.values)
        assert not torch.equal(row.values, different.values)
    # same observation twice: other draws of the same posterior
    twice = draw_rows(OneMode(), X[[0, 0]], 100, 0, lambda z: {"z": z}, bimodal(X))
    assert not torch.equal(twice[0].values, twice[1].values)


def test_evidence_of_samplers_is_right_and_knows_its_error():
    found = sampled_evidence(conjugate_target(OBSERVED), OBSERVED, 0)
    assert bool(((found.log_z - LOG_Z).abs() < 4 * found.se).all())
    assert bool((found.se < 0.1).all())
    assert sampled_evidence(conjugate_target(OBSERVED, sample_prior=None), OBSERVED, 0) is None


def test_evidence_beyond_doubt_counts_and_noise_does_not(prior_encoder, monkeypatch):
    def routes(surplus, se):
        found = Evidence(LOG_Z + torch.tensor([0.0, surplus, 0.0]), torch.full((3,), se, dtype=torch.float64))
        monkeypatch.setattr(amortised_draws, "sampled_evidence", lambda *args: found)
        return [row.route for row in drawn(prior_encoder)]

    assert routes(0.0, 0.0) == ["weights"] * 3
    assert routes(1.0, 0.1) == ["weights", "smc", "weights"]
    assert routes(1.0, 0.5) == ["weights"] * 3  # unsure
    assert routes(0.4, 0.0) == ["weights", "smc", "weights"]
    # samplers that do not confirm what was found before are not to be trusted either
    assert "was found" in drawn(prior_encoder)[1].verdict.line
    assert drawn(prior_encoder)[1].verdict.level == "care"


def test_the_summary_and_its_ess_are_of_all_draws_that_were_made(prior_encoder):
    (row,) = drawn(prior_encoder, FAR, n=50)
    assert row.values.shape == (50, 2)
    assert row.ess <= 2000
    assert torch.allclose(row.mean, 0.8 * FAR[0], atol=5 * SD / math.sqrt(2000) + 0.02)
    assert not torch.equal(row.mean, row.values.mean(0))


def test_a_row_that_nothing_explains_leaves_the_others_alone(prior_encoder):
    right = conjugate_target(OBSERVED)

    def likelihood(z, x):
        return torch.where((x == OBSERVED[1]).all(1)[:, None], -math.inf, right.log_likelihood(z, x))

    rows = drawn(prior_encoder, target=replace(right, log_likelihood=likelihood))
    assert [row.verdict.level for row in rows] == ["trust", "no", "trust"]
    assert "explains" in rows[1].verdict.line


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
