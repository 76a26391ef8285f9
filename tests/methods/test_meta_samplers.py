"""The store of SMC runs: what is kept, for how long, within which bound; its minibatches; and that it resumes."""

import math
from dataclasses import replace

import pytest
import torch

from hsivi_cli.engine.checkpoint import load_checkpoint, save_checkpoint
from hsivi_cli.errors import InputError
from hsivi_cli.methods.meta_samplers import (
    StoreConfig,
    advance,
    append,
    begin,
    estimator_loss,
    forget,
    load_state_dict,
    make_store,
    minibatch,
    state_dict,
)
from hsivi_cli.transitions.likelihood_smc import SmcConfig, freeze, run_smc
from hsivi_cli.transitions.particle_moves import given_observations

ESTIMATORS = ("a", "b", "c", "naive", "pimh")
X = torch.tensor([-1.0, 0.5, 3.0, 0.0], dtype=torch.float64)
EVERYONE = torch.arange(4)
SMC = SmcConfig(particles=12, kernel="random-walk", moves=1, order="A", schedule=(1.0,))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def target(x=X):
    """z ~ N(0, 1), x | z ~ N(z, 0.5^2)."""
    return given_observations(
        1,
        lambda n, g: torch.randn(n, 1, generator=g, dtype=torch.float64),
        lambda z: -0.5 * z.square().sum(-1),
        lambda z, x: -0.5 * ((z[..., 0] - x[:, None]) / 0.5).square(),
        x,
    )


def filled(estimator, runs=6, **fields):
    store = make_store(StoreConfig(estimator=estimator, **fields), 4, SMC.particles, 1)
    done = []
    for step in range(runs):
        run = run_smc(target(), 4, SMC, seeded(step))
        append(store, EVERYONE, run, step, seeded(100 + step))
        done.append(run)
    return store, done


def log_q(z):
    return -0.5 * (z[..., 0].double() - 0.3) ** 2


def test_all_particles_are_kept_and_weighted_by_evidence():
    store, runs = filled("a")
    batch = minibatch(store, EVERYONE)
    assert batch.z.dtype == torch.float32
    for m, run in enumerate(runs):
        torch.testing.assert_close(batch.z[:, m], run.z.float())
        torch.testing.assert_close(batch.log_weight[:, m].exp(), run.log_weight.exp(), rtol=0, atol=1e-14)
        assert torch.equal(batch.log_z[:, m], run.log_z)
    share = torch.stack([run.log_z for run in runs], 1).softmax(1)
    expected = sum(share[:, m] * (run.log_weight.exp() * log_q(run.z.float())).sum(1) for m, run in enumerate(runs))
    torch.testing.assert_close(estimator_loss("a", log_q(batch.z), batch), -expected.mean())
    # rows come as asked for, with repetition
    some = minibatch(store, torch.tensor([2, 2, 0]))
    assert torch.equal(some.z, batch.z[torch.tensor([2, 2, 0])])


def test_retained_draws_are_the_runs_own_in_proportion_to_their_weights():
    store, runs = filled("b", retained=400)
    batch = minibatch(store, EVERYONE)
    assert batch.z.shape[:3] == (4, 6, 400)
    mean = (runs[3].log_weight.exp() * runs[3].z[..., 0]).sum(1)
    assert float((batch.z[:, 3, :, 0].mean(1) - mean).abs().max()) < 0.02
    assert all(value in runs[3].z[1].float() for value in batch.z[1, 3].flatten())
    assert store.edges is None


def test_the_newest_run_and_the_mean_evidence():
    store, runs = filled("c")
    batch = minibatch(store, EVERYONE)
    torch.testing.assert_close(batch.z[:, 0], runs[-1].z.float())
    assert torch.equal(batch.log_z[:, 0], runs[-1].log_z)
    evidences = torch.stack([run.log_z for run in runs], 1).exp()
    torch.testing.assert_close(batch.log_mean_z.exp(), evidences.mean(1))
    expected = (evidences[:, -1] / evidences.mean(1)) * (runs[-1].log_weight.exp() * log_q(batch.z[:, 0])).sum(1)
    torch.testing.assert_close(estimator_loss("c", log_q(batch.z), batch), -expected.mean())
    naive = minibatch(filled("naive")[0], EVERYONE)
    torch.testing.assert_close(naive.z, batch.z)
    torch.testing.assert_close(naive.log_weight, batch.log_weight)


