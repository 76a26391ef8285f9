"""Networks small enough for every test: an 8x8 one-block teacher, a student of it, and a run of two students."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # the tests need no network, and must not notice one
os.environ.setdefault("OMP_NUM_THREADS", "1")

SCHEDULER = {
    "_class_name": "DDPMScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "prediction_type": "epsilon",
    "clip_sample": True,
}
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


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers pipeline directory: random weights, one channel, 8x8. Do not change it; see `teacher_copy`."""
    import torch
    from diffusers import UNet2DModel

    path = tmp_path_factory.mktemp("tiny") / "teacher"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        UNet2DModel(**UNET).save_pretrained(path / "unet", safe_serialization=True)
    (path / "scheduler").mkdir()
    (path / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    return path


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path) -> Path:
    """A run directory with students for NFE 3 and 5 (`nfe3/`, `nfe5/`) that start at the teacher, log_gamma 0.1."""
    import torch

    from hsivi_cli.bridges.schedule import make_grid
    from hsivi_cli.methods.student import Student, save_student
    from hsivi_cli.targets.score_net import load_score_net

    run = tmp_path_factory.mktemp("tiny") / "run"
    run.mkdir()
    teacher = load_score_net(tiny_teacher)
    for nfe in (3, 5):
        grid = make_grid("quad", nfe, teacher.schedule)
        log_gamma = torch.full(teacher.shape, 0.1)
        description = {"teacher_sha256": teacher.sha256, "step": 7, "seed": 0}
        save_student(Student(teacher.unet, log_gamma, grid, 0.2, teacher.schedule, description), run / f"nfe{nfe}")
    return run


@pytest.fixture(scope="session")
def tiny_student(tiny_run: Path) -> Path:
    """A student directory for NFE 3. Do not change it; copy it first."""
    return tiny_run / "nfe3"


@pytest.fixture
def teacher_copy(tiny_teacher: Path, tmp_path: Path) -> Callable[..., Path]:
    """`teacher_copy(**fields)`: a copy of the tiny teacher to break, with these fields set in its scheduler config."""

    def copy(**fields: object) -> Path:
        path = tmp_path / "teacher_copy"
        shutil.copytree(tiny_teacher, path)
        (path / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER | fields))
        return path

    return copy


@pytest.fixture
def make_teacher(tmp_path: Path) -> Callable[..., Path]:
    """`make_teacher(scheduler fields, flat, **unet arguments)`: a teacher like the tiny one but for these.

    `flat` lays it out as the `google/ddpm-*` repositories are.
    """
    import torch
    from diffusers import UNet2DModel

    def make(fields: dict[str, object] | None = None, flat: bool = False, **arguments: object) -> Path:
        path = tmp_path / "made"
        with torch.random.fork_rng():
            torch.manual_seed(0)
            UNet2DModel(**UNET | arguments).save_pretrained(path if flat else path / "unet")
        folder = path if flat else path / "scheduler"
        folder.mkdir(exist_ok=True)
        (folder / "scheduler_config.json").write_text(json.dumps(SCHEDULER | (fields or {})))
        return path

    return make
