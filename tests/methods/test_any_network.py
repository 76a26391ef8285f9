"""Distillation and sampling of networks that are not plain epsilon UNets: v, x_0, learned variances, classes."""

import pytest
import torch

from hsivi_cli.engine.optimisation import Share
from hsivi_cli.engine.seeds import PhiloxStreams, StepDraws, Stream, generator
from hsivi_cli.errors import InputError
from hsivi_cli.methods import hsivi_sm
from hsivi_cli.methods.hsivi_sm import DistillConfig
from hsivi_cli.methods.sampling import open_sampler
from hsivi_cli.methods.student import load_student, sample_student, save_student
from hsivi_cli.targets.score_net import NetworkOptions, load_score_net


def whole(rows):
    """These rows as one part of a batch that is all of them."""
    return Share(rows, ((slice(0, len(rows)), 1.0),))


def distilled(path, steps=2, **settings):
    config = DistillConfig(**({"grid": (0, 200, 800), "steps": 4, "batch": 6, "critic_steps": 1} | settings))
    state = hsivi_sm.init(load_score_net(path), config)
    for _ in range(steps):
        metrics = hsivi_sm.step(state, None, generator(0, Stream.TRAIN, state.step + 1))
    assert all(torch.tensor(value).isfinite() for value in metrics.values())
    return state


def step_draws(step):
    return StepDraws(0, step, generator(0, Stream.TRAIN, step))


def test_a_flat_directory_is_the_nested_one(make_teacher, tiny_teacher):
    flat = load_score_net(make_teacher(flat=True))
    assert flat.sha256 == load_score_net(tiny_teacher).sha256


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_ddim_on_another_prediction_is_diffusers_own(make_teacher, kind):
    from diffusers import DDIMScheduler, UNet2DModel

    path = make_teacher({"prediction_type": kind})
    sampler = open_sampler(path, 4, "ddim", "leading")
    noise = PhiloxStreams(0, range(3))
    with torch.no_grad():
        ours = sampler.run(noise)
        scheduler = DDIMScheduler(
            beta_start=1e-4, beta_end=0.02, prediction_type=kind, clip_sample=False, set_alpha_to_one=True
        )
        scheduler.set_timesteps(4)
        unet = UNet2DModel.from_pretrained(path / "unet").eval()
        x = PhiloxStreams(0, range(3)).draw(sampler.shape)
        for t in scheduler.timesteps:
            x = scheduler.step(unet(x, t).sample, t, x).prev_sample
    torch.testing.assert_close(ours, x, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
@pytest.mark.parametrize("objective", ["sm", "diffused-kl"])
def test_a_student_predicts_what_its_teacher_does_and_comes_back_from_disk(make_teacher, tmp_path, kind, objective):
    state = distilled(make_teacher({"prediction_type": kind}), objective=objective)
    student = hsivi_sm.averaged_student(state, {})
    save_student(student, tmp_path / "student")
    again = load_student(tmp_path / "student")
    assert again.schedule.prediction_type == kind
    drawn = [sample_student(s, PhiloxStreams(1, range(3))) for s in (student, again)]
    assert torch.equal(*drawn)


def test_learned_variances_of_a_teacher_change_nothing(make_teacher, tiny_teacher):
    plain = load_score_net(tiny_teacher)
    path = make_teacher(out_channels=2)
    learned = load_score_net(path)
    with torch.no_grad():
        tensors = plain.unet.state_dict()
        for name in ("conv_out.weight", "conv_out.bias"):
            tensors[name] = torch.cat([tensors[name], torch.full_like(tensors[name], 3.0)])
        learned.unet.load_state_dict(tensors)
        x = torch.randn(2, *plain.shape)
        torch.testing.assert_close(learned.eps(x, 10), plain.eps(x, 10))
    distilled(path)


def test_classes_are_distilled_and_drawn(make_teacher, tmp_path):
    path = make_teacher(num_class_embeds=3)
    state = distilled(path)
    chains = state.config.chains
    rollout = hsivi_sm.roll_out(state, step_draws(1), range(chains))
    assert set(rollout.labels.tolist()) <= {0, 1, 2}
    assert torch.equal(rollout.labels[:chains], rollout.labels[chains:])  # a chain keeps its class
    save_student(hsivi_sm.averaged_student(state, {}), tmp_path / "nfe2")
    mixed = open_sampler(tmp_path / "nfe2")
    drawn = mixed.run(PhiloxStreams(0, range(6)))
    for label in range(3):
        only = open_sampler(tmp_path / "nfe2", label=label).run(PhiloxStreams(0, range(6)))
        assert torch.equal(only[label::3], drawn[label::3])
        assert not torch.equal(only, drawn)
    later = mixed.run(PhiloxStreams(0, [5, 4]))
    torch.testing.assert_close(later, drawn[[5, 4]], atol=1e-5, rtol=1e-5)
    with pytest.raises(InputError, match="classes 0 to 2"):
        open_sampler(tmp_path / "nfe2", label=3)
    solver = open_sampler(path, 3, "ddim", label=1)
    assert solver.description["class"] == 1


def test_every_network_is_told_the_class_of_its_input(make_teacher):
    state = distilled(make_teacher(num_class_embeds=3), batch=16)
    rollout = hsivi_sm.roll_out(state, step_draws(1), range(state.config.chains))
    inputs = hsivi_sm._draw_comparison(state, rollout, step_draws(2), range(3, 9))[0]
    told = []
    for network in (state.student, state.critic, state.teacher.unet):
        network.register_forward_hook(lambda m, args, kwargs, out: told.append(kwargs), with_kwargs=True)
    hsivi_sm.critic_step(state, rollout, step_draws(2), whole(range(3, 9)))
    hsivi_sm.student_step(state, rollout, step_draws(2), whole(range(3, 9)))
    assert [call["class_labels"].tolist() for call in told] == [rollout.labels[inputs].tolist()] * 4


def test_a_label_needs_classes(tiny_student):
    with pytest.raises(InputError, match="not conditioned on classes"):
        open_sampler(tiny_student, label=0)


def test_flags_say_what_no_scheduler_file_does(make_teacher):
    path = make_teacher(flat=True)
    (path / "scheduler_config.json").unlink()
    with pytest.raises(InputError, match="--schedule linear"):
        load_score_net(path)
    made = load_score_net(path, options=NetworkOptions(schedule={"beta_schedule": "linear"}))
    assert made.schedule.num_train_timesteps == 1000


@pytest.mark.parametrize("name", ["nobody/nothing", "no/such/path", "nothing"])
def test_what_is_not_here_says_how_to_fetch_it(name):
    with pytest.raises(InputError) as caught:
        load_score_net(name)
    assert "\n" not in str(caught.value)
    assert ("hf download nobody/nothing" in str(caught.value)) == (name == "nobody/nothing")
