"""Probabilistic PCA: the note's anchors, exact posterior and evidence, gaps by EM, scores as scikit-learn's."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from linear_latent import as_task, make_linear
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.model_selection import train_test_split

from hsivi_cli.engine.checkpoint import load_checkpoint, save_checkpoint
from hsivi_cli.engine.seeds import Stream, generator
from hsivi_cli.errors import InputError
from hsivi_cli.methods import pca_map
from hsivi_cli.targets.latent import LatentTask, ModelConfig, build_model

PROBLEM = make_linear(rows=80, columns=5, seed=3)


def fitted(rows, **options):
    return pca_map.init(replace(as_task(PROBLEM), rows=rows), pca_map.Config(**options))


def draw(state, x, k, seed=0):
    return pca_map.posterior(state).draw(x, k, generator(seed, Stream.DRAW))


@pytest.mark.parametrize(("k", "train", "test"), [(2, 0.090, -0.437), (5, 8.964, 8.505), (10, 17.587, 16.627)])
def test_digits_have_the_likelihoods_of_the_note(k, train, test):
    digits = load_digits()
    parts = train_test_split(digits.data / 16, test_size=360, random_state=0, stratify=digits.target)
    rows, held_out = (torch.from_numpy(part) for part in parts)
    state = fitted(rows, dim=k)
    assert float(pca_map.log_evidence(state, rows).mean()) == pytest.approx(train, abs=2e-3)
    assert float(pca_map.log_evidence(state, held_out).mean()) == pytest.approx(test, abs=2e-3)


@pytest.mark.parametrize("standardise", [False, True])
def test_evidence_and_weights_are_log_p_of_the_model(standardise):
    rows = PROBLEM.x.clone()
    rows[:, 1] *= 7
    state = fitted(rows, standardise=standardise)
    covariance = state.weight @ state.weight.T + torch.diag(state.noise**2)
    expected = torch.distributions.MultivariateNormal(state.mean, covariance).log_prob(rows)
    assert torch.allclose(pca_map.log_evidence(state, rows), expected, atol=1e-10)
    draws = draw(state, rows, 3)
    assert torch.allclose(draws.log_weight, expected.expand(3, -1), atol=1e-10)
    # Bayes: log p(x, z) - log q(z | x) is log p(x) at any z, q Gaussian of the moments that `_solve` gives
    mean, covariance, _ = pca_map._solve(state, rows)
    log_q = torch.distributions.MultivariateNormal(mean, covariance).log_prob(draws.z)
    assert torch.allclose(state.model.log_joint(rows, draws.z) - log_q, expected.expand(3, -1), atol=1e-9)


def test_draws_have_the_moments_they_are_said_to_have():
    state = fitted(PROBLEM.x)
    draws = draw(state, PROBLEM.x[:6], 20_000)
    error = draws.sd / math.sqrt(20_000)
    assert bool(((draws.z.mean(0) - draws.mean).abs() < 4.5 * error).all())
    assert torch.allclose(draws.z.std(0), draws.sd, rtol=0.03)


def test_no_other_linear_model_of_that_size_explains_the_rows_better():
    state = fitted(PROBLEM.x)
    best = float(pca_map.log_evidence(state, PROBLEM.x).mean())
    noise = torch.Generator().manual_seed(0)
    for name in ("weight", "mean", "noise"):
        value = getattr(state, name)
        moved = replace(state, **{name: value * (1 + 0.05 * torch.randn(value.shape, generator=noise).double())})
        if name == "noise":
            moved = replace(state, noise=value * 1.1)
        assert float(pca_map.log_evidence(moved, PROBLEM.x).mean()) < best


def test_with_gaps_rows_are_judged_by_what_is_there_and_em_climbs():
    rows = PROBLEM.x.clone()
    rows[torch.rand(rows.shape, generator=torch.Generator().manual_seed(1)) < 0.25] = math.nan
    rows[rows.isnan().all(1), 0] = 0.0
    state = fitted(rows)
    row = int(rows.isnan().any(1).nonzero()[0])
    there = ~rows[row].isnan()
    weight, sd = state.weight[there], state.noise[there]
    marginal = torch.distributions.MultivariateNormal(state.mean[there], weight @ weight.T + torch.diag(sd**2))
    expected = float(marginal.log_prob(rows[row][there]))
    assert float(pca_map.log_evidence(state, rows)[row]) == pytest.approx(expected, abs=1e-10)
    seen = [pca_map.step(state, None, torch.Generator())["elbo"] for _ in range(60)]
    assert all(later > earlier - 1e-10 for earlier, later in itertools.pairwise(seen))
    assert seen[-1] > seen[0] + 0.05
    assert seen[-1] - seen[-2] < 1e-3


def test_em_stays_at_the_closed_form_where_only_one_entry_is_missing():
    rows = PROBLEM.x.clone()
    state = fitted(rows)
    gappy = rows.clone()
    gappy[0, 0] = math.nan
    state.task = replace(state.task, rows=gappy)
    before = state.weight @ state.weight.T
    pca_map.step(state, None, torch.Generator())
    assert torch.allclose(state.weight @ state.weight.T, before, atol=0.1)


@pytest.mark.parametrize("columns", [5, 40])
def test_scores_are_principal_components(columns, monkeypatch):
    monkeypatch.setattr(pca_map, "MOST_COLUMNS", 20)  # the wide table goes through products with the rows
    rows = make_linear(rows=60, columns=columns, seed=1).x
    state = fitted(rows)
    expected = PCA(2, svd_solver="full").fit_transform(rows.numpy())
    found = pca_map.principal_scores(state, rows).numpy()
    assert np.allclose(np.abs(found), np.abs(expected), atol=1e-7)


def test_a_density_is_not_compared_with_probabilities_of_whole_numbers():
    rows = (PROBLEM.x > 0).float()
    model = build_model(ModelConfig(likelihood="bernoulli", hidden=(4,)), rows)
    state = pca_map.init(LatentTask(rows, model), pca_map.Config())
    assert draw(state, rows, 2).log_weight is None


def test_as_many_components_as_columns_and_constant_columns():
    rows = PROBLEM.x.clone()
    rows[:, 2] = 4.0
    for standardise in (False, True):
        state = fitted(rows, dim=5, standardise=standardise)
        assert bool(torch.isfinite(draw(state, rows, 2).z).all())
        assert bool(torch.isfinite(pca_map.log_evidence(state, rows)).all())


def test_state_goes_to_disk_and_back(tmp_path):
    state = fitted(PROBLEM.x)
    save_checkpoint(tmp_path / "map.safetensors", pca_map.state_dict(state))
    again = fitted(PROBLEM.x + 1)
    pca_map.load_state_dict(again, load_checkpoint(tmp_path / "map.safetensors"))
    assert torch.equal(draw(state, PROBLEM.x, 2).z, draw(again, PROBLEM.x, 2).z)


def test_what_cannot_be_is_refused():
    with pytest.raises(InputError, match="1 to 5"):
        fitted(PROBLEM.x, dim=6)


def test_a_row_without_a_number_has_the_prior():
    rows = PROBLEM.x.clone()
    rows[4] = math.nan
    found = draw(fitted(rows), rows, 1)
    assert torch.allclose(found.mean[4], torch.zeros(1).double())
    assert torch.allclose(found.sd[4], torch.ones(1).double())
    assert bool(found.log_weight.isfinite().all())
