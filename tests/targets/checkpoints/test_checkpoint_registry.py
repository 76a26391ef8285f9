"""One door for foreign checkpoints: formats by their names, prefixes gone, and a fuzz of every loader."""

import io
import pickletools
import tempfile
import zipfile
from pathlib import Path

import pytest
import torch
from foreign_networks import Weights, ddpm_torch, edm, openai
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from hsivi_cli.errors import InputError
from hsivi_cli.targets.checkpoints.registry import convert_checkpoint, recognise

SONG = {
    "model_type": "SongUNet",
    "img_resolution": 8,
    "img_channels": 1,
    "model_channels": 8,
    "channel_mult": [1],
    "num_blocks": 1,
    "attn_resolutions": [],
}
SHAPE = (1, 8, 8)


def state_dicts():
    """format -> (state dict, JSON)"""
    x, t = torch.randn(1, 1, 8, 8), torch.zeros(1)
    nets = {kind: Weights(0) for kind in ("ddpm-torch", "openai", "edm")}
    level = {"channels": (32,), "attends": (True,), "blocks": 1, "out": 1}
    ddpm_torch(nets["ddpm-torch"], x, t, **level)
    openai(nets["openai"], x, t, width=32, heads=(2,), **level)
    edm(nets["edm"], x, t, **SONG)
    fields = {"ddpm-torch": {}, "openai": {"num_heads": 2}, "edm": SONG}
    return {kind: (weights.tensors, fields[kind]) for kind, weights in nets.items()}


NETWORKS = state_dicts()


def as_bytes(tensors, how):
    if how == "safetensors":
        return save(tensors)
    stream = io.BytesIO()
    tree = {"ema": {"shadow": tensors}, "model": tensors} if how == "ckpt" else tensors
    torch.save(tree, stream, _use_new_zipfile_serialization=how != "pth")
    return stream.getvalue()


FILES = {
    (kind, how): as_bytes(tensors, how)
    for kind, (tensors, _) in NETWORKS.items()
    for how in ("pt", "pth", "ckpt", "safetensors")
}
fuzzed = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


def never_a_traceback(content, suffix, fields, shape=SHAPE):
    """Converts, or refuses in one line; anything else escapes and fails the test."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"net.{suffix}"
        path.write_bytes(content)
        told = ""
        try:
            convert_checkpoint(path, fields, shape)
        except InputError as err:
            told = str(err)
        assert "\n" not in told
        assert len(told) < 700


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("prefix", ["", "module.", "ema_model.", "model._orig_mod."])
def test_formats_are_told_by_their_names_whatever_the_prefix(tmp_path, kind, prefix):
    tensors, fields = NETWORKS[kind]
    beside = {"epoch": torch.ones(1)} if prefix else {}
    save_file({prefix + n: t for n, t in tensors.items()} | beside, tmp_path / "net.safetensors")
    converted = convert_checkpoint(tmp_path / "net.safetensors", fields, SHAPE)
    assert any(kind in note for note in converted.notes)
    assert not prefix or any(prefix[:-1] in note for note in converted.notes)


def test_a_weight_without_a_place_is_no_small_matter(tmp_path):
    """It would mean that the network computes with something the converter does not know."""
    for kind, (tensors, fields) in NETWORKS.items():
        torch.save(tensors | {"gate.weight": torch.ones(3)}, tmp_path / f"{kind}.pt")
        with pytest.raises(InputError, match=r"no place for 1 weight \(gate.weight\)"):
            convert_checkpoint(tmp_path / f"{kind}.pt", fields, SHAPE)


@pytest.mark.parametrize(
    ("names", "what"),
    [
        (["layer.weight"], "in none of the formats ddpm-torch, openai, edm: give the code"),
        (["unet.down_blocks.0.resnets.0.conv1.weight"], "name the directory that has its config.json"),
        (["model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.x"], "latent diffusion"),
    ],
)
def test_other_networks_are_pointed_to_another_door(names, what):
    with pytest.raises(InputError, match=what):
        recognise({name: torch.ones(1) for name in names}, Path("net.pt"))


def test_shuffled_pixels_are_refused(tmp_path):
    tensors, _ = NETWORKS["ddpm-torch"]
    torch.save({"_model." + name: tensor for name, tensor in tensors.items()}, tmp_path / "net.pt")
    with pytest.raises(InputError, match="block_size"):
        convert_checkpoint(tmp_path / "net.pt", None, SHAPE)


@fuzzed
@given(st.sampled_from(sorted(FILES)), st.floats(0, 1, exclude_max=True))
def test_truncated_files(which, share):
    content = FILES[which]
    never_a_traceback(content[: int(share * len(content))], which[1], NETWORKS[which[0]][1])


@fuzzed
@given(st.sampled_from(sorted(FILES)), st.lists(st.tuples(st.integers(-8000, 8000), st.integers(0, 255)), min_size=1))
def test_flipped_bytes_where_the_structure_lies(which, flips):
    content = bytearray(FILES[which])
    for place, value in flips:
        content[place] = value
    never_a_traceback(bytes(content), which[1], NETWORKS[which[0]][1])


@fuzzed
@given(st.sampled_from(sorted(NETWORKS)), st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1))
def test_pickles_with_other_opcodes(kind, changes):
    with zipfile.ZipFile(io.BytesIO(FILES[kind, "pt"])) as archive:
        parts = {entry.filename: bytearray(archive.read(entry)) for entry in archive.infolist()}
    program = next(content for name, content in parts.items() if name.endswith("data.pkl"))
    starts = [place for _, _, place in pickletools.genops(bytes(program))]
    for where, value in changes:
        program[starts[where % len(starts)]] = value
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, bytes(content))
    never_a_traceback(stream.getvalue(), "pt", NETWORKS[kind][1])


NAMES = st.sampled_from(["", "x.", "0", "module.", "level_1", ".weight", "\n", "é"])
SHAPES = st.sampled_from(
    [(), (0,), (1,), (3, 0), (33, 32, 3, 3), (96, 32, 1), (2, 2, 2, 2, 2), (64, 64), (100_000, 1, 1, 1)]
)
TYPES = st.sampled_from([torch.float32, torch.float16, torch.int64, torch.bool, torch.complex64])


@fuzzed
@given(st.sampled_from(sorted(NETWORKS)), st.integers(0, 10**6), st.one_of(NAMES, SHAPES), TYPES)
def test_renamed_and_reshaped_weights(kind, which, change, dtype):
    tensors, fields = dict(NETWORKS[kind][0]), NETWORKS[kind][1]
    name = sorted(tensors)[which % len(tensors)]
    if isinstance(change, str):
        tensors[name.replace("0", change, 1) if "0" in name else change + name] = tensors.pop(name)
    else:
        tensors[name] = torch.ones(change).to(dtype)
    never_a_traceback(as_bytes(tensors, "pt"), "pt", fields)


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 5),
    st.sampled_from([10**9, 1e300, float("nan"), "cosine", "residual", "quad", "openai"]),
    st.text(max_size=5),
    st.lists(st.integers(-1, 10**9), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)
FIELDS = ["format", "num_heads", "num_head_channels", "diffusion_steps", "noise_schedule", "image_size", "timesteps"]
FIELDS += ["diffusion", "dataset", "model", *SONG, "resample_filter", "encoder_type", "label_dim", "precond"]


@fuzzed
@given(st.sampled_from(sorted(NETWORKS)), st.dictionaries(st.sampled_from(FIELDS), JUNK, min_size=1, max_size=2))
def test_any_json(kind, changes):
    never_a_traceback(FILES[kind, "pt"], "pt", NETWORKS[kind][1] | changes, None)
