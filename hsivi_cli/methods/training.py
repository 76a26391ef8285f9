"""A training run of a score network, from resolved options to a diffusers pipeline directory."""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from hsivi_cli.engine import processes
from hsivi_cli.engine.loop import Hooks, LoopConfig, resume, run_loop
from hsivi_cli.engine.seeds import PhiloxStreams
from hsivi_cli.errors import InputError
from hsivi_cli.io.capacity import check_memory
from hsivi_cli.io.files import atomic_directory, write_json, write_sums
from hsivi_cli.io.metrics_log import is_number, plot_metrics, read_metrics, rewind_metrics
from hsivi_cli.io.run_directory import METRICS, checkpoints
from hsivi_cli.methods import ddpm
from hsivi_cli.methods.sampling import to_uint8
from hsivi_cli.targets.score_net import score_net_sha256

PREVIEW_IMAGES = 64
ROLLBACKS = 3  # before a run that diverges again and again is given up
HEAD_WIDTH = 8  # of an attention head in UNet2DModel
SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}


@dataclass(frozen=True)
class Trained:
    """A finished training: `loss` is the last one logged, `seconds` are this process's own."""

    steps: int
    seconds: float
    loss: float | None
    parameters: int
    sha256: str


def unet_arguments(
    image_shape: tuple[int, int, int], channels: Sequence[int], blocks: int, attention: bool
) -> dict[str, Any]:
    """Arguments of a plain convolutional UNet2DModel; raises InputError if the sizes do not fit the images."""
    colours, height, width = image_shape
    halvings = 2 ** (len(channels) - 1)
    if height % halvings or width % halvings:
        raise InputError(f"--channels lists {len(channels)} levels, but {height}x{width} cannot be halved that often")
    if min(channels) < 4:
        raise InputError(f"--channels {','.join(map(str, channels))}: give widths of at least 4, better of 16")
    if attention and channels[-1] % HEAD_WIDTH:
        raise InputError(f"--attention needs a last width that {HEAD_WIDTH} divides, not {channels[-1]}")
    groups = math.gcd(32, *(width // 2 for width in channels))
    if groups < 2:
        raise InputError(f"--channels {','.join(map(str, channels))}: give multiples of 4, better of 16")
    return {
        "sample_size": height if height == width else (height, width),
        "in_channels": colours,
        "out_channels": colours,
        "block_out_channels": tuple(channels),
        "layers_per_block": blocks,
        "norm_num_groups": groups,
        "down_block_types": ("DownBlock2D",) * len(channels),
        "up_block_types": ("UpBlock2D",) * len(channels),
        "add_attention": attention,
    }


def check_memory_of_step(shape: tuple[int, int, int], config: ddpm.DDPMConfig) -> None:
    """Raise InputError, at once, if a batch of images (C, H, W) cannot fit memory: from below, without the network."""
    # in every process the whole of it: uint8 as it was drawn, and float32 clean, noise and noisy
    batch = config.batch * math.prod(shape) * (1 + 3 * 4)
    check_memory(f"--batch {config.batch}", batch * processes.on_this_machine())


def default_channels(size: int) -> tuple[int, ...]:
    """Widths of a UNet for square images of this size, small enough to train on a CPU up to 32 pixels."""
    if size <= 8:
        return (32, 64)
    return (32, 64, 128) if size <= 32 else (64, 128, 256, 256)


def train(
    images: UInt8[Tensor, "N c h w"],
    config: ddpm.DDPMConfig,
    directory: Path,
    had_run: bool,
    preview_every: int,
    write_grid: Callable[[Any, Path], None],
    on_log: Callable[[dict[str, Any]], None],
    on_step: Callable[[int], None] = lambda step: None,
    tell: Callable[[str], None] = lambda sentence: None,
    keep: int = 2,
) -> Trained:
    """Train to `config.steps`, with previews, checkpoints and loss curves, then publish the pipeline.

    `had_run` restores the last checkpoint first, if one was written; `write_grid(uint8 NHWC, path)` draws a preview;
    `tell(sentence)` hears of roll-backs and of damaged checkpoints; the last `keep` checkpoints are kept.
    """
    started = time.monotonic()
    state = ddpm.init(None, config)
    progress = None
    if had_run and processes.from_main(lambda: bool(checkpoints(directory))):
        progress = resume(ddpm, state, directory, tell)
    else:
        processes.from_main(lambda: rewind_metrics(directory / METRICS, 0))

    def preview(step: int) -> dict[str, float]:
        drawn = to_uint8(ddpm.sample(state, PhiloxStreams(config.seed, range(PREVIEW_IMAGES))))
        write_grid(drawn, directory / f"samples-{step:06d}.png")
        publish(state, directory)
        return {}

    def batch(draws: torch.Generator) -> UInt8[Tensor, "n c h w"]:
        return ddpm.draw_batch(images, config.batch, draws)

    hooks = Hooks(on_log, lambda step: processes.from_main(lambda: preview(step)), batch, on_step, tell)
    loop = LoopConfig(
        config.steps,
        config.seed,
        log_every=50,
        checkpoint_every=500,
        preview_every=preview_every,
        keep=keep,
        rollbacks=ROLLBACKS,
    )
    stopped = run_loop(ddpm, state, loop, directory, hooks, progress)
    trained = processes.from_main(lambda: _finish(state, directory, time.monotonic() - started))
    if stopped:
        raise stopped("interrupted after the last step; everything is written")
    return trained


def _finish(state: ddpm.DDPMState, directory: Path, seconds: float) -> Trained:
    publish(state, directory)
    records = read_metrics(directory / METRICS)
    plot_metrics(records, ("loss", "grad_norm", "lr"), directory / "curves.png")
    loss = records[-1].get("loss") if records else None
    return Trained(
        steps=state.step,
        seconds=seconds,
        loss=loss if is_number(loss) else None,
        parameters=sum(parameter.numel() for parameter in state.ema.parameters()),
        sha256=score_net_sha256(directory / "unet", state.schedule),
    )


def publish(state: ddpm.DDPMState, directory: Path) -> None:
    """Write the averaged network as a diffusers pipeline (`DDPMPipeline.from_pretrained` opens `directory`)."""
    from diffusers import DDPMPipeline, DDPMScheduler

    with atomic_directory(directory / "unet", overwrite=True) as unet:
        state.ema.save_pretrained(unet, safe_serialization=True)
        write_sums(unet)
    scheduler = DDPMScheduler.from_config(state.config.schedule)
    with atomic_directory(directory / "scheduler", overwrite=True) as folder:
        scheduler.save_pretrained(folder)
    index = dict(DDPMPipeline(state.ema, scheduler).config)
    write_json(directory / "model_index.json", {"_class_name": "DDPMPipeline"} | index)


def resolved(config: ddpm.DDPMConfig, data: dict[str, Any]) -> dict[str, Any]:
    """The run's configuration as plain JSON, with the data's name and hash; how it is computed is not part of it."""
    fields = dataclasses.asdict(config)
    for how in ("device", "accumulate", "compiled"):
        fields.pop(how)
    fields["unet"] = {k: list(v) if isinstance(v, tuple) else v for k, v in fields["unet"].items()}
    return {"method": "ddpm", "data": data} | fields