def test_pimh_keeps_what_it_accepted():
    store, runs = filled("pimh", runs=40)
    batch = minibatch(store, EVERYONE)
    rate = store.accepted.double() / store.written
    assert bool((rate > 0.1).all())
    assert float(rate.min()) < 0.9
    for i in range(4):  # the state is one of the runs, and the born step says which
        run = runs[int(store.born[i, 0])]
        torch.testing.assert_close(batch.z[i, 0], run.z[i].float())
        assert store.log_z[i, 0] == run.log_z[i]
    # a run without evidence is never taken
    before = store.z.clone()
    dead = replace(runs[0], log_z=torch.full((4,), -math.inf).double())
    append(store, EVERYONE, dead, 99, seeded())
    assert torch.equal(store.z, before)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_draws_are_on_average_the_whole_store(estimator):
    store, _ = filled(estimator)
    rows = EVERYONE.repeat_interleave(3000)
    whole, drawn = minibatch(store, EVERYONE), minibatch(store, rows, seeded(), draws=4)
    assert drawn.z.shape == (12_000, 1, 4, 1)

    def weighted(batch):
        share = torch.where(batch.log_z.isfinite(), batch.log_z, -math.inf).softmax(1)[..., None]
        return (share * batch.log_weight.exp() * batch.z[..., 0]).sum((1, 2))

    found = weighted(drawn).reshape(4, 3000)
    error = (found.mean(1) - weighted(whole)).abs() / (found.std(1) / math.sqrt(3000))
    assert float(error.max()) < 4.5
    if estimator == "c":
        assert torch.equal(drawn.log_z[::3000], whole.log_z)
    # with very many they are the store itself
    many = minibatch(store, EVERYONE, seeded(), draws=20_000)
    torch.testing.assert_close(weighted(many), weighted(whole), rtol=0, atol=1e-3)
    loss, expected = (estimator_loss(estimator, log_q(batch.z), batch) for batch in (many, whole))
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("estimator", ["a", "b", "c"])
def test_memory_is_bounded_and_the_oldest_makes_room(estimator):
    bound = 2000 if estimator == "c" else 3000
    store, runs = filled(estimator, runs=30, memory=bound, retained=5)
    assert store.bytes <= bound
    assert 3 < store.slots_most < 30
    assert int(store.written.min()) == 30
    newest = {int(step) for step in store.born[0]}
    assert newest == set(range(30 - store.slots_most, 30))
    if estimator == "a":
        batch = minibatch(store, EVERYONE)
        for slot in range(store.slots_most):
            torch.testing.assert_close(batch.z[:, slot], runs[int(store.born[0, slot])].z.float())
    with pytest.raises(InputError, match="fewer particles"):
        make_store(StoreConfig(estimator=estimator, memory=200), 4, 1000, 1)


def test_growth_is_uneven_where_refreshes_are():
    store, _ = filled("a", runs=1)
    for step in range(1, 6):
        append(store, torch.tensor([1]), run_smc(target(X[1:2]), 1, SMC, seeded(step)), step, seeded())
    assert store.written.tolist() == [1, 6, 1, 1]
    batch = minibatch(store, EVERYONE)
    assert (batch.log_z > -math.inf).sum(1).tolist() == [1, 6, 1, 1]
    assert bool(estimator_loss("a", log_q(batch.z), batch).isfinite())


