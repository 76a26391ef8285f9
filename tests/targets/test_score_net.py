"""Score networks: the same numbers as diffusers, the same hash everywhere, and one clear line for what is broken."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from hsivi_cli.errors import InputError
from hsivi_cli.targets.score_net import NetworkOptions, load_score_net

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def copied(tiny_teacher, tmp_path):
    path = tmp_path / "teacher"
    shutil.copytree(tiny_teacher, path)
    return path


def edit_json(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_predicts_what_diffusers_predicts(tiny_teacher):
    from diffusers import UNet2DModel

    net = load_score_net(tiny_teacher)
    theirs = UNet2DModel.from_pretrained(tiny_teacher / "unet").eval()
    x, t = torch.randn(3, *net.shape), torch.tensor([0, 10, 999])
    with torch.no_grad():
        torch.testing.assert_close(net.eps(x, t), theirs(x, t).sample)
    assert not any(p.requires_grad for p in net.unet.parameters())


def test_hash_names_weights_and_schedule_not_the_place(copied, tiny_teacher):
    before = load_score_net(tiny_teacher).sha256
    assert load_score_net(copied).sha256 == before
    edit_json(copied / "scheduler/scheduler_config.json", beta_end=0.03)
    changed_schedule = load_score_net(copied).sha256
    tensors = load_file(copied / WEIGHTS)
    tensors[next(iter(tensors))] += 1e-3
    save_file(tensors, copied / WEIGHTS)
    assert len({before, changed_schedule, load_score_net(copied).sha256}) == 3


def truncate(path):
    file = path / WEIGHTS
    file.write_bytes(file.read_bytes()[:-1000])


def hostile_header(path):
    (path / WEIGHTS).write_bytes((2**62).to_bytes(8, "little") + b"{}")


def pickle_only(path):
    (path / WEIGHTS).unlink()
    (path / "unet/diffusion_pytorch_model.bin").write_bytes(b"\x80\x04cbuiltins\nprint\n(S'run'\ntR.")


def nan_weight(path):
    tensors = load_file(path / WEIGHTS)
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, path / WEIGHTS)


def whole_numbers(path):
    tensors = load_file(path / WEIGHTS)
    save_file({name: tensor.long() for name, tensor in tensors.items()}, path / WEIGHTS)


def other_network(path):
    save_file({"w": torch.ones(2)}, path / WEIGHTS)


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (truncate, "damaged"),
        (hostile_header, "damaged"),
        (pickle_only, "running code"),
        (nan_weight, "NaN"),
        (other_network, "does not fit"),
        (lambda p: (p / WEIGHTS).unlink(), "does not exist"),
        (lambda p: (p / "unet/config.json").write_text("{"), "JSON"),
        (lambda p: (p / "unet/config.json").write_text("[1]"), "no JSON object"),
        (lambda p: edit_json(p / "unet/config.json", block_out_channels=[3]), "config.json"),
        (lambda p: edit_json(p / "unet/config.json", _class_name="UNet2DConditionModel"), "UNet2DConditionModel"),
        (lambda p: edit_json(p / "unet/config.json", out_channels=3), "3 output channels for 1"),
        (lambda p: edit_json(p / "unet/config.json", class_embed_type="timestep"), "class_embed_type"),
        (lambda p: edit_json(p / "scheduler/scheduler_config.json", prediction_type="flow"), "flow"),
        (lambda p: edit_json(p / "scheduler/scheduler_config.json", beta_schedule="sigmoid"), "sigmoid"),
        (whole_numbers, "is not of floating point in"),
        (lambda p: shutil.rmtree(p / "scheduler"), "--schedule linear"),
        (lambda p: shutil.rmtree(p), "does not exist"),
    ],
)
def test_broken_checkpoints_are_named_in_one_line(copied, damage, what):
    damage(copied)
    with pytest.raises(InputError, match=what) as caught:
        load_score_net(copied)
    assert str(copied) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_older_files_of_diffusers_are_read(make_teacher):
    """`.bin` weights, read without running anything, and the names that attention had in the google/ddpm-* networks."""
    path = make_teacher(
        flat=True, down_block_types=("AttnDownBlock2D",), up_block_types=("AttnUpBlock2D",), attention_head_dim=4
    )
    today = load_score_net(path)
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(path / "diffusion_pytorch_model.safetensors")
    for new, old in names.items():
        tensors = {name.replace(f".{new}.", f".{old}."): tensor for name, tensor in tensors.items()}
    assert any(".proj_attn." in name for name in tensors)
    torch.save(tensors, path / "diffusion_pytorch_model.bin")
    (path / "diffusion_pytorch_model.safetensors").unlink()
    older = load_score_net(path)
    x = torch.randn(2, *today.shape)
    assert torch.equal(older.eps(x, 10), today.eps(x, 10))


def test_flags_win_over_the_scheduler_and_say_so(make_teacher):
    path = make_teacher({"trained_betas": [0.01] * 50})
    assert load_score_net(path).schedule.num_train_timesteps == 50
    told = load_score_net(path, options=NetworkOptions(schedule={"num_train_timesteps": 100}))
    assert told.schedule.num_train_timesteps == 100
    assert "num_train_timesteps" in told.notes[0]


def test_the_hash_is_the_same_in_every_process(tmp_path):
    """diffusers keeps names in the order of a set, which depends on the hash seed of Python."""
    script = tmp_path / "hash.py"
    script.write_text(
        "import sys, torch\n"
        "from diffusers import UNet2DModel\n"
        "from hsivi_cli.bridges.schedule import schedule_from_config\n"
        "from hsivi_cli.targets import score_net\n"
        "from hsivi_cli.targets.checkpoints import registry\n"
        "from hsivi_cli.targets.checkpoints.build import Converted\n"
        "torch.manual_seed(0)\n"
        "net = UNet2DModel(sample_size=8, block_out_channels=(8,), norm_num_groups=4,\n"
        "                  down_block_types=('DownBlock2D',), up_block_types=('UpBlock2D',), add_attention=False)\n"
        "schedule = schedule_from_config({}).config\n"
        "registry.convert_checkpoint = lambda *args: Converted(net, 'epsilon', schedule)\n"
        "print(score_net.load_score_net(sys.argv[0]).sha256)\n"
    )
    found = set()
    for seed in ("1", "2", "3"):
        environment = os.environ | {"PYTHONHASHSEED": seed}
        done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=True)
        found.add(done.stdout)
    assert len(found) == 1
