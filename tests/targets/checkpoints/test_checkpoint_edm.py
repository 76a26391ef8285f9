"""EDM checkpoints: the noise that EDM's denoiser implies, on a discrete variance-preserving schedule."""

import pytest
import torch
from foreign_networks import Weights, edm
from safetensors.torch import save_file
from torch.nn.functional import one_hot

from hsivi_cli.bridges.schedule import schedule_from_config
from hsivi_cli.errors import InputError
from hsivi_cli.networks.edm_unet import EDMUNet
from hsivi_cli.targets.checkpoints.registry import convert_checkpoint

TIMES = torch.tensor([0, 3, 500, 999])
LABELS = torch.tensor([2, 0, 1, 1])
SONG = {
    "model_type": "SongUNet",
    "img_resolution": 8,
    "img_channels": 2,
    "model_channels": 16,
    "channel_mult": [2, 1],
    "num_blocks": 1,
    "attn_resolutions": [4],
}
NCSN = {
    "embedding_type": "fourier",
    "encoder_type": "residual",
    "channel_mult_noise": 2,
    "resample_filter": [1, 3, 3, 1],
}
CASES = {
    "DDPM++": SONG,
    "DDPM++, classes, attention everywhere": SONG | {"label_dim": 3, "attn_resolutions": [8, 4], "num_blocks": 2},
    "NCSN++": SONG | NCSN | {"label_dim": 3},
    "skips both ways": SONG | {"encoder_type": "skip", "decoder_type": "skip", "channel_mult": [1, 2, 2]},
    "skips both ways, filtered": SONG
    | {"encoder_type": "skip", "decoder_type": "skip", "resample_filter": [1, 3, 3, 1]},
    "ADM": SONG | {"model_type": "DhariwalUNet", "model_channels": 64, "channel_mult": [1, 2], "label_dim": 3},
}


def written(tmp_path, fields):
    """(weights, variance-preserving images, path of the safetensors file with EDM's names)"""
    weights = Weights(1)
    x = torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(2))
    edm(weights, x, torch.zeros(4), torch.zeros(4, 3), **fields)
    state = {f"model.{name}": tensor.clone() for name, tensor in weights.tensors.items()}
    save_file(state | {"model.map_augment.weight": torch.ones(3, 2)}, tmp_path / "edm.safetensors")
    return weights, x, tmp_path / "edm.safetensors"


def noise_of_the_denoiser(weights, x, sigma, labels, fields):
    """(x_edm - D) / sigma in float64, D = c_skip x + c_out F: table 1 of arXiv 2206.00364."""
    sigma = sigma.double()[:, None, None, None]
    x = x.double() * (1 + sigma**2).sqrt()
    c_in, c_skip = 1 / (0.25 + sigma**2).sqrt(), 0.25 / (0.25 + sigma**2)
    raw = edm(weights, (c_in * x).float(), (sigma.flatten().log() / 4).float(), labels, **fields)
    return (x - (c_skip * x + sigma * 0.5 / (sigma**2 + 0.25).sqrt() * raw.double())) / sigma


@pytest.mark.parametrize("name", CASES)
def test_the_noise_of_the_denoiser(tmp_path, name):
    fields = CASES[name]
    weights, x, path = written(tmp_path, fields)
    converted = convert_checkpoint(path, {"format": "edm", "precond": "EDMPrecond", "augment_dim": 2, **fields})
    classes = fields.get("label_dim", 0)
    abar = schedule_from_config(converted.schedule).abar[TIMES]
    theirs = noise_of_the_denoiser(weights, x, (1 / abar - 1).sqrt(), one_hot(LABELS, 3).float(), fields)
    with torch.no_grad():
        ours = converted.network(x, TIMES, LABELS if classes else None).sample
    assert (ours - theirs).abs().max() < 1e-5
    assert ours.dtype == torch.float32
    assert theirs.abs().max() > 0.5
    assert (converted.prediction_type, converted.classes) == ("epsilon", classes)


def test_saved_and_opened_again(tmp_path):
    _, x, path = written(tmp_path, CASES["NCSN++"])
    network = convert_checkpoint(path, {**CASES["NCSN++"], "precond": "EDMPrecond"}).network
    network.save_pretrained(tmp_path / "unet")
    again = EDMUNet.from_pretrained(tmp_path / "unet").eval()
    assert torch.equal(again.sigma, network.sigma)
    with torch.no_grad():
        assert torch.equal(again(x, TIMES, LABELS).sample, network(x, TIMES, LABELS).sample)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"precond": "VPPrecond"}, "only EDMPrecond"),
        ({"precond": "VEPrecond"}, "only EDMPrecond"),
        ({"precond": 3}, "only EDMPrecond"),
        ({"beta_d": 19.9}, "only EDMPrecond"),
        ({"img_resolution": 7}, "cannot be halved"),
        ({"model_channels": 10**9}, "model_channels must be an integer"),
        ({"channel_mult": "2,2"}, "channel_mult must be a list"),
        ({"num_blocks": 2}, "does not fit"),
        ({"model_type": "UNet"}, "model_type"),
        ({"model_type": "DhariwalUNet", "embedding_type": "fourier"}, "belongs to a SongUNet"),
        ({"sigma": 1}, "unknown field 'sigma'"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, change, what):
    _, _, path = written(tmp_path, SONG)
    with pytest.raises(InputError, match=what):
        convert_checkpoint(path, SONG | change)


def test_without_a_json_it_is_asked_for(tmp_path):
    _, _, path = written(tmp_path, SONG)
    with pytest.raises(InputError, match="name the JSON of its architecture with --network"):
        convert_checkpoint(path)
    with pytest.raises(InputError, match="is not the img_channels and img_resolution"):
        convert_checkpoint(path, SONG, (3, 8, 8))
    assert any("VPPrecond" in note for note in convert_checkpoint(path, SONG).notes)
