"""Gradient routing, cost, and resumption of distillation, on an 8x8 one-block network."""

from dataclasses import replace

import pytest
import torch

from hsivi_cli.engine.checkpoint import load_checkpoint, pack, save_checkpoint
from hsivi_cli.engine.optimisation import share_of
from hsivi_cli.engine.seeds import PhiloxStreams, StepDraws, Stream, generator
from hsivi_cli.kernels.philox import Draw
from hsivi_cli.methods import hsivi_sm
from hsivi_cli.methods.hsivi_sm import DistillConfig
from hsivi_cli.targets.score_net import load_score_net

OBJECTIVES = ("sm", "diffused-fisher", "diffused-kl")


def make_state(tiny_teacher, **settings):
    config = DistillConfig(**({"grid": (0, 50, 200, 800), "steps": 8, "batch": 6, "critic_steps": 2} | settings))
    return hsivi_sm.init(load_score_net(tiny_teacher), config)


def step_draws(step):
    return StepDraws(0, step, generator(0, Stream.TRAIN, step))


def weights(module):
    return [p.detach().clone() for p in module.parameters()]


def moved(before, module):
    return any(not torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


def advance(state, steps):
    for _ in range(steps):
        hsivi_sm.step(state, None, generator(state.config.seed, Stream.TRAIN, state.step + 1))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_critic_step_moves_the_critic_alone(tiny_teacher, objective):
    state = make_state(tiny_teacher, objective=objective)
    state.step = 1
    draws = step_draws(1)
    rollout = hsivi_sm.roll_out(state, draws, range(8))
    student, critic, teacher = weights(state.student), weights(state.critic), weights(state.teacher.unet)
    hsivi_sm.critic_step(state, rollout, draws, share_of(6))
    assert moved(critic, state.critic)
    assert not moved(student, state.student)
    assert not moved(teacher, state.teacher.unet)
    assert all(p.grad is None for p in state.student.parameters())
    assert state.log_gamma.grad is None
    assert torch.equal(state.log_gamma, torch.zeros_like(state.log_gamma))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_student_step_moves_the_student_and_log_gamma_alone(tiny_teacher, objective):
    state = make_state(tiny_teacher, objective=objective)
    advance(state, 2)  # the critic must differ from the teacher, or the gap and every gradient is zero
    draws = step_draws(3)
    rollout = hsivi_sm.roll_out(state, draws, range(8))
    for p in state.critic.parameters():
        p.grad = None
    student, critic, teacher = weights(state.student), weights(state.critic), weights(state.teacher.unet)
    log_gamma = state.log_gamma.detach().clone()
    hsivi_sm.student_step(state, rollout, draws, share_of(6))
    assert moved(student, state.student)
    assert not torch.equal(log_gamma, state.log_gamma)
    assert not moved(critic, state.critic)
    assert not moved(teacher, state.teacher.unet)
    assert all(p.grad is None for p in state.critic.parameters())
    assert all(p.requires_grad for p in state.critic.parameters())


@pytest.mark.parametrize("log_gamma", ["map", "layer", "scalar"])
def test_resume_is_bit_exact(tiny_teacher, tmp_path, log_gamma):
    straight = make_state(tiny_teacher, log_gamma=log_gamma)
    advance(straight, 5)
    stopped = make_state(tiny_teacher, log_gamma=log_gamma)
    advance(stopped, 2)
    save_checkpoint(tmp_path / "c.safetensors", hsivi_sm.state_dict(stopped))
    resumed = make_state(tiny_teacher, log_gamma=log_gamma)
    hsivi_sm.load_state_dict(resumed, load_checkpoint(tmp_path / "c.safetensors"))
    advance(resumed, 3)
    for name in ("student", "critic", "ema_student"):
        assert not moved(weights(getattr(straight, name)), getattr(resumed, name)), name
    assert torch.equal(straight.ema_log_gamma, resumed.ema_log_gamma)


def count_forwards(module):
    calls = []
    module.register_forward_hook(lambda m, args, out: calls.append(len(args[0])))
    return calls


def test_rollout_cache_spares_the_student_in_critic_steps(tiny_teacher):
    for cache, chains in ((True, 8), (False, 12)):
        state = make_state(tiny_teacher, batch=12, critic_steps=4, rollout_cache=cache)
        student, critic = count_forwards(state.student), count_forwards(state.critic)
        advance(state, 1)
        layers = 3
        rollouts = 1 if cache else 4
        assert student == [chains] * layers * rollouts + [12]  # rollouts, then the student step's own forward
        assert critic == [12] * 5


def test_cached_and_fresh_rollouts_give_the_same_layer_inputs(tiny_teacher):
    state = make_state(tiny_teacher, batch=6, rollout=6)
    cached = hsivi_sm.roll_out(state, step_draws(1), range(6))
    fresh_state = make_state(tiny_teacher, batch=6, rollout_cache=False)
    fresh = hsivi_sm.roll_out(fresh_state, step_draws(1), range(6))
    for i, k in enumerate(fresh.k.tolist()):
        row = (3 - k) * 6 + i
        assert int(cached.k[row]) == k
        torch.testing.assert_close(cached.x[row], fresh.x[i])
        torch.testing.assert_close(cached.eps[row], fresh.eps[i])


@pytest.mark.parametrize("cache", [True, False])
def test_rows_draw_the_same_whoever_computes_them(tiny_teacher, cache):
    state = make_state(tiny_teacher, rollout=6, rollout_cache=cache)
    whole, shards = step_draws(4), [(step_draws(4), rows) for rows in (range(4), range(4, 6))]
    for _ in range(2):
        rollout = hsivi_sm.roll_out(state, whole, range(6))
        parts = [hsivi_sm.roll_out(state, draws, rows) for draws, rows in shards]
        for name in ("x", "eps", "k"):
            # layer by layer: one chain's inputs lie a rollout's width apart
            per_chain = [getattr(part, name).unflatten(0, (-1, n)) for part, n in zip(parts, (4, 2), strict=True)]
            torch.testing.assert_close(torch.cat(per_chain, 1).flatten(0, 1), getattr(rollout, name))
        drawn = hsivi_sm._draw_comparison(state, rollout, whole, range(6))
        split = [hsivi_sm._draw_comparison(state, rollout, draws, rows) for draws, rows in shards]
        for mine, theirs in zip(drawn, zip(*split, strict=True), strict=True):
            if isinstance(mine, Draw):
                mine, theirs = mine.normals((3,)), [part.normals((3,)) for part in theirs]
            assert torch.equal(torch.cat(list(theirs)), mine)


def test_student_at_start_is_ddim_with_eta(tiny_teacher):
    state = make_state(tiny_teacher)
    drawn = hsivi_sm.sample(state, PhiloxStreams(3, range(4)))
    noise, layers = PhiloxStreams(3, range(4)), state.layers
    x = noise.draw(state.teacher.shape)
    for k in range(3, 0, -1):
        eps = state.teacher.eps(x, layers.times[k])
        x = layers.A[k].float() * x + layers.B[k].float() * eps
        if k > 1:
            x = x + layers.c1[k].float() * noise.draw(state.teacher.shape)
    torch.testing.assert_close(drawn, x)


def test_sm_compares_at_the_layers_own_time(tiny_teacher):
    state = make_state(tiny_teacher, objective="sm", batch=64)
    rollout = hsivi_sm.roll_out(state, step_draws(1), range(8))
    _, k, _, t = hsivi_sm._draw_comparison(state, rollout, step_draws(2), range(64))
    assert torch.equal(t, state.layers.times[k - 1])


def test_warm_start_takes_the_other_students_weights(tiny_teacher):
    state = make_state(tiny_teacher)
    advance(state, 2)
    donor = hsivi_sm.averaged_student(state)
    config = DistillConfig(grid=(0, 300, 800), steps=4, batch=6)
    warm = hsivi_sm.init(state.teacher, config, donor)
    assert not moved(weights(donor.unet), warm.student)
    assert moved(weights(donor.unet), warm.critic)


def everything(state):
    return pack(hsivi_sm.state_dict(state) | {"step": 0})[0]


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("who", ["critic_loss", "student"])
def test_an_update_that_is_not_finite_is_skipped_and_counted(tiny_teacher, monkeypatch, objective, who):
    straight, state = (make_state(tiny_teacher, objective=objective) for _ in range(2))
    advance(straight, 2)
    advance(state, 2)
    whole = getattr(hsivi_sm, "critic_loss" if who == "critic_loss" else "student_losses")

    def broken(*parts):
        found = whole(*parts)
        return found * float("nan") if who == "critic_loss" else replace(found, loss=found.loss * float("nan"))

    monkeypatch.setattr(hsivi_sm, whole.__name__, broken)
    before = everything(state)
    metrics = hsivi_sm.step(state, None, generator(0, Stream.TRAIN, 3))
    assert metrics["skipped"] == (2 if who == "critic_loss" else 1)  # of two critic steps and one of the student
    after = everything(state)
    ours = "/critic" if who == "critic_loss" else ("/student", "/ema", "/log_gamma")
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith(ours))
    others = ("/student", "/ema") if who == "critic_loss" else "/critic"
    assert not all(torch.equal(before[name], after[name]) for name in before if name.startswith(others))
    assert all(bool(value.isfinite().all()) for value in after.values())
    monkeypatch.undo()
    assert hsivi_sm.step(state, None, generator(0, Stream.TRAIN, 4))["skipped"] == 0


def test_the_loop_lowers_both_rates(tiny_teacher):
    whole, half = (make_state(tiny_teacher, warmup=0, lr_schedule="constant") for _ in range(2))
    half.lr_scale = 0.5
    advance(whole, 1)
    advance(half, 1)
    for optimiser in ("student_optimiser", "critic_optimiser"):
        rates = [getattr(state, optimiser).param_groups[0]["lr"] for state in (whole, half)]
        assert rates[1] == 0.5 * rates[0]
