"""The diffusers scheduler of a chain: DDIM where nothing is learned, the student's own layers where it is."""

import copy
import json

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DPMSolverMultistepScheduler, UNet2DModel

from hsivi_cli import HSIVIScheduler
from hsivi_cli.engine.seeds import PhiloxStreams
from hsivi_cli.methods.scheduler import decode_map, encode_map
from hsivi_cli.methods.student import load_student, sample_student

SHAPE = (3, 2, 4, 4)


def gaussian(seed, shape=SHAPE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("clip_sample", [False, True])
@pytest.mark.parametrize("eta", [0.0, 0.2, 1.0])
def test_without_log_gamma_a_step_is_ddim(prediction_type, clip_sample, eta):
    """Nine steps of 111 from 999 to 0, where DDIM's times and ours are the same; DDIM's tables are float32."""
    fields = {"prediction_type": prediction_type, "clip_sample": clip_sample, "beta_schedule": "scaled_linear"}
    theirs = DDIMScheduler(**fields, steps_offset=111)
    theirs.alphas_cumprod = HSIVIScheduler(**fields).alphas_cumprod
    theirs.set_timesteps(9)
    ours = HSIVIScheduler(**fields, grid=list(range(0, 1000, 111)), eta=eta)
    assert torch.equal(ours.timesteps, theirs.timesteps)
    for i, t in enumerate(ours.timesteps):
        x, output, z = (gaussian(3 * i + j) for j in range(3))
        last = i == 8
        expected = theirs.step(output, int(t), x, eta=eta, variance_noise=0 * z if last else z)
        got = ours.step(output, t, x, variance_noise=z)
        # coefficients go through float32 nowhere, but x_0 at t = 999 is x over a signal of .07
        assert torch.allclose(got.prev_sample, expected.prev_sample, atol=1e-12, rtol=1e-12)
        assert torch.allclose(got.pred_original_sample, expected.pred_original_sample, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("shape", [(), (1, 8, 8), (3, 1, 8, 8)])
def test_a_plain_loop_draws_what_the_student_draws(tiny_student, shape):
    student = load_student(tiny_student)
    log_gamma = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.3
    object.__setattr__(student, "log_gamma", log_gamma)
    scheduler = HSIVIScheduler(**student.schedule.config, grid=list(student.grid), eta=0.2, log_gamma=log_gamma)
    noise = PhiloxStreams(5, range(4))
    x = noise.draw(student.shape)
    with torch.no_grad():
        for t in scheduler.timesteps:
            output = student.unet(scheduler.scale_model_input(x, t), t).sample
            x = scheduler.step(output, t, x, variance_noise=noise.draw(student.shape)).prev_sample
    assert torch.equal(x, sample_student(student, PhiloxStreams(5, range(4))))


@pytest.mark.parametrize("shape", [(), (3, 2, 2), (4, 1, 2, 2)])
def test_the_config_carries_everything(tmp_path, shape):
    log_gamma = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    fields = {"grid": [0, 10, 50, 200, 900], "eta": 0.7, "beta_schedule": "squaredcos_cap_v2"}
    scheduler = HSIVIScheduler(log_gamma=log_gamma, **fields)
    scheduler.save_pretrained(tmp_path)
    json.loads((tmp_path / "scheduler_config.json").read_text())
    loaded = (HSIVIScheduler.from_pretrained(tmp_path), HSIVIScheduler.from_config(scheduler.config))
    for again in (*loaded, copy.deepcopy(scheduler)):
        assert torch.equal(again.log_gamma, log_gamma)
        assert again.timesteps.tolist() == [900, 200, 50, 10]
        assert again.config["eta"] == 0.7
    assert "base64" not in repr(scheduler)
    assert len(repr(scheduler)) < 500


def test_it_changes_places_with_diffusers_schedulers():
    """A config of theirs gives ours of the same noise schedule, and back."""
    theirs = DDIMScheduler(beta_schedule="scaled_linear", beta_end=0.012, prediction_type="v_prediction")
    ours = HSIVIScheduler.from_config(theirs.config)
    assert torch.allclose(ours.alphas_cumprod, theirs.alphas_cumprod.double(), atol=1e-6)
    assert ours.config["prediction_type"] == "v_prediction"
    solver = DPMSolverMultistepScheduler.from_config(ours.config)
    assert torch.equal(solver.alphas_cumprod, theirs.alphas_cumprod)


def test_any_number_of_steps_without_a_grid_of_its_own(tiny_teacher):
    """In diffusers' own pipeline, on a network that knows nothing of us."""
    unet = UNet2DModel.from_pretrained(tiny_teacher / "unet")
    pipe = DDPMPipeline(unet, HSIVIScheduler(beta_start=1e-4, beta_end=0.02))
    pipe.set_progress_bar_config(disable=True)
    for steps in (1, 4, 20):
        images = pipe(batch_size=2, num_inference_steps=steps, output_type="np", generator=torch.manual_seed(0)).images
        assert images.shape == (2, 8, 8, 1)
        assert len(pipe.scheduler.timesteps) == steps
    with pytest.raises(ValueError, match="not distilled"):
        pipe.scheduler.set_timesteps()
    with pytest.raises(ValueError, match="1000 steps do not fit"):
        pipe.scheduler.set_timesteps(1000)


def test_learned_variances_are_left_out():
    scheduler = HSIVIScheduler(grid=[0, 500, 900])
    x, output = gaussian(0), gaussian(1, (3, 4, 4, 4))
    z = gaussian(2)
    wide, narrow = (scheduler.step(o, 900, x, variance_noise=z).prev_sample for o in (output, output[:, :2]))
    assert torch.equal(wide, narrow)


def test_half_precision_samples_stay_half():
    scheduler = HSIVIScheduler(grid=[0, 500, 900])
    x, output = gaussian(0).half(), gaussian(1).half()
    out = scheduler.step(output, 900, x, generator=[torch.Generator().manual_seed(i) for i in range(3)])
    assert out.prev_sample.dtype == torch.float16


def test_noising_is_diffusers():
    ours, theirs = HSIVIScheduler(), DDIMScheduler()
    theirs.alphas_cumprod = ours.alphas_cumprod  # its own table is float32
    t = torch.tensor([0, 500, 999])
    x, z = gaussian(0), gaussian(1)
    assert torch.allclose(ours.add_noise(x, z, t), theirs.add_noise(x, z, t), atol=1e-14)


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"eta": 1.5}, "eta"),
        ({"prediction_type": "flow"}, "prediction_type"),
        ({"beta_schedule": "sigmoid"}, "sigmoid"),
        ({"grid": [0, 5, 5]}, "increasing"),
        ({"grid": [0, 5, 1000]}, "increasing"),
        ({"grid": []}, "nfe"),
        ({"log_gamma": {"shape": [2, 2, 2], "float32": "AAAA"}}, "log_gamma"),
        ({"log_gamma": {"shape": [2, 2, 2]}}, "log_gamma"),
        ({"log_gamma": "no"}, "log_gamma"),
        ({"log_gamma": float("nan")}, "finite"),
        ({"log_gamma": torch.zeros(2)}, "shape"),
        ({"log_gamma": torch.zeros(3, 1, 2, 2), "grid": [0, 5, 10]}, "3 layers"),
    ],
)
def test_nonsense_is_refused(fields, what):
    with pytest.raises(ValueError, match=what):
        HSIVIScheduler(**fields)


def test_steps_and_times_of_another_chain_are_refused():
    scheduler = HSIVIScheduler(grid=[0, 500, 900])
    with pytest.raises(ValueError, match="a chain of 2"):
        scheduler.set_timesteps(3)
    with pytest.raises(ValueError, match=r"not one of \[900, 500\]"):
        scheduler.step(gaussian(0), 0, gaussian(1))
    with pytest.raises(ValueError, match="set_timesteps"):
        HSIVIScheduler().step(gaussian(0), 0, gaussian(1))


def test_a_map_survives_its_encoding():
    log_gamma = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0))
    assert torch.equal(decode_map(json.loads(json.dumps(encode_map(log_gamma)))), log_gamma)
