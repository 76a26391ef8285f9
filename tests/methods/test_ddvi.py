"""DDVI as a method: gradients go where they must, weights are unbiased, two modes are found."""

import math
from dataclasses import replace

import pytest
import torch
from ddvi_parts import LOG_2PI, SMALL, digits_like, gradients, linear_model, seeded, shaken
from torch import nn

from hsivi_cli.engine.checkpoint import pack, unpack
from hsivi_cli.errors import InputError, RunError
from hsivi_cli.methods import ddvi, ddvi_draws
from hsivi_cli.targets.latent import LatentModel, LatentTask
from hsivi_cli.targets.latent_priors import make_prior
from hsivi_cli.targets.likelihoods import Likelihood


def test_sleep_teaches_the_posterior_alone_and_wake_everything():
    state = shaken(ddvi.init(digits_like(), SMALL))
    asleep = ddvi.asleep_loss(state, 16, seeded())
    assert all(gradient is None for gradient in gradients(asleep, state.model).values())
    bound, awake = ddvi.wake_loss(state, state.task.rows, None, seeded())
    assert float(awake.detach()) == -float(bound.detach())
    for loss, modules in ((asleep, [state.encoder]), (awake, [state.encoder, state.model])):
        for module in modules:
            for name, gradient in gradients(loss, module).items():
                if name in ("reverse.label", "trunk.mask.weight"):  # no classes, nothing missing
                    continue
                assert gradient is not None, name
                assert float(gradient.abs().max()) > 0, name


def test_a_frozen_decoder_stays_and_a_sleeping_posterior_leaves_the_model():
    for options in ({"freeze_decoder": True}, {"wake": False}, {"sleep_first": 1.0}):
        state = ddvi.init(digits_like(), replace(SMALL, **options))
        before = [parameter.clone() for parameter in state.model.parameters()]
        start = [parameter.clone() for parameter in state.encoder.reverse.parameters()]
        for _ in range(3):
            metrics = ddvi.step(state, None, seeded(2))
        assert all(torch.equal(a, b) for a, b in zip(before, state.model.parameters(), strict=True))
        assert not torch.equal(start[-2], list(state.encoder.reverse.parameters())[-2])
        assert ("elbo" in metrics) == ("freeze_decoder" in options)


@pytest.mark.parametrize("estimator", ["a", "b"])
@pytest.mark.parametrize("phase", ["wake", "sleep"])
def test_gradients_are_those_of_finite_differences(phase, estimator):
    model = linear_model(make_prior("normal", 2), (1.0, -0.5, 2.0))
    rows = torch.randn(8, 3, generator=seeded(3), dtype=torch.float64)
    config = replace(SMALL, estimator=estimator, samples=2)
    state = shaken(ddvi.init(LatentTask(rows, model), config), 0.05)

    def loss():
        if phase == "wake":
            return ddvi.wake_loss(state, rows, None, seeded(4))[1]
        return ddvi.asleep_loss(state, 8, seeded(4))

    parameters = list(state.encoder.parameters())
    found = torch.autograd.grad(loss(), parameters, allow_unused=True)
    for seed in range(3):
        directions = [torch.randn(p.shape, generator=seeded(10 + seed), dtype=torch.float64) for p in parameters]
        slope = sum(float((g * v).sum()) for g, v in zip(found, directions, strict=True) if g is not None)
        ends = []
        with torch.no_grad():
            for sign in (1, -2, 1):
                for parameter, direction in zip(parameters, directions, strict=True):
                    parameter.add_(sign * 1e-5 * direction)
                ends.append(float(loss()))
        assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(slope, rel=1e-4)


