"""Exported samplers: the student's images for the same noise, for any batch, and nothing written that draws others."""

import json
import warnings

import pytest
import torch
from torch import nn

from hsivi_cli.engine.seeds import PhiloxStreams
from hsivi_cli.errors import InputError, RunError
from hsivi_cli.methods import export
from hsivi_cli.methods.export import FewStepSampler, NoisePrediction, choose_format, export_student
from hsivi_cli.methods.student import Student, load_student, sample_student
from hsivi_cli.targets.score_net import load_score_net

SHAPES = [(), (1, 8, 8), (3, 1, 8, 8)]


def with_log_gamma(path, shape):
    student = load_student(path)
    log_gamma = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.3
    return Student(student.unet, log_gamma, student.grid, 0.7, student.schedule, student.description, student.path)


def noise_of(student, n, seed):
    streams = PhiloxStreams(seed, range(n))
    return torch.stack([streams.draw(student.shape) for _ in range(student.nfe)])


@pytest.mark.parametrize("shape", SHAPES)
def test_the_sampler_is_the_student(tiny_student, shape):
    student = with_log_gamma(tiny_student, shape)
    sampler = FewStepSampler(NoisePrediction(student.unet, student.schedule), student)
    with torch.no_grad():
        assert torch.equal(sampler(noise_of(student, 4, 2)), sample_student(student, PhiloxStreams(2, range(4))))


def test_torchscript(tiny_student, tmp_path):
    student = with_log_gamma(tiny_student, (3, 1, 8, 8))
    done = export_student(student, tmp_path / "s.pt", "torchscript")
    assert done.max_difference < 1e-5
    assert done.bytes == (tmp_path / "s.pt").stat().st_size
    extra = {"hsivi.json": ""}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sampler = torch.jit.load(tmp_path / "s.pt", _extra_files=extra)
    assert json.loads(extra["hsivi.json"]) == student.description
    with torch.no_grad():
        for n in (1, 5, 70):  # diffusers treats batches of 64 and more differently
            expected = sample_student(student, PhiloxStreams(9, range(n)))
            torch.testing.assert_close(sampler(noise_of(student, n, 9)), expected, atol=1e-5, rtol=0)
        for draws in (2, 4):
            with pytest.raises(Exception, match="one draw a network evaluation"):
                sampler(torch.zeros(draws, 1, *student.shape))


@pytest.fixture
def everything(make_teacher):
    """A student that is upsampled, conditioned on classes, predicts v and learns variances."""
    blocks = {"down_block_types": ("DownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "UpBlock2D")}
    path = make_teacher(
        {"prediction_type": "v_prediction"}, block_out_channels=(8, 8), out_channels=2, num_class_embeds=3, **blocks
    )
    teacher = load_score_net(path)
    return Student(teacher.unet, torch.tensor(-0.5), (0, 200, 800), 0.5, teacher.schedule, {})


def test_torch_export(everything, tmp_path):
    modules = [*everything.unet.modules()]
    forwards = [module.forward for module in modules]
    assert export_student(everything, tmp_path / "s.pt2", "torch-export").max_difference < 1e-5
    assert [module.forward for module in modules] == forwards
    program = torch.export.load(tmp_path / "s.pt2").module()
    with torch.no_grad():  # diffusers' own code would bind it to batches below 64
        drawn = program(noise_of(everything, 70, 9), torch.arange(70) % 3)
    torch.testing.assert_close(drawn, sample_student(everything, PhiloxStreams(9, range(70))), atol=1e-5, rtol=0)
    with pytest.raises(AssertionError, match="noise"):
        program(torch.zeros(3, 70, *everything.shape), torch.arange(70) % 3)


def test_classes_and_other_predictions_as_a_script(everything, tmp_path):
    assert export_student(everything, tmp_path / "s.pt", "torchscript").max_difference < 1e-5


@pytest.mark.parametrize("kind", ["torchscript", "torch-export"])
def test_a_chain_of_one_layer(tiny_student, tmp_path, kind):
    student = load_student(tiny_student)
    student = Student(student.unet, student.log_gamma, (0, 300), 0.2, student.schedule, {})
    assert export_student(student, tmp_path / "s", kind).max_difference < 1e-5


def test_one_file(tiny_student, tmp_path):
    done = export_student(load_student(tiny_student), tmp_path / "s.safetensors", "safetensors")
    assert done.max_difference == 0
    assert load_student(tmp_path / "s.safetensors").sha256 == load_student(tiny_student).sha256


@pytest.mark.parametrize("kind", ["torchscript", "safetensors"])
def test_a_file_that_draws_other_images_is_not_written(tiny_student, tmp_path, monkeypatch, kind):
    right = export.open_exported
    monkeypatch.setattr(export, "open_exported", lambda *args: lambda *inputs: right(*args)(*inputs) + 0.01)
    out = tmp_path / ("s.safetensors" if kind == "safetensors" else "s.pt")
    out.write_text("before")
    with pytest.raises(RunError, match=r"its images are 0\.01 from the student's"):
        export_student(load_student(tiny_student), out, kind, force=True)
    assert out.read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_images_that_are_no_numbers_are_no_match(tiny_student):
    student = load_student(tiny_student)
    assert export.largest_difference(student, lambda noise: torch.full(noise.shape[1:], torch.nan)) == torch.inf


def test_a_network_that_cannot_be_traced(tiny_student, tmp_path):
    class Data(nn.Module):
        config = {"in_channels": 1, "sample_size": 8}  # noqa: RUF012

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, x, t):
            return x * self.weight if float(x.sum().detach().item()) > 1e9 or str(type(t)) == "" else x.no_such_thing()

    student = load_student(tiny_student)
    student = Student(Data(), student.log_gamma, student.grid, student.eta, student.schedule, {})
    for kind in ("torchscript", "torch-export"):
        with pytest.raises(RunError, match=f"cannot be exported as {kind}"):
            export_student(student, tmp_path / "s.pt", kind)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["torchscript", "torch-export"])
def test_a_network_that_makes_the_batch_a_constant(tiny_student, tmp_path, kind):
    class Fixed(nn.Module):
        config = {"in_channels": 1, "sample_size": 8}  # noqa: RUF012

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1, 8))

        def forward(self, x, t):
            n = len(x)
            return x * self.weight.expand(n, 8).reshape(n, 1, 1, 8)

    student = load_student(tiny_student)
    student = Student(Fixed(), student.log_gamma, student.grid, student.eta, student.schedule, {})
    with pytest.raises(RunError, match="len") as caught:
        export_student(student, tmp_path / "s.pt", kind)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_endings_and_formats(tmp_path, tiny_student):
    for name, kind in (("a.pt", "torchscript"), ("a.pt2", "torch-export"), ("a.safetensors", "safetensors")):
        assert choose_format(tmp_path / name, None) == kind
    assert choose_format(tmp_path / "a.bin", "torch-export") == "torch-export"
    for name, asked, what in (
        ("a.bin", None, "none of the endings"),
        ("a.pt", "onnx", "unknown"),
        ("a.pt", "safetensors", "exactly if"),
        ("a.safetensors", "torchscript", "exactly if"),
    ):
        with pytest.raises(InputError, match=what):
            choose_format(tmp_path / name, asked)
