"""`hsivi train`: a small DDPM score network from images, for users without a checkpoint."""

from dataclasses import asdict
from typing import Annotated

import typer

from hsivi_cli.cli import configuration, console, options
from hsivi_cli.cli.training_progress import follow
from hsivi_cli.engine import processes

# settings that are not called as on the command line, and those that no option is the name of; see `check_run`
OTHER_DATA = "the images of --data are not those it was begun with"
FLAGS = {
    "data.source": "--data",
    "data.*": OTHER_DATA,
    "unet.add_attention": "--attention",
    "unet.layers_per_block": "--blocks",
    "unet.*": "--channels",
    **{f"unet.{name}": OTHER_DATA for name in ("sample_size", "in_channels", "out_channels")},
    "schedule.*": "--schedule",
}


def train(
    ctx: typer.Context,
    data: Annotated[
        str,
        typer.Option("--data", help="'digits' (8x8, offline), an image folder, .npy, .npz or an MNIST idx .gz file."),
    ],
    out: options.OutDirectory,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Gradient steps.")] = 10000,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Images a gradient step.")] = 128,
    lr: Annotated[float, typer.Option("--lr", min=0.0, max=100.0, help="Rate after warm-up; cosine decay.")] = 1e-3,
    warmup: Annotated[int, typer.Option("--warmup", min=0, help="Steps of linear warm-up.")] = 200,
    channels: Annotated[
        str, typer.Option("--channels", help="UNet widths from fine to coarse, as 16,32,64; default by image size.")
    ] = "",
    blocks: Annotated[int, typer.Option("--blocks", min=1, max=16, help="Residual blocks a level.")] = 1,
    attention: Annotated[bool, typer.Option("--attention", help="Self-attention at the coarsest level.")] = False,
    schedule: Annotated[str, typer.Option("--schedule", help="Noise schedule: linear or cosine.")] = "linear",
    ema: Annotated[float, typer.Option("--ema", min=0.0, max=0.99999, help="Decay of the averaged weights.")] = 0.999,
    flip: Annotated[bool, typer.Option("--flip", help="Random horizontal flips.")] = False,
    precision: options.Precision = "fp32",
    accumulate: options.Accumulate = 1,
    compiled: options.Compile = False,
    preview_every: Annotated[
        int, typer.Option("--preview-every", min=0, help="Steps between sample grids; 0: never.")
    ] = 1000,
    keep: options.Keep = 2,
    seed: options.Seed = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted run: same options plus this.")
    ] = False,
    device: options.Device = "auto",
    threads: options.Threads = 0,
    tensorboard: options.TensorBoard = False,
    as_json: options.AsJson = False,
    config_file: configuration.ConfigFile = None,
) -> None:
    """Train a small epsilon-predicting DDPM score network.

    The output is a diffusers pipeline directory (`DDPMPipeline.from_pretrained` opens it), ready for `hsivi distill`.
    """
    import torch

    from hsivi_cli.errors import InputError
    from hsivi_cli.io.images import read_images
    from hsivi_cli.io.run_directory import run_directory
    from hsivi_cli.io.samples import write_grid
    from hsivi_cli.methods import ddpm, training

    device = options.image_device(device, threads)
    options.check_choice("--schedule", schedule, tuple(training.SCHEDULES))
    with options.from_config(ctx, "data", config_file):
        images = read_images(data)
    pixels = torch.from_numpy(images.images).permute(0, 3, 1, 2).contiguous()
    shape = (pixels.shape[1], pixels.shape[2], pixels.shape[3])
    try:
        widths = tuple(int(c) for c in channels.split(",")) if channels else training.default_channels(max(shape[1:]))
    except ValueError as err:
        raise InputError(f"--channels {channels!r}: give whole numbers separated by commas, as 16,32,64") from err
    config = ddpm.DDPMConfig(
        unet=training.unet_arguments(shape, widths, blocks, attention),
        schedule={"num_train_timesteps": 1000, "beta_schedule": training.SCHEDULES[schedule]},
        steps=steps,
        batch=batch,
        lr=lr,
        warmup=warmup,
        ema=ema,
        flip=flip,
        precision=options.check_precision(precision, device),
        seed=seed,
        device=device,
        accumulate=accumulate,
        compiled=compiled,
    )
    training.check_memory_of_step(shape, config)
    source = {"source": images.source, "sha256": images.sha256, "n": len(pixels)}
    plan = training.resolved(config, source)
    flags = options.flags_of(plan.keys() - {"data", "unet", "schedule"}, FLAGS)
    with processes.led(lambda: run_directory(out, plan, resume, flags)) as had_run:
        processes.from_main(lambda: configuration.keep_options(ctx, out, resume))
        if resume and not had_run:
            console.story(f"{out} holds no run yet: starting one")
        console.story(f"training on {len(pixels)} images of {shape[1]}x{shape[2]} from {images.source}, {steps} steps")
        with follow("training", steps, out if tensorboard and processes.is_main() else None) as follower:

            def on_log(record: dict[str, float]) -> None:
                skipped = f"  {record['skipped']:.0f} steps skipped" if record["skipped"] else ""
                follower.on_log(record, f"loss {record['loss']:.5f}{skipped}")

            trained = training.train(
                pixels,
                config,
                out,
                had_run,
                preview_every,
                write_grid,
                on_log,
                on_step=follower.on_step,
                tell=console.warn,
                keep=keep,
            )
    if as_json:
        console.result_json({"out": str(out)} | asdict(trained))
    else:
        console.result_line(str(out))
