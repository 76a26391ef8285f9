"""The diffusers pipeline: the images of `hsivi sample`, in any batch, from any directory that holds a student."""

import json
import shutil
import warnings

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)

from hsivi_cli import HSIVIPipeline, HSIVIScheduler
from hsivi_cli.errors import InputError
from hsivi_cli.io.files import asset, write_sums
from hsivi_cli.methods.sampling import draw_images, student_sampler
from hsivi_cli.methods.student import Student, load_student, save_student, student_sha256
from hsivi_cli.networks.edm_unet import EDMUNet
from hsivi_cli.networks.multihead_unet import MultiheadUNet
from hsivi_cli.targets.score_net import load_score_net
from hsivi_cli.targets.user_network import build_user_network

UNET = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (8,),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "add_attention": False,
}

NETWORK = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x, t):
        return self.layer(x) + t.reshape(-1, 1, 1, 1) / 1000
"""


def opened(path, **fields):
    pipe = DiffusionPipeline.from_pretrained(path, **fields)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pixels(images):
    return np.stack([np.asarray(image) for image in images])


def cli_images(path, n, seed, batch_size):
    return np.concatenate(list(draw_images(student_sampler(load_student(path)), n, seed, batch_size))).squeeze(-1)


@pytest.fixture
def bare(tiny_student, tmp_path):
    """A student as it was saved before there were pipelines."""
    path = tmp_path / "bare"
    shutil.copytree(tiny_student, path)
    (path / "model_index.json").unlink()
    shutil.rmtree(path / "scheduler")
    return path


def test_a_seed_draws_the_images_of_hsivi_sample(tiny_student):
    pipe = opened(tiny_student)
    assert isinstance(pipe, HSIVIPipeline)
    expected = cli_images(tiny_student, 7, seed=3, batch_size=7)
    assert np.array_equal(pixels(pipe(batch_size=7, seed=3).images), expected)
    assert np.array_equal(pixels(pipe(batch_size=3, seed=3, first=4).images), cli_images(tiny_student, 7, 3, 3)[4:])


@pytest.mark.parametrize("nfe", [3, 5, 10])
def test_the_shipped_students_open(nfe):
    path = asset(f"mnist/nfe{nfe}")
    pipe = opened(path)
    assert pipe.scheduler.nfe == nfe
    assert torch.equal(pipe.scheduler.log_gamma, load_student(path).log_gamma)
    assert np.array_equal(pixels(pipe(batch_size=2, seed=0).images), cli_images(path, 2, 0, 2))


def test_generators(tiny_student):
    """One generator is one stream for the batch; one a sample makes it independent of the batch."""
    pipe = opened(tiny_student)
    draw = lambda seeds: pipe(len(seeds), [torch.Generator().manual_seed(s) for s in seeds], output_type="pt").images  # noqa: E731
    assert torch.allclose(draw([1, 2, 3])[1:], draw([2, 3]), atol=1e-6)
    once, again = (pipe(3, torch.Generator().manual_seed(0), output_type="pt").images for _ in range(2))
    assert torch.equal(once, again)
    other = pipe(3, torch.Generator().manual_seed(1), output_type="pt").images
    assert not torch.allclose(once, other, atol=1e-2)


def test_forms_of_output(tiny_student):
    pipe = opened(tiny_student)
    pil, array, tensor = (pipe(batch_size=2, seed=0, output_type=kind).images for kind in ("pil", "np", "pt"))
    assert [image.mode for image in pil] == ["L", "L"]
    assert array.shape == (2, 8, 8, 1)
    assert array.min() >= 0
    assert array.max() <= 1
    assert tensor.shape == (2, 1, 8, 8)
    assert np.abs(pixels(pil) - 255 * array[..., 0]).max() <= 0.5 + 1e-4
    assert np.array_equal(array, tensor.permute(0, 2, 3, 1).numpy())
    (as_tuple,) = pipe(batch_size=2, seed=0, output_type="np", return_dict=False)
    assert np.array_equal(as_tuple, array)


def test_forwards_are_the_grid(tiny_student):
    pipe, calls = opened(tiny_student), []
    pipe.unet.register_forward_hook(lambda *args: calls.append(1))
    pipe(batch_size=2, seed=0)
    assert len(calls) == pipe.scheduler.nfe == 3
    pipe(batch_size=2, seed=0, num_inference_steps=3)
    with pytest.raises(ValueError, match="a chain of 3"):
        pipe(batch_size=2, num_inference_steps=4)


def test_the_files_for_diffusers_are_no_part_of_a_student(bare, tiny_student):
    """A directory without them loads, hashes and samples the same, also as a pipeline."""
    assert load_student(bare).sha256 == student_sha256(tiny_student)
    pipe = HSIVIPipeline.from_pretrained(bare)
    pipe.set_progress_bar_config(disable=True)
    assert np.array_equal(pixels(pipe(batch_size=2, seed=0).images), cli_images(tiny_student, 2, 0, 2))
    assert HSIVIPipeline.from_pretrained(bare, torch_dtype=torch.float16).unet.dtype == torch.float16


def test_a_saved_pipeline_is_a_student_too(tiny_student, tmp_path):
    opened(tiny_student).save_pretrained(tmp_path / "again")
    assert load_student(tmp_path / "again").sha256 == student_sha256(tiny_student)
    assert np.array_equal(cli_images(tmp_path / "again", 2, 0, 2), cli_images(tiny_student, 2, 0, 2))
    over = tmp_path / "over"  # another student's directory, with its checksums
    save_student(load_student(asset("mnist/nfe3")), over)
    opened(tiny_student).save_pretrained(over)
    assert load_student(over).sha256 == student_sha256(tiny_student)
    written = json.loads((tmp_path / "again" / "model_index.json").read_text())
    ours = json.loads((tiny_student / "model_index.json").read_text())
    assert {k: v for k, v in written.items() if k != "_name_or_path"} == ours


def test_damage_is_found_as_hsivi_sample_finds_it(tiny_student, tmp_path):
    for folder, name in (("student", "unet"), ("student", "log_gamma.safetensors"), ("network", "unet")):
        path = shutil.copytree(tiny_student, tmp_path / f"{folder}-{name}")
        if folder == "network":  # as hsivi train writes it: the checksums lie beside the weights
            (path / "SHA256SUMS").unlink()
            write_sums(path / "unet")
        HSIVIPipeline.from_pretrained(path)
        damaged = path / name / "diffusion_pytorch_model.safetensors" if name == "unet" else path / name
        data = bytearray(damaged.read_bytes())
        data[-5] ^= 1
        damaged.write_bytes(data)
        with pytest.raises(InputError, match=f"{damaged.name} is damaged"):
            HSIVIPipeline.from_pretrained(path)


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_a_saved_pipeline_predicts_what_its_network_does(make_teacher, tmp_path, kind):
    teacher = load_score_net(make_teacher({"prediction_type": kind}))
    student = Student(teacher.unet, torch.zeros(()), (0, 200, 800), 0.2, teacher.schedule, {})
    HSIVIPipeline.from_student(student).save_pretrained(tmp_path / "again")
    assert load_student(tmp_path / "again").schedule.prediction_type == kind


def test_half_precision_is_near(tiny_student):
    full, half = opened(tiny_student), opened(tiny_student, torch_dtype=torch.bfloat16)
    assert half.unet.dtype == torch.bfloat16
    expected, got = (pipe(batch_size=4, seed=0, output_type="pt").images for pipe in (full, half))
    assert got.dtype == torch.float32
    assert float((got - expected).abs().mean()) < 0.01


def test_other_schedulers_become_ours(tiny_teacher):
    """A teacher in our pipeline, and the config of the class that it came with."""
    unet = UNet2DModel.from_pretrained(tiny_teacher / "unet")
    pipe = HSIVIPipeline(unet, DDIMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    assert isinstance(pipe.scheduler, HSIVIScheduler)
    assert pipe(batch_size=2, num_inference_steps=4, output_type="np").images.shape == (2, 8, 8, 1)
    with pytest.raises(ValueError, match="not distilled"):
        pipe(batch_size=2)


@pytest.mark.parametrize(
    ("scheduler", "what"),
    [
        (FlowMatchEulerDiscreteScheduler(), "FlowMatchEulerDiscreteScheduler is not known to be variance preserving"),
        (EDMEulerScheduler(), "EDMEulerScheduler is not known to be variance preserving"),
        (DDIMScheduler(rescale_betas_zero_snr=True), "DDIMScheduler: rescale_betas_zero_snr leaves no signal"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_schedulers_that_no_betas_define_are_refused(tiny_teacher, scheduler, what):
    with pytest.raises(ValueError, match=what):
        HSIVIPipeline(UNet2DModel.from_pretrained(tiny_teacher / "unet"), scheduler)


def test_classes():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DModel(**UNET, num_class_embeds=3).eval()
    pipe = HSIVIPipeline(unet, HSIVIScheduler(grid=[0, 300, 800]))
    pipe.set_progress_bar_config(disable=True)
    draw = lambda **fields: pipe(batch_size=4, seed=0, output_type="pt", **fields).images  # noqa: E731
    assert torch.equal(draw(class_labels=2), draw(class_labels=[2, 2, 2, 2]))
    assert torch.equal(draw(), draw(class_labels=torch.tensor([0, 1, 2, 0])))
    assert not torch.allclose(draw(class_labels=2), draw(class_labels=1), atol=1e-3)
    for wrong in (3, -1, [0, 1]):
        with pytest.raises(ValueError, match="from 0 to 2"):
            draw(class_labels=wrong)


@pytest.mark.parametrize("fields", [{"prediction_type": "v_prediction"}, {"prediction_type": "sample"}, {}])
def test_what_the_network_predicts_is_told_by_the_directory(make_teacher, tmp_path, fields):
    """v, x_0, or eps with learned variances: the images of hsivi sample."""
    teacher = load_score_net(make_teacher(fields, out_channels=1 if fields else 2))
    save_student(Student(teacher.unet, torch.tensor(-0.3), (0, 200, 800), 0.5, teacher.schedule, {}), tmp_path / "s")
    assert np.array_equal(
        pixels(opened(tmp_path / "s")(batch_size=3, seed=1).images), cli_images(tmp_path / "s", 3, 1, 3)
    )


@pytest.mark.parametrize("kind", [EDMUNet, MultiheadUNet])
def test_networks_that_diffusers_has_not(tmp_path, kind):
    """diffusers finds their modules through us, by the name in model_index.json."""
    fields = {"model_channels": 8, "channel_mult": (1,), "num_blocks": 1}
    if kind is MultiheadUNet:
        blocks = {"down_block_types": ("AttnDownBlock2D",), "up_block_types": ("AttnUpBlock2D",)}
        fields = {
            "out_channels": 1,
            "block_out_channels": (32,),
            "layers_per_block": 1,
            "attention_head_dim": [8],
        } | blocks
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = kind(**{"sample_size": 8, "in_channels": 1} | fields).eval()
    student = Student(network, torch.tensor(0.0), (0, 200, 800), 0.5, HSIVIScheduler().schedule, {})
    save_student(student, tmp_path / "s")
    pipe = opened(tmp_path / "s")
    assert type(pipe.unet) is kind
    assert np.array_equal(pixels(pipe(batch_size=2, seed=0).images), cli_images(tmp_path / "s", 2, 0, 2))


def test_a_network_of_the_users_own(tmp_path):
    """It opens with the file that builds it, and nothing pretends that diffusers could."""
    (tmp_path / "net.py").write_text(NETWORK)
    spec = f"{tmp_path / 'net.py'}:Net"
    schedule = HSIVIScheduler().schedule
    network = build_user_network(spec, (1, 8, 8)).eval()
    save_student(Student(network, torch.tensor(0.0), (0, 200, 800), 0.5, schedule, {}), tmp_path / "s")
    assert not (tmp_path / "s" / "model_index.json").exists()
    pipe = HSIVIPipeline.from_pretrained(tmp_path / "s", network=spec)
    drawn = draw_images(student_sampler(load_student(tmp_path / "s", network=spec)), 2, 0, 2)
    assert np.array_equal(pixels(pipe(batch_size=2, seed=0).images), next(drawn).squeeze(-1))


def test_arguments_that_do_not_go_together(tiny_student):
    pipe = opened(tiny_student)
    for fields, what in (
        ({"seed": 0, "generator": torch.manual_seed(0)}, "one of them"),
        ({"generator": [torch.manual_seed(0)]}, "1 generators"),
        ({"output_type": "latent"}, "latent"),
        ({"class_labels": 1}, "not conditioned"),
    ):
        with pytest.raises(ValueError, match=what):
            pipe(batch_size=2, **fields)


def test_colour_and_wider_images(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unets = [UNet2DModel(**UNET | {"sample_size": (8, 16), "in_channels": c, "out_channels": c}) for c in (3, 2)]
    colour, two = (HSIVIPipeline(unet, HSIVIScheduler(grid=[0, 300, 800])) for unet in unets)
    assert colour(batch_size=1, seed=0).images[0].size == (16, 8)
    assert colour(batch_size=1, seed=0).images[0].mode == "RGB"
    with pytest.raises(ValueError, match="2 channels"):
        two(batch_size=1, seed=0)


def test_opening_warns_of_nothing(tiny_student, caplog):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened(tiny_student)
    assert not caplog.records


def test_a_student_saved_again_stays_one(tiny_student, tmp_path):
    save_student(load_student(tiny_student), tmp_path / "s")
    assert {path.name for path in (tmp_path / "s").iterdir()} == {path.name for path in tiny_student.iterdir()}


def test_a_run_is_no_student_and_arguments_are_checked(tiny_run, tiny_student):
    with pytest.raises(InputError, match=r"is a run of students: name one of them, as .*nfe3"):
        HSIVIPipeline.from_pretrained(tiny_run)
    pipe = HSIVIPipeline.from_pretrained(tiny_student)
    for wrong, says in (({"batch_size": 0}, "one image"), ({"seed": -1}, "from 0"), ({"seed": "a"}, "from 0")):
        with pytest.raises(ValueError, match=says):
            pipe(**wrong)