def test_missing_numbers_are_integrated_out():
    """Rows that lack the second number have the evidence of the first alone; fantasies lack numbers as the rows do."""
    model = linear_model(make_prior("normal", 1), (1.0, 2.0), 0.7)
    x = torch.tensor([[0.9, math.nan], [math.nan, -1.0]], dtype=torch.float64)
    state = shaken(ddvi.init(LatentTask(x, model), SMALL), 0.03)
    draws = ddvi.posterior(state).draw(x, 40_000, seeded(7))
    variance = torch.tensor([1.49, 4.49], dtype=torch.float64)
    truth = -0.5 * (torch.tensor([0.9, -1.0]) ** 2 / variance + variance.log() + LOG_2PI)
    weight = (draws.log_weight - truth).exp()
    error = 5 * weight.std(0) / math.sqrt(40_000)
    assert ((weight.mean(0) - 1).abs() < error).all()
    assert float(error.max()) < 0.1
    full = gradients(ddvi.asleep_loss(state, 16, seeded()), state.encoder)
    lacking = gradients(ddvi.asleep_loss(state, 16, seeded(), x.isnan()), state.encoder)
    assert full["trunk.mask.weight"] is None
    assert float(lacking["trunk.mask.weight"].abs().max()) > 0
    for _ in range(3):
        assert all(math.isfinite(value) for value in ddvi.step(state, None, seeded()).values())


def test_rows_in_blocks_are_drawn_like_rows_at_once(monkeypatch):
    state = shaken(ddvi.init(digits_like(), SMALL))
    at_once = ddvi.posterior(state).draw(state.task.rows, 300, seeded())
    monkeypatch.setattr(ddvi_draws, "CHAINS_AT_ONCE", 7)  # rows by rows
    draws = ddvi.posterior(state).draw(state.task.rows, 3, seeded())
    blocks = ddvi.posterior(state).draw(state.task.rows, 300, seeded(1))  # draws by draws, each row alone
    off = (blocks.log_weight - at_once.log_weight).mean(0)
    error = (blocks.log_weight.var(0) + at_once.log_weight.var(0)).div(300).sqrt()
    assert float((off / error).abs().max()) < 5
    assert float((off / error).std()) < 1.5
    latents = ddvi.posterior(state).latents(state.task.rows, seeded())
    assert latents.shape == (64, 2)
    assert draws.z.shape == (3, 64, 2)
    assert draws.log_weight.shape == (3, 64)
    assert draws.log_weight.dtype == torch.float64
    assert draws.sd.shape == (64, 2)
    assert torch.isfinite(ddvi.posterior(state).draw(state.task.rows, 1, seeded()).sd).all()


class Fold(nn.Module):
    def forward(self, z):
        return z.abs()


@pytest.fixture(scope="module")
def folded():
    model = LatentModel(make_prior("normal", 1), Fold(), Likelihood("gaussian"), torch.full((1,), math.log(0.2)))
    return LatentTask(model.fantasies(5000, seeded(9))[1], model)


def test_a_short_training_finds_both_modes(folded):
    """x = |z| + 0.2 e at x = 1.5: one mode alone costs log 2 = 0.69 nats; T = 10 can reach 0.09."""
    config = ddvi.Config(
        steps=400, sleep_first=0.7, times=10, hidden=(32,), features=32, width=32, layers=3, batch=128, lr=6e-3,
        warmup=20, freeze_decoder=True,
    )  # fmt: skip
    state, generator = ddvi.init(folded, config), seeded(11)
    for _ in range(config.steps):
        ddvi.step(state, None, generator)
    draws = ddvi.posterior(state).draw(torch.full((1, 1), 1.5), 4000, generator)
    log_evidence = math.log(2) - 0.5 * 2.25 / 1.04 - 0.5 * math.log(1.04) - 0.5 * LOG_2PI  # but for 1e-12 at z < 0
    gap = log_evidence - float(draws.log_weight.mean())
    assert -0.02 < gap < 0.4
    assert 0.35 < float((draws.z > 0).float().mean()) < 0.65
    assert abs(float(draws.log_weight.logsumexp(0)) - math.log(4000) - log_evidence) < 0.05