@pytest.mark.parametrize("estimator", ["a", "b", "c"])
def test_old_runs_are_forgotten_but_never_the_newest(estimator):
    store, runs = filled(estimator, window=2)
    forget(store, 6)
    assert sorted(store.born[0][store.born[0] >= 0].tolist()) == [4, 5]
    mean = minibatch(store, EVERYONE).log_mean_z.exp()
    torch.testing.assert_close(mean, torch.stack([run.log_z for run in runs[4:]]).exp().mean(0))
    forget(store, 1000)
    assert store.born[0][store.born[0] >= 0].tolist() == [5]
    batch = minibatch(store, EVERYONE)
    torch.testing.assert_close(batch.log_z.logsumexp(1), runs[5].log_z)
    empty = make_store(StoreConfig(estimator=estimator, window=2), 4, 12, 1)
    forget(empty, 10)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("draws", [None, 7])
def test_an_observation_without_evidence_is_not_trained_on(estimator, draws):
    store, runs = filled(estimator, runs=2)
    dead = [replace(run, log_z=torch.where(EVERYONE == 1, -math.inf, run.log_z)) for run in runs]
    fresh = make_store(store.config, 4, SMC.particles, 1)
    for step, run in enumerate(dead):
        append(fresh, EVERYONE, run, step, seeded(100 + step))
    batch = minibatch(fresh, EVERYONE, seeded(), draws)
    found = log_q(batch.z).requires_grad_(True)
    (slope,) = torch.autograd.grad(estimator_loss(estimator, found, batch), found)
    assert bool(slope.isfinite().all())
    assert float(slope[1].abs().sum()) == 0
    assert float(slope[0].abs().sum()) > 0


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_training_resumes_bit_for_bit(estimator, tmp_path):
    config = StoreConfig(estimator=estimator, refresh_every=2, refresh_count=2, window=15)
    smc = SmcConfig(particles=12, moves=1)

    def fresh():
        return make_store(config, 4, smc.particles, 1)

    def train(store, first, last):
        for step in range(first, last):
            advance(store, target(), smc, step, seeded(1000 + step))

    store = fresh()
    begin(store, target(), smc, seeded(), runs=2)
    train(store, 1, 10)
    save_checkpoint(tmp_path / "store.safetensors", state_dict(store))
    resumed = fresh()
    load_state_dict(resumed, load_checkpoint(tmp_path / "store.safetensors"))
    train(store, 10, 20)
    train(resumed, 10, 20)
    assert int(store.written.sum()) == 4 * 2 + 9 * 2
    for name, value in state_dict(store).items():
        assert torch.equal(value, state_dict(resumed)[name]), name
    one, other = (minibatch(s, EVERYONE, seeded(5), draws=6) for s in (store, resumed))
    assert torch.equal(one.z, other.z)


def test_refreshes_come_when_due_and_with_frozen_settings():
    smc = SmcConfig(particles=20)
    store = make_store(StoreConfig(estimator="a", refresh_every=3, refresh_count=2), 4, 20, 1)
    begin(store, target(), smc, seeded())
    pilot = freeze(run_smc(target(), 4, smc, seeded(1)))
    assert not len(advance(store, target(), smc, 1, seeded(1), pilot))
    rows = advance(store, target(), smc, 3, seeded(3), pilot)
    assert len(rows.unique()) == 2
    assert store.written.sum() == 6
    assert store.written[rows].tolist() == [2, 2]
    fresh = store.z[rows, 1, :, 0].mean(1)  # each row has the posterior of its own observation
    assert float((fresh - 0.8 * X[rows]).abs().max()) < 0.5
    with pytest.raises(ValueError, match="take"):
        advance(store, replace(target(), take=None), smc, 3, seeded(3))
    never = make_store(StoreConfig(refresh_every=0), 4, 20, 1)
    assert not len(advance(never, target(), smc, 3, seeded(3)))


def test_the_store_carries_no_gradients():
    store, _ = filled("a")
    batch = minibatch(store, EVERYONE)
    assert not any(part.requires_grad for part in (batch.z, batch.log_weight, batch.log_z, batch.log_mean_z))
