"""ddpm-torch checkpoints: the converted network computes what an independent forward pass computes."""

import pytest
import torch
from diffusers import UNet2DModel
from foreign_networks import Weights, ddpm_torch

from hsivi_cli.errors import InputError
from hsivi_cli.targets.checkpoints.registry import convert_checkpoint

TIMES = torch.tensor([0, 7, 500, 999])
CASES = {
    "attention at the second level": {"channels": (32, 64), "attends": (False, True), "blocks": 1, "out": 2},
    "pooling": {"channels": (32, 64), "attends": (True, False), "blocks": 2, "out": 2, "convolves": False},
    "learned variance": {"channels": (32, 32, 64), "attends": (False, True, False), "blocks": 1, "out": 4},
}


def written(tmp_path, case, seed=0):
    """(weights, images, path of their state dict)"""
    weights = Weights(seed)
    x = torch.randn(len(TIMES), 2, 8, 8, generator=torch.Generator().manual_seed(seed))
    ddpm_torch(weights, x, TIMES, **case)
    torch.save(weights.tensors, tmp_path / "net.pt")
    return weights, x, tmp_path / "net.pt"


@pytest.mark.parametrize("name", CASES)
def test_the_same_outputs(tmp_path, name):
    weights, x, path = written(tmp_path, CASES[name])
    converted = convert_checkpoint(path, None, (2, 8, 8))
    assert type(converted.network) is UNet2DModel
    assert not converted.network.training
    with torch.no_grad():
        ours, theirs = converted.network(x, TIMES).sample, ddpm_torch(weights, x, TIMES, **CASES[name])
    assert (ours - theirs).abs().max() < 1e-5
    assert theirs.abs().max() > 0.5
    assert (converted.prediction_type, converted.classes) == ("epsilon", 0)


def test_saved_and_opened_by_plain_diffusers(tmp_path):
    _, x, path = written(tmp_path, CASES["pooling"])
    network = convert_checkpoint(path, None, (2, 8, 8)).network
    network.save_pretrained(tmp_path / "unet")
    again = UNet2DModel.from_pretrained(tmp_path / "unet").eval()
    with torch.no_grad():
        assert torch.equal(again(x, TIMES).sample, network(x, TIMES).sample)


def test_schedule_and_size_come_from_the_projects_own_configuration(tmp_path):
    _, _, path = written(tmp_path, CASES["attention at the second level"])
    config = {
        "dataset": "celeba",
        "diffusion": {"timesteps": 500, "beta_schedule": "quad", "beta_start": 1e-3, "beta_end": 0.01},
        "model": {"block_size": 1},
        "train": {},
    }
    converted = convert_checkpoint(path, config | {"model_mean_type": "x_0"})
    assert converted.network.config["sample_size"] == 64
    assert converted.prediction_type == "sample"
    expected = {"num_train_timesteps": 500, "beta_schedule": "scaled_linear", "beta_start": 1e-3, "beta_end": 0.01}
    assert expected.items() <= converted.schedule.items()


def test_what_is_taken_for_granted_is_said(tmp_path):
    _, _, path = written(tmp_path, CASES["attention at the second level"])
    converted = convert_checkpoint(path)
    assert converted.network.config["sample_size"] == 32  # attention at 16 x 16, one level down
    assert any("32 x 32" in note for note in converted.notes)
    assert any("linear betas" in note for note in converted.notes)


@pytest.mark.parametrize(
    ("architecture", "what"),
    [
        ({"diffusion": {"beta_schedule": "jsd"}}, "beta_schedule must be one of linear, quad"),
        ({"model": {"block_size": 2}}, "shuffled pixels"),
        ({"image_size": 0}, "image_size"),
        ({"timestep": 3}, "unknown field 'timestep'"),
        ({"diffusion": {"model_mean_type": "mean"}}, "model_mean_type"),
        ({"diffusion": []}, "must be an object"),
        ({"format": "openai"}, "are those of 'ddpm-torch'"),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path, architecture, what):
    _, _, path = written(tmp_path, CASES["attention at the second level"])
    with pytest.raises(InputError, match=what):
        convert_checkpoint(path, architecture)


def test_a_size_that_nothing_tells_is_asked_for(tmp_path):
    _, _, path = written(tmp_path, {"channels": (32,), "attends": (False,), "blocks": 1, "out": 2})
    with pytest.raises(InputError, match="--shape C,H,W"):
        convert_checkpoint(path)
    with pytest.raises(InputError, match="has 2 channels"):
        convert_checkpoint(path, None, (3, 8, 8))