def test_a_run_goes_on_where_it_stopped():
    for labels in (None, torch.arange(64) % 10 - 1):
        states = []
        for _ in range(2):
            task = digits_like(prior="mixture")
            states.append(ddvi.init(LatentTask(task.rows, task.model, labels), SMALL))
        random = torch.get_rng_state()
        generator = seeded(12)
        for _ in range(3):
            ddvi.step(states[0], None, generator)
        ddvi.load_state_dict(states[1], unpack(*pack(ddvi.state_dict(states[0]))))
        kept = generator.get_state()
        one = ddvi.step(states[0], None, generator)
        generator.set_state(kept)
        assert ddvi.step(states[1], None, generator) == one
        for a, b in zip(states[0].encoder.parameters(), states[1].encoder.parameters(), strict=True):
            assert torch.equal(a, b)
        assert torch.equal(torch.get_rng_state(), random)


def test_the_start_is_that_of_the_seed_alone():
    starts = [ddvi.init(digits_like(), replace(SMALL, seed=seed)).encoder.reverse.enter for seed in (0, 0, 1)]
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])


def test_a_few_times_are_spread_over_all_of_them():
    times = ddvi.stratified_times(20, 4, 50_000, seeded())
    assert times.shape == (4, 50_000)
    for k in range(4):
        assert int(times[k].min()) == 5 * k + 1
        assert int(times[k].max()) == 5 * k + 5
    counts = torch.bincount(times.flatten(), minlength=21)[1:].double()
    assert float(((counts - 10_000) / 10_000).abs().max()) < 0.05
    uneven = torch.bincount(ddvi.stratified_times(7, 3, 100_000, seeded()).flatten(), minlength=8)[1:].double()
    assert float((uneven / uneven.mean() - 1).abs().max()) < 0.05


def test_what_cannot_be_is_refused():
    task = digits_like()
    with pytest.raises(InputError, match="a part for each class"):
        ddvi.init(replace(task, labels=torch.zeros(64).long()), SMALL)
    mixture = digits_like(prior="mixture")
    for labels, message in (
        (torch.zeros(3).long(), "one a row"),
        (torch.full((64,), 10), "11 classes"),
        (torch.full((64,), -1), "no row"),
    ):
        with pytest.raises(InputError, match=message):
            ddvi.init(replace(mixture, labels=labels), SMALL)
    for options in ({"estimator": "c"}, {"gamma": -1.0}, {"gamma": 0.0, "wake": False}, {"batch": 0}, {"times": 0},
                    {"schedule": "x"}, {"sleep_first": 2.0}, {"shape": (2, 2, 1)}):  # fmt: skip
        with pytest.raises(InputError):
            ddvi.init(task, replace(SMALL, **options))


def test_a_run_that_diverges_says_so():
    state = ddvi.init(digits_like(), SMALL)
    with torch.no_grad():
        state.encoder.reverse.enter.fill_(math.nan)
    with pytest.raises(RunError, match="--lr"):
        for _ in range(30):
            ddvi.step(state, None, seeded())


def test_what_the_bound_charges_for_latents_comes_in_little_by_little():
    task = digits_like()
    state = ddvi.init(task, replace(SMALL, warm=0.4, sleep_first=0.2))  # 50 steps: 10 asleep, 20 of warming
    shaken(state)

    def losses(step):
        state.step = step
        bound, loss = ddvi.wake_loss(state, task.rows, None, seeded(3))
        _, rebuilt = ddvi.chain_bound(state, task.rows, SMALL.samples, seeded(3))
        return bound, loss, rebuilt.mean()

    for step, share in ((10, 0.0), (15, 0.25), (25, 0.75), (30, 1.0), (50, 1.0)):
        bound, loss, rebuilt = losses(step)
        torch.testing.assert_close(loss, -(share * bound + (1 - share) * rebuilt))
    assert float(losses(10)[1].detach()) != pytest.approx(float(losses(50)[1].detach()), abs=1e-3)
    with pytest.raises(InputError, match=r"warm 1\.5"):
        ddvi.init(task, replace(SMALL, warm=1.5))
