"""DDVI with classes: semi-supervised rows, and the heads of clusters.

The classes of the prior, p(z) = sum_k p(k) p(z | k), are classes of rows. The posterior is q(k | x) q(y_{0:T} | x, k):
one network whose first layer is told the class. With L_k the bound (1) under p(z | k),

    log p(x) >= sum_k q(k | x) [L_k(x) + log p(k) - log q(k | x)]    and    log p(x, k) >= L_k(x) + log p(k),

for rows without and with a label: M2 of Kingma et al. (2014) around DDVI, where the public code weighs losses by
q(k | x) but keeps the whole prior's density, and penalises the entropy of q(k | x) instead of rewarding it.
"""

import math
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from hsivi_cli.errors import InputError
from hsivi_cli.networks.reverse_diffusion import Encoded
from hsivi_cli.objectives.ddvi_bound import pathwise_bound, per_step_bound
from hsivi_cli.targets.latent import LatentTask
from hsivi_cli.transitions.reverse_chain import Chain

if TYPE_CHECKING:
    from hsivi_cli.methods.ddvi import State

HEADS_APART, HEADS_WITHIN, WITHIN_WEIGHT = 1.5, 2.5, 100.0
MOST_PAIRS = 10_000


def check_labels(task: LatentTask) -> int:
    """The number of classes. Raises InputError where labels and the prior's classes do not fit."""
    labels, classes = task.labels, task.model.prior.classes
    assert labels is not None
    if classes < 2:
        raise InputError(
            "--labels needs a prior with a part for each class: pinwheel, square, swiss-roll, mixture, or --clusters"
        )
    if labels.shape != (len(task.rows),):
        raise InputError(f"{len(labels)} labels for {len(task.rows)} rows: one a row is needed, -1 where it is unknown")
    if int(labels.max()) >= classes:
        raise InputError(f"the labels have {int(labels.max()) + 1} classes, but the prior has {classes} parts")
    if int(labels.max()) < 0:
        raise InputError("--labels: no row has a label")
    return classes


def class_log_weights(prior: Any) -> Float[Tensor, " classes"]:
    """`log p(k)`: learned by cluster priors, equal for the others."""
    found = getattr(prior, "log_weights", None)
    return torch.full((prior.classes,), -math.log(prior.classes)) if found is None else found


def wake(
    state: "State", rows: Float[Tensor, "n D"], labels: Tensor | None, generator: torch.Generator
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """The mean bound over rows with and without labels, and the mean cross entropy of the labels that are known.

    Rows without a label run a chain a class, those with one a chain of that class.
    """
    encoder, classes, n = state.encoder, state.encoder.classes, len(rows)
    encoded = encoder.encode(rows)
    assert encoded.logits is not None
    log_q = encoded.logits.log_softmax(1)
    if labels is None:
        labels = torch.full((n,), -1)
    needed = torch.where((labels >= 0)[:, None], one_hot(labels.clamp_min(0), classes), 1)
    row, k = needed.nonzero(as_tuple=True)
    bound = _class_bound(state, rows, encoded, row, k, generator)
    known = labels[row] >= 0
    share = log_q[row, k]
    each = torch.where(known, bound, share.exp() * (bound - share))
    marked = labels >= 0
    penalty = cross_entropy(encoded.logits[marked], labels[marked]) if bool(marked.any()) else log_q.new_zeros(())
    return each.sum() / n, penalty


@torch.no_grad()
def draw(
    state: "State", rows: Float[Tensor, "n D"], k: int, generator: torch.Generator, weigh: bool = True
) -> tuple[Float[Tensor, "k n d"], Float[Tensor, "k n"] | None]:
    """k draws a row, the class of each from q(k | x), and their exact log weights, the class an auxiliary variable."""
    encoder, n = state.encoder, len(rows)
    encoded = encoder.encode(rows)
    assert encoded.logits is not None
    log_q = encoded.logits.log_softmax(1)
    chosen = torch.multinomial(log_q.exp(), k, replacement=True, generator=generator).T.reshape(-1)
    row = torch.arange(n).repeat(k)
    chain = _chain(state, encoded, row, chosen, generator)
    if not weigh:
        return chain.z.view(k, n, -1), None
    log_joint = _log_joint(state, rows[row], chain.z, chosen).double()
    log_weight = pathwise_bound(log_joint, chain, state.noise) - log_q[row, chosen]
    return chain.z.view(k, n, -1), log_weight.view(k, n)


def most_likely(state: "State", encoded: Encoded) -> Encoded:
    """The same rows, each given the class that q(k | x) prefers."""
    assert encoded.logits is not None
    context = state.encoder.reverse.with_class(encoded.context, encoded.logits.argmax(1))
    return Encoded(encoded.start_mean, encoded.start_log_sd, context)


@torch.no_grad()
def class_probabilities(state: "State", rows: Float[Tensor, "n D"]) -> Float[Tensor, "n classes"]:
    """q(k | x), for labels of rows that have none."""
    logits = state.encoder.encode(rows).logits
    assert logits is not None
    return logits.softmax(1)


def assign(prior: Any, z: Float[Tensor, "*n d"]) -> Float[Tensor, "*n classes"]:
    """`p(k | z)`, the share of each class of the prior in a latent: its argmax is the cluster."""
    return (prior.log_prob_class(z) + class_log_weights(prior).to(z)).softmax(-1)


def head_spread(prior: Any) -> Float[Tensor, ""]:
    """The public code's penalty of cluster heads: closer than 1.5 to each other, or beyond +-2.5 in a coordinate."""
    heads = prior.heads
    pairs = torch.combinations(torch.arange(len(heads)))[:MOST_PAIRS]
    apart = ((heads[pairs[:, 0]] - heads[pairs[:, 1]]).square().sum(1) + 1e-6).sqrt()
    beyond = (heads - HEADS_WITHIN).clamp_min(0).mean() + (-heads - HEADS_WITHIN).clamp_min(0).mean()
    return (HEADS_APART - apart).clamp_min(0).mean() + WITHIN_WEIGHT * beyond


def _chain(state: "State", encoded: Encoded, row: Tensor, k: Tensor, generator: torch.Generator) -> Chain:
    encoder = state.encoder
    context = encoder.reverse.with_class(encoded.context[row], k)
    shape = (state.noise.times + 1, len(row), encoder.dim)
    noise = torch.randn(shape, generator=generator, dtype=context.dtype)
    return encoder.run(Encoded(encoded.start_mean[row], encoded.start_log_sd[row], context), noise)


def _log_joint(state: "State", rows: Tensor, z: Tensor, k: Tensor) -> Tensor:
    prior = state.model.prior
    log_prior = prior.log_prob_class(z).gather(-1, k[:, None])[:, 0] + class_log_weights(prior)[k]
    return state.model.log_likelihood(rows, z) + log_prior


def _class_bound(
    state: "State", rows: Tensor, encoded: Encoded, row: Tensor, k: Tensor, generator: torch.Generator
) -> Tensor:
    chain = _chain(state, encoded, row, k, generator)
    form = pathwise_bound if state.config.estimator == "a" else per_step_bound
    return form(_log_joint(state, rows[row], chain.z, k), chain, state.noise)
