"""The harness that trains encoders: every method resumes bit for bit, keeps its bounds, and says what it cannot do."""

import math
from dataclasses import replace

import pandas as pd
import pytest
import torch
from conjugate import conjugate_target, sample_prior

from hsivi_cli.engine import loop
from hsivi_cli.engine.checkpoint import load_checkpoint, load_newest, pack, save_checkpoint
from hsivi_cli.engine.seeds import Stream, generator
from hsivi_cli.errors import HsiviError, InputError, RunError
from hsivi_cli.io.run_directory import checkpoints
from hsivi_cli.methods import amortised
from hsivi_cli.methods.amortised import Config
from hsivi_cli.networks.posterior_encoder import EncoderConfig
from hsivi_cli.targets.amortised import load_amortised, simulate_pairs

OBSERVED = torch.randn(5, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
SMALL = Config(
    steps=12,
    lr=0.01,
    batch=3,
    draws=8,
    pairs=8,
    particles=20,
    kernel="random-walk",
    moves=1,
    refresh_every=2,
    refresh_count=2,
    encoder=EncoderConfig(family="gaussian", hidden=(8,)),
)
WAKES = {
    f"{estimator} sleep {sleep}": {"estimator": estimator, "sleep": sleep}
    for estimator in ("a", "b", "c", "naive", "pimh")
    for sleep in (0.0, 0.5)
}
METHODS = WAKES | {
    "smc-wake fixed": {"sleep": 0.5, "simulations": 60, "runs": 3},
    "npe fresh": {"method": "npe"},
    "npe fixed": {"method": "npe", "simulations": 60},
    "wake": {"method": "wake"},
    "defensive-wake": {"method": "defensive-wake"},
    "msc": {"method": "msc"},
}


def sometimes_nan(z, generator):
    x = z + 0.5 * torch.randn(z.shape, generator=generator, dtype=torch.float64)
    return torch.where(z[:, :1] > 1, torch.nan, x)


def trained(config, steps=None, state=None, target=None):
    """The state and the last step's metrics."""
    state = state or amortised.init(conjugate_target(OBSERVED) if target is None else target, config)
    metrics = {}
    for _ in range(config.steps if steps is None else steps):
        metrics = amortised.step(state, None, generator(config.seed, Stream.TRAIN, state.step + 1))
    return state, metrics


def same(one, other):
    """Whether two runs have come to the same, to the last bit."""
    (tensors, structure), (others, other_structure) = (pack(amortised.state_dict(state)) for state in (one, other))
    return structure == other_structure and all(torch.equal(tensors[name], others[name]) for name in tensors)


@pytest.fixture
def short_pools(monkeypatch):
    """Fresh simulations last 5 steps, and there is a look at those held out after every 4."""
    monkeypatch.setattr(amortised, "POOL_STEPS", 5)
    monkeypatch.setattr(amortised, "VALIDATE_EVERY", 4)


@pytest.mark.usefixtures("short_pools")
@pytest.mark.parametrize("fields", METHODS.values(), ids=METHODS)
def test_a_resumed_run_is_the_same_bit_for_bit(fields, tmp_path):
    config, target = replace(SMALL, **fields), conjugate_target(OBSERVED, simulate=sometimes_nan)
    whole, metrics = trained(config, target=target)
    for step in (5, 6, 8):  # before and after fresh simulations, and between; after a refresh, a look, both or neither
        part, _ = trained(config, step, target=target)
        save_checkpoint(tmp_path / "state.safetensors", amortised.state_dict(part))
        again = amortised.init(target, config)
        amortised.load_state_dict(again, load_checkpoint(tmp_path / "state.safetensors"))
        assert same(part, again)
        again, last = trained(config, config.steps - step, again)
        assert last == metrics
        assert same(whole, again)


@pytest.mark.parametrize("fields", METHODS.values(), ids=METHODS)
def test_a_seed_names_a_run(fields):
    config = replace(SMALL, steps=4, **fields)
    first, metrics = trained(config)
    second, _ = trained(config)
    other, other_metrics = trained(replace(config, seed=1))
    assert same(first, second)
    assert not torch.equal(first.optimiser.vector, other.optimiser.vector)
    assert metrics != other_metrics
    start = amortised.init(first.target, config).optimiser.vector
    assert first.optimiser.counts == [4]
    assert not torch.equal(first.optimiser.vector, start)


def test_same_only_is_what_is_the_same():
    one, _ = trained(SMALL, 3)
    for change in ("store.z", "optimiser.mean", "encoder.standardise_x.shift"):
        other, _ = trained(SMALL, 3)
        assert same(one, other)
        holder = other
        *path, last = change.split(".")
        for name in path:
            holder = getattr(holder, name)
        getattr(holder, last).view(-1)[0] += 1e-3
        assert not same(one, other), change


@pytest.mark.parametrize("name", ["a sleep 0.0", "c sleep 0.5", "npe fixed", "wake", "defensive-wake", "msc"])
@pytest.mark.parametrize("observed", [OBSERVED[:1], OBSERVED[:1].expand(4, -1)], ids=["one", "duplicates"])
def test_one_observation_or_equal_ones_in_a_batch_larger_than_their_number(name, observed):
    state, metrics = trained(replace(SMALL, batch=50, steps=4, **METHODS[name]), target=conjugate_target(observed))
    assert state.optimiser.counts == [4]
    assert all(math.isfinite(value) and abs(value) < 100 for value in metrics.values())
    draws = state.encoder.draw(50, torch.Generator().manual_seed(0), observed)
    assert draws.shape == (len(observed), 50, 2)
    assert bool(draws.isfinite().all())


def test_npe_needs_no_observation():
    state, metrics = trained(replace(SMALL, method="npe"), target=conjugate_target(OBSERVED[:0]))
    assert state.optimiser.counts == [12]
    assert metrics.keys() == {"simulated_cross_entropy"}


def gradient_of(sleep, monkeypatch, **fields):
    """That of the first step."""
    monkeypatch.setattr(amortised, "CLIP", math.inf)
    state, _ = trained(replace(SMALL, sleep=sleep, **fields), 1)
    return state.optimiser.mean / 0.1


def test_sleep_is_the_share_of_simulations_in_the_gradient(monkeypatch):
    simulated = gradient_of(0.0, monkeypatch, method="npe")
    quarter, half = (gradient_of(sleep, monkeypatch) for sleep in (0.25, 0.5))
    observed = 2 * half - simulated
    assert not torch.allclose(observed, simulated, rtol=0.5)
    torch.testing.assert_close(quarter, 0.75 * observed + 0.25 * simulated, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(gradient_of(1.0, monkeypatch), simulated, rtol=1e-4, atol=1e-6)


def test_gradients_are_cut_at_their_bound(monkeypatch):
    monkeypatch.setattr(amortised, "CLIP", 0.01)
    state, _ = trained(SMALL, 1)
    assert float(state.optimiser.mean.norm()) == pytest.approx(0.1 * 0.01, rel=1e-4)


def loss_on(simulations, state):
    with torch.no_grad():
        return -float(state.encoder.log_prob(simulations.z[:, None], simulations.x).mean())


def test_few_simulations_end_with_the_encoder_that_does_best_on_those_held_out():
    config = replace(SMALL, method="npe", simulations=60, steps=400, lr=0.05, pairs=54)
    state, _ = trained(config, config.steps - 1)
    before = replace(state, encoder=amortised.init(state.target, config).encoder)
    before.encoder.load_state_dict(state.encoder.state_dict())
    torch.nn.utils.vector_to_parameters(state.average, before.encoder.parameters())
    state, metrics = trained(config, 1, state)
    held_out = replace(state.pool, z=state.pool.z[54:], x=state.pool.x[54:])
    assert len(held_out.z) == 6
    assert loss_on(held_out, state) == pytest.approx(state.best_loss, abs=1e-5)
    assert metrics["held_out"] > state.best_loss + 0.2  # what training to the end would have come to
    assert loss_on(held_out, before) == pytest.approx(metrics["held_out"], abs=1e-2)
    fresh = simulate_pairs(state.target, 4000, torch.Generator().manual_seed(5))
    assert loss_on(fresh, state) < loss_on(fresh, before) - 0.2
    assert torch.equal(state.optimiser.vector, state.best)


def test_the_budget_of_simulations_is_kept_and_fresh_ones_are_counted():
    state, _ = trained(replace(SMALL, method="npe", simulations=60))
    assert (state.simulated, len(state.pool.z)) == (60, 60)
    state, _ = trained(replace(SMALL, method="npe", steps=51))
    assert state.simulated == 2 * amortised.POOL_STEPS * 8
    state, _ = trained(SMALL)
    assert (state.simulated, state.pool) == (0, None)


@pytest.mark.parametrize("fields", [{"method": "npe"}, {"sleep": 0.5}, {"method": "npe", "simulations": 200}])
def test_simulations_that_are_not_finite_are_counted_and_do_not_enter(fields):
    target = conjugate_target(OBSERVED, simulate=sometimes_nan)
    state, metrics = trained(replace(SMALL, **fields), target=target)
    assert len(state.pool.z) == state.simulated - state.lost
    assert state.lost / state.simulated == pytest.approx(0.159, abs=0.08)  # P(z > 1)
    assert float(state.pool.z[:, 0].max()) <= 1
    assert bool(state.pool.x.isfinite().all())
    assert state.optimiser.counts == [12]
    assert all(math.isfinite(value) for value in metrics.values())


def test_simulators_that_lose_everything_or_leave_too_little_are_refused():
    nothing = conjugate_target(OBSERVED, simulate=lambda z, generator: torch.full_like(z, torch.nan))
    for fields in ({"method": "npe"}, {"sleep": 0.5}):
        with pytest.raises(RunError, match=r"conjugate: 400 of 400 simulations are not finite: mend simulate"):
            trained(replace(SMALL, **fields), target=nothing)
    with pytest.raises(InputError, match="12 simulations that are finite: 20 at least"):
        trained(replace(SMALL, method="npe", simulations=12))
    with pytest.raises(InputError, match="20000 simulations take"):
        trained(replace(SMALL, method="npe", simulations=20_000, memory=2**16))


def without_mass(*rows):
    """Those observations (from 0) are impossible."""
    target, impossible = conjugate_target(OBSERVED), OBSERVED[list(rows)]

    def likelihood(z, x):
        never = (x[:, None] == impossible).all(2).any(1)[:, None]
        return torch.where(never, -math.inf, target.log_likelihood(z, x))

    return replace(target, log_likelihood=likelihood)


@pytest.mark.parametrize("fields", WAKES.values(), ids=WAKES)
def test_observations_without_prior_mass_are_refused_by_their_row(fields):
    with pytest.raises(InputError) as caught:
        trained(replace(SMALL, **fields), target=without_mass(1))
    assert "no mass where observation 2 needs it: none of 220 draws" in str(caught.value)
    assert "(1 of 5)" in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"observation 1, 2, 4 \.\.\. needs it.*\(4 of 5\)"):
        trained(replace(SMALL, **fields), target=without_mass(0, 1, 3, 4))
    trained(replace(SMALL, **fields), 1, target=without_mass())


@pytest.mark.parametrize("method", ["wake", "defensive-wake", "msc"])
def test_they_are_refused_where_particles_come_from_the_encoder_too(method):
    with pytest.raises(InputError, match=r"observation 2, 4 needs it: none of 5000 draws.*\(2 of 5\)"):
        trained(replace(SMALL, method=method), 1, target=without_mass(1, 3))
    trained(replace(SMALL, method=method), 1, target=without_mass())


def test_what_the_model_or_the_observations_lack_is_said():
    target = conjugate_target(OBSERVED)
    for fields in METHODS.values():
        with pytest.raises(InputError, match="needs sample_prior"):
            amortised.init(replace(target, sample_prior=None), replace(SMALL, **fields))
    bare = replace(target, simulate=None)
    with pytest.raises(InputError, match="--method npe learns from simulations, and the model has no simulate"):
        amortised.init(bare, replace(SMALL, method="npe"))
    with pytest.raises(InputError, match="--method smc-wake --sleep learns from simulations"):
        amortised.init(bare, replace(SMALL, sleep=0.5))
    for fields in METHODS.values():
        if fields.get("method") == "npe" or fields.get("sleep"):
            continue
        trained(replace(SMALL, **fields), 2, target=bare)
        with pytest.raises(InputError, match="learns from observations, and there are none"):
            amortised.init(replace(target, observed=OBSERVED[:0]), replace(SMALL, **fields))
    for shape in ((3,), (2, 2), (1, 1)):
        with pytest.raises(InputError, match=f"--shape {'x'.join(map(str, shape))} is not that of .* 2 numbers"):
            amortised.init(target, replace(SMALL, shape=shape))
    assert amortised.init(target, replace(SMALL, shape=(2, 1))).encoder.observation_shape == (2, 1)


@pytest.mark.parametrize("estimator", ["a", "b", "c", "naive", "pimh"])
def test_the_store_stays_within_its_memory_while_runs_grow(estimator):
    full = {"a": 5 * 20 * (8 + 8), "b": 5 * 10 * 8, "c": 0, "naive": 0, "pimh": 0}[estimator]  # of one run of each
    memory = 5 * (20 * 16 + 16) + 3 * full + 400
    config = replace(SMALL, estimator=estimator, refresh_every=1, refresh_count=5, memory=memory, steps=40)
    state = amortised.init(conjugate_target(OBSERVED), config)
    sizes = []
    for _ in range(config.steps):
        trained(config, 1, state)
        sizes.append(state.store.bytes)
    assert max(sizes) <= memory
    assert state.store.written.tolist() == [40] * 5  # the first, and one at each step from the second
    if estimator in ("a", "b", "c"):
        assert sizes[-1] > sizes[0]
        assert sizes[-1] > 0.6 * memory  # the bound is what holds it
        assert 1 < state.store.slots_most < 40
    with pytest.raises(InputError, match="one run of 20 particles for each of 5 observations takes"):
        amortised.init(conjugate_target(OBSERVED), replace(config, memory=200))


@pytest.mark.parametrize("name", ["a sleep 0.5", "smc-wake fixed", "npe fresh", "wake", "defensive-wake", "msc"])
def test_the_loop_runs_and_resumes_it(name, tmp_path):
    config = replace(SMALL, **METHODS[name])
    records = []
    for directory, stops in ((tmp_path / "whole", [12]), (tmp_path / "halves", [8, 12])):
        directory.mkdir()
        for number, stop in enumerate(stops):
            state = amortised.init(conjugate_target(OBSERVED), config)
            if number:
                loop.resume(amortised, state, directory)
            loop.run_loop(amortised, state, loop.LoopConfig(stop, 0, 4), directory, loop.Hooks(records.append))
    whole, halves = (load_newest(checkpoints(tmp_path / name)) for name in ("whole", "halves"))
    (tensors, structure), (others, other_structure) = pack(whole), pack(halves)
    assert structure == other_structure
    assert all(torch.equal(tensors[name], others[name]) for name in tensors)
    assert all(math.isfinite(value) for record in records for value in record.values())


@pytest.mark.parametrize("fields", [{"method": "npe"}, {"method": "npe", "simulations": 60}, {"sleep": 0.5}])
def test_losses_that_are_not_finite_stop_no_training_and_are_logged_as_numbers(fields, tmp_path, monkeypatch):
    calls, plain = [], amortised.sleep_loss

    def sometimes_lost(log_q):
        calls.append(0)
        return plain(log_q) * (1.0, math.inf, math.nan)[len(calls) % 3]

    monkeypatch.setattr(amortised, "sleep_loss", sometimes_lost)
    state, records = amortised.init(conjugate_target(OBSERVED), replace(SMALL, **fields)), []
    loop.run_loop(amortised, state, loop.LoopConfig(12, 0, 1), tmp_path, loop.Hooks(records.append))
    assert sum(record["simulated_cross_entropy"] == amortised.WORST for record in records) == 8
    assert all(math.isfinite(value) for record in records for value in record.values())
    assert bool(state.optimiser.vector.isfinite().all())
    assert state.optimiser.counts == [4]


def test_training_that_learns_nothing_ends(monkeypatch):
    monkeypatch.setattr(amortised, "sleep_loss", lambda log_q: log_q.mean() * math.nan)
    with pytest.raises(RunError, match="no gradient was finite for 50 steps"):
        trained(replace(SMALL, method="npe", steps=60))


@pytest.mark.parametrize("fields", [{"method": "npe"}, {"method": "npe", "simulations": 200}])
def test_simulations_beyond_the_networks_range_are_left_out_too(fields):
    def overflowing(z, generator):
        return torch.where(z[:, :1] > 1, 1e300, z)

    state, metrics = trained(replace(SMALL, **fields), target=conjugate_target(OBSERVED, simulate=overflowing))
    assert 0 < state.lost < 0.3 * state.simulated
    assert len(state.pool.z) == state.simulated - state.lost
    assert bool(state.pool.x.isfinite().all())
    assert state.optimiser.counts == [12]
    assert metrics["simulated_cross_entropy"] < 100


def test_parameters_with_outliers_are_learned(tmp_path):
    def with_outliers(n, generator):
        z = sample_prior(n, generator)
        far = torch.rand(n, 1, generator=generator, dtype=torch.float64) < 0.002
        return torch.where(far, 1e7, z)

    state = amortised.init(
        conjugate_target(OBSERVED, sample_prior=with_outliers), replace(SMALL, method="npe", steps=300)
    )
    records = []
    loop.run_loop(amortised, state, loop.LoopConfig(300, 0, 1), tmp_path, loop.Hooks(records.append))
    losses = [record["simulated_cross_entropy"] for record in records]
    assert max(losses) == amortised.WORST  # more than a billion nats, and written down as that
    assert sorted(losses[-100:])[50] < sorted(losses[:100])[50] - 0.3


MODEL = """
import torch
from torch.distributions import Normal
from hsivi_cli import Model, Parameter

def model(data):
    return Model(
        parameters=[Parameter("mu", (2,))],
        log_prior=lambda p: Normal(0, 1).log_prob(p.mu).sum(),
        log_likelihood=lambda p, y: Normal(p.mu, 0.5).log_prob(y).sum(),
        simulate=lambda p, generator: {simulate},
        sample_prior=lambda generator: {{"mu": Normal(0, 1).sample((2,))}},
        observed=torch.tensor(data[["x", "y"]].iloc[0].to_numpy(), dtype=torch.float64),
    )
"""
TABLE = pd.DataFrame(OBSERVED.numpy(), columns=["x", "y"])


def written(tmp_path, simulate):
    path = tmp_path / "mine.py"
    path.write_text(MODEL.format(simulate=simulate))
    return path


def test_a_users_model_is_trained_and_its_nan_are_left_out(tmp_path):
    target = load_amortised(written(tmp_path, "torch.where(p.mu[0] > 1, torch.nan, Normal(p.mu, 0.5).sample())"), TABLE)
    for name in ("b sleep 0.5", "npe fixed"):
        state, _ = trained(replace(SMALL, **METHODS[name]), 3, target=target)
        assert state.optimiser.counts == [3]
        assert 0 < state.lost < 0.4 * state.simulated
        assert float(state.pool.z[:, 0].max()) <= 1


@pytest.mark.parametrize(
    ("simulate", "says"),
    [
        ("Normal(p.mu, 0.5).sample()[:1]", r"mine.py: simulate returned shape \(1,\)"),
        ("Normal(0.0, 0.5).sample((3,))", r"mine.py: simulate returned shape \(3,\)"),
        ("Normal(0.0, 0.5).sample()", r"mine.py: simulate returned shape \(\)"),
        ("Normal(p.mu, 0.5).sample() * torch.nan", "mine.py: simulate returned NaN"),
        ("p.nothing", "mine.py: simulate raised .*nothing"),
    ],
)
def test_a_users_simulator_that_is_wrong_gives_one_clear_line(simulate, says, tmp_path):
    with pytest.raises(HsiviError, match=says) as caught:
        trained(replace(SMALL, method="npe"), 1, target=load_amortised(written(tmp_path, simulate), TABLE))
    assert "\n" not in str(caught.value)
