"""DDVI with classes and clusters: exact bounds, labels that spread, heads that learn."""

import math
from dataclasses import replace

import pytest
import torch
from ddvi_parts import LOG_2PI, SMALL, digits_like, gradients, linear_model, seeded, shaken

from hsivi_cli.methods import ddvi, ddvi_classes
from hsivi_cli.targets.latent import LatentTask, ModelConfig, build_model
from hsivi_cli.targets.latent_priors import ClusterPrior, make_prior


def test_cluster_heads_learn_awake_and_keep_apart():
    task = digits_like(clusters=4)
    state = shaken(ddvi.init(task, replace(SMALL, spread=1.0)))
    _, loss = ddvi.wake_loss(state, task.rows, None, seeded())
    heads = gradients(loss, task.model.prior)
    assert float(heads["heads"].abs().max()) > 0
    asleep = ddvi.asleep_loss(state, 16, seeded())
    assert all(gradient is None for gradient in gradients(asleep, task.model.prior).values())
    prior = ClusterPrior(2, 2)
    with torch.no_grad():
        prior.heads.copy_(torch.tensor([[0.0, 0.0], [0.5, 0.0]]))
    assert float(ddvi_classes.head_spread(prior).detach()) == pytest.approx(1.0, abs=1e-5)
    with torch.no_grad():
        prior.heads.copy_(torch.tensor([[3.0, 0.0], [0.0, 0.0]]))
    assert float(ddvi_classes.head_spread(prior).detach()) == pytest.approx(100 * 0.5 / 4, rel=1e-5)


def test_a_latent_belongs_to_the_cluster_that_explains_it():
    prior = ClusterPrior(2, 1, base=0.5)
    with torch.no_grad():
        prior.heads.copy_(torch.tensor([[0.0], [1.0]]))
        prior.logits.copy_(torch.tensor([0.0, math.log(3.0)]))
    share = ddvi_classes.assign(prior, torch.tensor([[0.5], [-5.0], [5.0]])).detach()
    assert torch.allclose(share[0], torch.tensor([0.25, 0.75]))
    assert share.argmax(1).tolist() == [1, 0, 1]
    petals = ddvi_classes.assign(make_prior("mixture", 2), torch.zeros(2, 2))
    assert torch.allclose(petals, torch.full((2, 10), 0.1), atol=1e-6)


def test_labels_are_learned_from_few():
    """Two classes of rows, four of 400 rows labelled."""
    rows = torch.cat([torch.full((200, 1), -1.0), torch.full((200, 1), 1.0)]) + 0.3 * torch.randn(
        400, 3, generator=seeded(13)
    )
    labels = torch.full((400,), -1)
    labels[[0, 1, 200, 201]] = torch.tensor([1, 1, 0, 0])
    model = build_model(ModelConfig(clusters=2, hidden=(8,)), rows)
    config = replace(SMALL, steps=100, batch=64, lr=5e-3)
    state, generator = ddvi.init(LatentTask(rows, model, labels), config), seeded(14)
    for _ in range(config.steps):
        ddvi.step(state, None, generator)
    guess = ddvi_classes.class_probabilities(state, rows).argmax(1)
    assert float((guess == (torch.arange(400) < 200).long()).float().mean()) > 0.95


@pytest.mark.parametrize("labelled", [False, True])
def test_weights_of_any_posterior_are_unbiased(labelled):
    """p(x) of three clusters on a line is a mixture of Gaussians, whatever the posterior is."""
    prior = ClusterPrior(3, 1, seeded(6), base=0.5).double()
    with torch.no_grad():
        prior.logits.copy_(torch.tensor([0.0, 1.0, -0.5]))
    model = linear_model(prior, (0.8,), 1.5)
    x = torch.tensor([[0.4], [-1.5]], dtype=torch.float64)
    labels = torch.tensor([0, -1]) if labelled else None
    state = shaken(ddvi.init(LatentTask(x, model, labels), SMALL), 0.03)
    sd = (0.64 * prior.log_scale.exp() ** 2 + 2.25).sqrt()
    parts = -0.5 * ((x - 0.8 * prior.heads[:, 0]) / sd) ** 2 - sd.log() - 0.5 * LOG_2PI + prior.log_weights
    truth = parts.logsumexp(1).detach()
    draws = ddvi.posterior(state).draw(x, 40_000, seeded(7))
    weight = (draws.log_weight - truth).exp()
    error = 5 * weight.std(0) / math.sqrt(40_000)
    assert ((weight.mean(0) - 1).abs() < error).all()
    assert float(error.max()) < 0.1
    elbo = draws.log_weight.mean(0)
    assert (elbo < truth - 0.003).all()
    assert draws.z.shape == (40_000, 2, 1)
    assert torch.allclose(draws.mean, draws.z.mean(0))
    if not labelled:
        return
    # the bound that is learned from has the same mean, and with a label it is one of log p(x, k)
    unknown = torch.full((4000,), -1)
    with torch.no_grad():
        bound, penalty = ddvi_classes.wake(state, x[1:].expand(4000, 1), unknown, seeded(8))
        known, entropy = ddvi_classes.wake(state, x[:1].expand(4000, 1), torch.full((4000,), 1), seeded(8))
    assert float(bound) == pytest.approx(float(elbo[1]), abs=0.05)
    assert float(penalty) == 0
    assert float(known) < float(parts[0, 1].detach())
    share = ddvi_classes.class_probabilities(state, x)
    assert float(entropy) == pytest.approx(-float(share[0, 1].log()), rel=1e-6)
