"""What a map of latents is worth against the classes of its rows, and latents against a thin prior."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hsivi_cli.engine.seeds import Stream, generator
from hsivi_cli.evaluation.latent_metrics import (
    RUN_BANDWIDTHS,
    ClusterScores,
    cluster_scores,
    kmeans_clusters,
    knn_accuracy,
    latent_nll,
    mixture_clusters,
)
from hsivi_cli.methods.latent_fit import Latents, Prepared, Trained, latents_of
from hsivi_cli.methods.latent_registry import MANY_MODES, THIN
from hsivi_cli.targets.latent_priors import ClusterPrior

MOST_SCORED, MOST_CLASSES, PRIOR_DRAWS = 5000, 100, 5000
"""Rows trained on that a map is scored with, classes scored, points of an NLL."""
PRIOR, KMEANS, MIXTURE = "prior", "k-means", "mixture"
"""Where clusters come from: parts of the prior, or of the latents by k-means or a Gaussian mixture (the study's)."""
KMEANS_STARTS, CIRCLE = 5, 2.0


def score_map(
    trained: Trained, prepared: Prepared, latents: Latents, seed: int
) -> tuple[dict[str, float], dict[str, ClusterScores]]:
    """Scores of the map: latent NLL where the prior is thin; where there are classes k-NN accuracy, that of q(k | x)
    where labels were learned from, and clusters by their source.

    `latents` are those of the first test rows, a draw each. There are as many clusters as the prior has, or else as
    classes. They are of the rows trained on and held out; where a method has seen labels, of the latter alone.
    """
    scores: dict[str, float] = {}
    thin, classes = prepared.model.prior in THIN and not prepared.model.clusters, len(prepared.names)
    classified = prepared.colors is not None and 2 <= classes <= min(MOST_CLASSES, len(prepared.rows) // 5)
    if not thin and not classified:
        return scores, {}
    train = min(prepared.train, MOST_SCORED)
    seen = latents_of(trained.posterior, trained.model, prepared.values[:train], seed + 1, 1)
    assert seen.draws is not None
    assert latents.draws is not None
    if thin:
        points = trained.model.prior.sample(PRIOR_DRAWS, generator(seed, Stream.SIMULATE, 2))
        scores["latent NLL"] = latent_nll(torch.cat([seen.draws[0], latents.draws[0]]), points, RUN_BANDWIDTHS)
    if not classified or prepared.colors is None:
        return scores, {}
    first = prepared.train if prepared.train < len(prepared.rows) else 0
    truth = prepared.colors[first : first + len(latents.mean)]
    before, place = (map_points(trained.name, part) for part in (seen, latents))
    if first and bool((truth >= 0).any()) and bool((prepared.colors[:train] >= 0).any()):
        scores["20-NN"] = knn_accuracy(before, prepared.colors[:train], place, truth)
    scores |= _label_accuracy(trained, prepared, first, len(latents.mean))
    cluster = latents.cluster
    if first and prepared.labels is None:
        place, truth = torch.cat([before, place]), torch.cat([prepared.colors[:train], truth])
        if cluster is not None and seen.cluster is not None:
            cluster = torch.cat([seen.cluster, cluster])
    if not bool((truth >= 0).any()):
        return scores, {}
    return scores, _clusters(place, truth, cluster, prepared.model.clusters or classes, seed)


def map_points(name: str, latents: Latents) -> Float[Tensor, "n d"]:
    """Where rows lie on the map: their means, or a typical draw of each where posteriors may have several modes."""
    return latents.typical if name in MANY_MODES and latents.typical is not None else latents.mean


def cluster_circles(prior: Any) -> Float[np.ndarray, "K 3"] | None:
    """Centre and radius, of two standard deviations, of each cluster in two latents; None for another prior."""
    if not isinstance(prior, ClusterPrior) or prior.dim != 2 or not prior.placed:
        return None
    found = torch.cat([prior.heads, CIRCLE * prior.log_scale.exp()[:, None]], 1)
    return found.detach().double().cpu().numpy()


def _clusters(
    place: Float[Tensor, "n d"], truth: Int[Tensor, " n"], own: Int[Tensor, " n"] | None, count: int, seed: int
) -> dict[str, ClusterScores]:
    found = {} if own is None else {PRIOR: cluster_scores(truth, own)}
    if count > len(place):
        return found
    found[KMEANS] = cluster_scores(truth, kmeans_clusters(place, count, KMEANS_STARTS))
    found[MIXTURE] = cluster_scores(truth, mixture_clusters(place, count))
    return found


def _label_accuracy(trained: Trained, prepared: Prepared, first: int, count: int) -> dict[str, float]:
    """How often q(k | x) names the class of rows held out: by the column of colours where it has the same classes."""
    posterior = trained.posterior
    if not first or prepared.labels is None or getattr(posterior, "classify", None) is None:
        return {}
    same = prepared.colors is not None and prepared.names == prepared.label_names
    codes = prepared.colors if same and prepared.colors is not None else prepared.labels
    truth = codes[first : first + count]
    known = truth >= 0
    if not bool(known.any()):
        return {}
    guess = posterior.classify(prepared.values[first : first + count]).argmax(1).cpu()
    return {"label accuracy": float((guess == truth)[known].double().mean())}
