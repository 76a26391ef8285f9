"""Checkpoints of other projects as teachers, from the command line: distilled, and drawn from without their files."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from hsivi_cli.cli.app import main

sys.path.append(str(Path(__file__).resolve().parents[1] / "targets" / "checkpoints"))

from foreign_networks import Weights, ddpm_torch, edm, openai

LEVELS = {"channels": (32, 64), "attends": (False, True), "blocks": 1}
SONG = {
    "model_type": "SongUNet",
    "img_resolution": 8,
    "img_channels": 1,
    "model_channels": 8,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [4],
    "label_dim": 3,
}
OPENAI = {"num_heads": 4, "noise_schedule": "cosine", "diffusion_steps": 4000}


def written(kind, folder):
    """The options that name a small teacher of this kind; its files lie in `folder`."""
    weights, x, t = Weights(0), torch.randn(1, 1, 8, 8), torch.zeros(1)
    if kind == "ddpm-torch":
        ddpm_torch(weights, x, t, out=1, **LEVELS)
        torch.save({"ema": {"shadow": weights.tensors}, "epoch": 2}, folder / "teacher.pt")
        return ["--score-net", str(folder / "teacher.pt"), "--shape", "1,8,8"]
    if kind == "openai":
        openai(weights, x, t, width=32, heads=(4, 4), scale_shift=True, **(LEVELS | {"out": 2}))
        torch.save(weights.tensors, folder / "teacher.pt")
        (folder / "teacher.json").write_text(json.dumps(OPENAI))
        return [
            "--score-net",
            str(folder / "teacher.pt"),
            "--network",
            str(folder / "teacher.json"),
            "--shape",
            "1,8,8",
        ]
    edm(weights, x, t, torch.zeros(1, 3), **SONG)
    save_file({name: tensor.clone() for name, tensor in weights.tensors.items()}, folder / "teacher.safetensors")
    (folder / "teacher.json").write_text(json.dumps({"precond": "EDMPrecond", **SONG}))
    return ["--score-net", str(folder / "teacher.safetensors"), "--network", str(folder / "teacher.json")]


@pytest.mark.parametrize("kind", ["ddpm-torch", "openai", "edm"])
def test_distilled_and_drawn_from(kind, tmp_path, capsys):
    teacher, run = written(kind, tmp_path), str(tmp_path / "run")
    small = ["--nfe", "2", "--steps", "1", "--batch", "4", "--critic-steps", "1"]
    assert main(["distill", *teacher, *small, "--out", run]) == 0
    said = capsys.readouterr().err
    assert f"Read as a{'n' * (kind != 'ddpm-torch')} {kind} checkpoint." in said
    for file in tmp_path.glob("teacher.*"):
        file.unlink()
    assert main(["sample", run, "--nfe", "2", "-n", "3", "--out", str(tmp_path / "images")]) == 0
    images = [np.asarray(Image.open(file)) for file in sorted((tmp_path / "images").glob("*.png"))]
    assert len(images) == 3
    assert all(image.shape == (8, 8) and image.std() > 0 for image in images)
