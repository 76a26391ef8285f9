"""Clusters of latents: placed where the rows' own are, scored by their source, resumed bit for bit; label accuracy."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from hsivi_cli.engine import loop
from hsivi_cli.errors import InterruptError
from hsivi_cli.io.rows import Rows
from hsivi_cli.methods.latent_fit import latents_of, place_clusters, prepare, train, typical_draw
from hsivi_cli.methods.latent_registry import LatentOptions
from hsivi_cli.methods.latent_scores import KMEANS, MIXTURE, PRIOR, score_map
from hsivi_cli.targets.latent_priors import make_prior


def blobs(count=240, known=None, seed=0):
    """Four groups of rows far apart, `known` of them with a label."""
    rng = np.random.default_rng(seed)
    kind = rng.integers(0, 4, count)
    centre = np.array([[2, 0, 0, 1], [-2, 0, 1, 0], [0, 2, -1, 0], [0, -2, 0, -1]], np.float32)
    names = np.array(list("abcd"))[kind].astype(object)
    few = names.copy()
    if known is not None:
        few[known:] = None
    values = (centre[kind] + 0.3 * rng.normal(size=(count, 4))).astype(np.float32)
    return Rows(values, tuple("wxyz"), pd.DataFrame({"kind": names, "few": few}), source="blobs.csv")


def quiet(record):
    pass


def fit(name, directory, known=None, **options):
    settings = LatentOptions(**({"method": name, "color_by": "kind", "hold_out": 0.25} | options))
    prepared = prepare(blobs(known=known), settings)
    trained = train(prepared, name, settings, directory, quiet, False)
    latents = latents_of(trained.posterior, trained.model, prepared.test, 0, 1)
    return trained, prepared, score_map(trained, prepared, latents, 0)


def test_clusters_are_placed_on_the_rows_own(tmp_path):
    trained, _, (scores, clusters) = fit("vae", tmp_path, clusters=4, steps=150, lr=5e-3)
    assert bool(trained.model.prior.placed)
    assert list(clusters) == [PRIOR, KMEANS, MIXTURE]
    assert min(found.nmi for found in clusters.values()) > 0.9
    assert scores["20-NN"] > 0.95
    assert float(trained.model.prior.log_scale.detach().exp().max()) < 0.9


def test_placing_fits_the_clusters_to_draws(tmp_path):
    """Right after placing the prior is as dense at the rows' latents as the normal one that they were made for."""
    trained, prepared, _ = fit("vae", tmp_path, clusters=4, steps=1)
    latents = latents_of(trained.posterior, trained.model, prepared.values, 0, 1)
    prior = trained.model.prior
    gain = prior.log_prob(latents.draws[0]) - make_prior("normal", 2).log_prob(latents.draws[0])
    assert float(gain.mean().detach()) > -0.02

    class Stub:
        def draw(self, x, k, generator, weigh):
            return SimpleNamespace(z=10 * x[None, :, :2])

    rows = torch.randn(200, 2, generator=torch.Generator().manual_seed(1)).sign() + 0.01 * torch.randn(200, 2)
    place_clusters(prior, Stub(), rows, 0)
    torch.testing.assert_close(prior.heads.detach().abs(), torch.full((4, 2), 10.0), atol=0.1, rtol=0)
    assert float(prior.log_scale.detach().exp().max()) < 0.2


def test_a_typical_draw_is_one_of_the_larger_mode_and_near_the_mean_of_a_single_one():
    one = torch.randn(400, 3, 2, generator=torch.Generator().manual_seed(0))
    assert float(typical_draw(one).norm(dim=1).max()) < 0.3
    two = 0.1 * one
    two[:150, :, 0] += 10
    assert float(typical_draw(two).norm(dim=1).max()) < 0.3
    assert float(two.mean(0)[:, 0].min()) > 3


@pytest.mark.parametrize("name", ["ddvi", "aae", "iaf"])
def test_every_method_can_have_clusters(name, tmp_path):
    trained, _, (_, clusters) = fit(name, tmp_path, clusters=3, steps=4)
    assert bool(trained.model.prior.placed)
    assert PRIOR in clusters


def test_without_a_prior_of_clusters_there_are_as_many_as_classes(tmp_path):
    _, _, (_, clusters) = fit("pca", tmp_path, noise="shared")
    assert list(clusters) == [KMEANS, MIXTURE]
    assert clusters[KMEANS].nmi > 0.9


def test_a_run_stopped_before_or_after_the_clusters_are_placed_goes_on_the_same(tmp_path, monkeypatch):
    settings = LatentOptions("ddvi", clusters=3, steps=8)
    prepared = prepare(blobs(), settings)

    def parameters(folder, resume):
        return list(train(prepared, "ddvi", settings, tmp_path / folder, quiet, resume).model.state_dict().values())

    for folder in ("whole", "2", "3", "6"):
        (tmp_path / folder).mkdir()
    whole = parameters("whole", False)
    original = loop.run_loop
    for last in (2, 3, 6):  # clusters are placed after step 3

        def stopping(method, state, config, directory, hooks, last=last):
            cut = min(config.steps, last)
            stopped = original(method, state, loop.LoopConfig(cut, config.seed), directory, hooks)
            if cut == last:
                raise InterruptError("stopped")
            return stopped

        monkeypatch.setattr(loop, "run_loop", stopping)
        with pytest.raises(InterruptError):
            parameters(str(last), False)
        monkeypatch.setattr(loop, "run_loop", original)
        for ours, theirs in zip(parameters(str(last), True), whole, strict=True):
            assert torch.equal(ours, theirs)


def test_with_labels_clusters_are_classes_from_the_start_and_accuracy_is_told(tmp_path):
    trained, prepared, (scores, _) = fit("ddvi", tmp_path, known=60, labels="few", steps=90, lr=5e-3)
    assert bool(trained.model.prior.placed)
    assert prepared.names == prepared.label_names
    assert scores["label accuracy"] > 0.9
    _, _, (plain, _) = fit("vae", tmp_path, known=60, labels="few", steps=2)
    assert "label accuracy" not in plain
