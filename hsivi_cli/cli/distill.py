"""`hsivi distill`: a pretrained score network into few-step students, without data."""

import dataclasses
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hsivi_cli.cli import configuration, console, options
from hsivi_cli.cli.training_progress import Follower, follow
from hsivi_cli.cli.wording import figure
from hsivi_cli.engine import processes

if TYPE_CHECKING:
    from hsivi_cli.engine.diagnosis import Diagnosis
    from hsivi_cli.methods.distillation import Outputs
    from hsivi_cli.methods.hsivi_sm import DistillConfig
    from hsivi_cli.targets.score_net import ScoreNet

# the published recipe of HSIVI-SM for CIFAR-10 (arXiv 2310.17153)
PAPER_CRITIC_STEPS, PAPER_LR, PAPER_LR_CRITIC = 20, 1.6e-5, 8e-5

# settings that are not called as on the command line, and those that no option is the name of; see `check_run`
FLAGS = {
    "lr_student": "--lr",
    "grids": "--nfe",
    "grids.*": "--grid",
    "teacher_sha256": "the teacher is not what it was: --score-net's weights, its schedule or --network's file changed",
    "init_from_sha256": "the student of --init-from is not what it was",
}


def distill(
    ctx: typer.Context,
    score_net: Annotated[
        Path,
        typer.Option(
            "--score-net", help="Teacher: a diffusers directory, a hub id, or a file of weights (.safetensors, .pt)."
        ),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", help="Run directory to write (not needed with --dry-run).")
    ] = None,
    nfe: Annotated[
        str, typer.Option("--nfe", help="Network evaluations an image, one student each, as 10 or 5,10.")
    ] = "10",
    objective: Annotated[
        str, typer.Option("--objective", help="diffused-kl, diffused-fisher, or sm (the paper's).")
    ] = "diffused-kl",
    grid: Annotated[
        str, typer.Option("--grid", help="quad, uniform, or K+1 increasing times as 0,50,200,800.")
    ] = "quad",
    eta: Annotated[float, typer.Option("--eta", min=0.01, max=1.0, help="Noise of a layer, as in DDIM.")] = 0.2,
    log_gamma: Annotated[str, typer.Option("--log-gamma", help="Learned noise levels: map, layer or scalar.")] = "map",
    steps: Annotated[int, typer.Option("--steps", min=1, help="Student steps.")] = 2000,
    critic_steps: Annotated[
        int, typer.Option("--critic-steps", min=0, help="Critic steps a student step; 0: 5, or 20 for --objective sm.")
    ] = 0,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Layer inputs a critic or student step.")] = 128,
    rollout: Annotated[int, typer.Option("--rollout", min=0, help="Chains a rollout; 0: 2 batch / K, at least 8.")] = 0,
    rollout_cache: Annotated[
        bool, typer.Option("--rollout-cache/--no-rollout-cache", help="Reuse a rollout for all critic steps.")
    ] = True,
    lr: Annotated[
        float | None,
        typer.Option("--lr", min=0.0, max=100.0, help="Student's rate; default 1e-4, for sm 1.6e-5."),
    ] = None,
    lr_critic: Annotated[
        float | None,
        typer.Option("--lr-critic", min=0.0, max=100.0, help="Critic's rate; default 3e-4, for sm 8e-5."),
    ] = None,
    lr_schedule: Annotated[str, typer.Option("--lr-schedule", help="cosine, exponential or constant.")] = "cosine",
    warmup: Annotated[int, typer.Option("--warmup", min=0, help="Student steps of linear warm-up.")] = 20,
    clip: Annotated[float, typer.Option("--clip", min=1e-12, help="Largest gradient norm.")] = 1.0,
    ema: Annotated[float, typer.Option("--ema", min=0.0, max=0.99999, help="Decay of the averaged student.")] = 0.995,
    warm_start: Annotated[
        bool, typer.Option("--warm-start", help="Start each student from the next larger NFE in the list.")
    ] = False,
    init_from: Annotated[
        Path | None, typer.Option("--init-from", help="Start from this student directory, not the teacher.")
    ] = None,
    precision: options.Precision = "fp32",
    accumulate: options.Accumulate = 1,
    compiled: options.Compile = False,
    preview_every: Annotated[int, typer.Option("--preview-every", min=0, help="Student steps between previews.")] = 200,
    reference: Annotated[
        str | None, typer.Option("--reference", help="Measure FID against this at every preview (see hsivi evaluate).")
    ] = None,
    fid_images: Annotated[int, typer.Option("--fid-images", min=2, help="Images for that FID.")] = 1000,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Resolve everything, time one step, print the cost, write nothing.")
    ] = False,
    network: options.Network = None,
    shape: options.Shape = None,
    schedule: options.Schedule = None,
    beta_start: options.BetaStart = None,
    beta_end: options.BetaEnd = None,
    timesteps: options.Timesteps = None,
    prediction: options.Prediction = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted run: same options plus this.")
    ] = False,
    keep: options.Keep = 2,
    seed: options.Seed = 0,
    kernels: options.Kernels = "auto",
    device: options.Device = "auto",
    threads: options.Threads = 0,
    tensorboard: options.TensorBoard = False,
    as_json: options.AsJson = False,
    config_file: configuration.ConfigFile = None,
) -> None:
    """Distil a diffusion score network into few-step HSIVI samplers, one for each NFE. Needs no data.

    A run can be stopped at any time and continued with --resume; draw from it with `hsivi sample RUN --nfe K`. With
    --reference the student of the lowest FID is kept too: `hsivi sample RUN/nfeK-best`.
    """
    from hsivi_cli.bridges.schedule import make_grid
    from hsivi_cli.errors import InputError
    from hsivi_cli.io.run_directory import check_run, run_directory
    from hsivi_cli.methods import distillation
    from hsivi_cli.methods.hsivi_sm import DistillConfig, check_donor, check_teacher
    from hsivi_cli.methods.student import DESCRIPTION, find_best, load_student
    from hsivi_cli.networks.noise_prediction import PlainNetwork
    from hsivi_cli.targets.score_net import load_score_net

    device = options.image_device(device, threads)
    nfes = options.parse_integers("--nfe", nfe)
    if warm_start:
        nfes = sorted(nfes, reverse=True)
    times = grid if grid in ("quad", "uniform") else options.parse_integers("--grid", grid)
    if out is None and not dry_run:
        raise InputError("--out is missing: name a run directory to write, or use --dry-run")
    about = options.network_options(network, shape, schedule, beta_start, beta_end, timesteps, prediction)
    # a JSON says how to read the teacher's file; its students are saved as networks that need none
    code = None if network and network.endswith(".json") else network
    with console.guarded_stdout(), options.from_config(ctx, "score_net", config_file):  # of a user's own file
        teacher = load_score_net(score_net, device, about)
        check_teacher(teacher)
    for note in teacher.notes:
        console.story(note)
    paper = options.check_choice("--objective", objective, ("diffused-kl", "diffused-fisher", "sm")) == "sm"
    settings: dict[str, Any] = {
        "steps": steps,
        "objective": objective,
        "eta": eta,
        "batch": batch,
        "rollout": rollout,
        "rollout_cache": rollout_cache,
        "critic_steps": critic_steps or (PAPER_CRITIC_STEPS if paper else 5),
        "lr_student": (PAPER_LR if paper else 1e-4) if lr is None else lr,
        "lr_critic": (PAPER_LR_CRITIC if paper else 3e-4) if lr_critic is None else lr_critic,
        "warmup": warmup,
        "lr_schedule": options.check_choice("--lr-schedule", lr_schedule, ("cosine", "exponential", "constant")),
        "clip": clip,
        "ema": ema,
        "log_gamma": options.check_choice("--log-gamma", log_gamma, ("map", "layer", "scalar")),
        "precision": options.check_precision(precision, device),
        "seed": seed,
    }
    grids = {k: make_grid(times, k, teacher.schedule) for k in nfes}
    # how it is computed, which a run may change when it is resumed
    with_kernels = options.resolve_kernels(kernels, device, compiled)
    how: dict[str, Any] = {"device": device, "kernels": with_kernels, "accumulate": accumulate, "compiled": compiled}
    configs = {k: DistillConfig(grid=grids[k], **settings, **how) for k in nfes}
    for config in configs.values():
        distillation.check_memory_of_step(teacher.shape, config)
    if init_from is not None and not init_from.is_file() and not (init_from / DESCRIPTION).is_file():
        what = "holds no student itself" if init_from.exists() else "does not exist"
        raise InputError(f"--init-from {init_from} {what}: name the directory of a student, as RUN/nfe5")
    with console.guarded_stdout():
        donor = load_student(init_from, device, code) if init_from else None
    if donor is not None:
        check_donor(teacher, donor)
    plan = settings | {"teacher_sha256": teacher.sha256, "grids": {str(k): list(grids[k]) for k in nfes}}
    plan |= {"warm_start": warm_start, "init_from_sha256": donor.sha256 if donor else None}
    flags = options.flags_of(plan, FLAGS)
    outputs = _outputs(teacher, reference, fid_images, preview_every, device, keep)
    if out is not None:
        processes.from_main(lambda: check_run(out, plan, resume, flags))
    if dry_run:
        _report_cost(teacher, configs, as_json)
        return
    assert out is not None
    with processes.led(lambda: run_directory(out, plan, resume, flags)) as had_run:
        processes.from_main(lambda: configuration.keep_options(ctx, out, resume))
        if resume and not had_run:
            console.story(f"{out} holds no run yet: starting one")
        start = init_from
        for k, config in configs.items():
            console.story(f"NFE {k}: {config.objective}, grid {' '.join(map(str, config.grid))}, {steps} student steps")
            events = distillation.training_directory(out, k) if tensorboard and processes.is_main() else None
            with console.guarded_stdout(), follow(f"NFE {k}", steps, events) as follower:
                distillation.distill(teacher, config, out, _followed(outputs, follower), start, code)
            start = distillation.student_directory(out, k) if warm_start else init_from
    if as_json:
        console.result_json({"run": str(out), "students": [str(distillation.student_directory(out, k)) for k in nfes]})
    else:
        console.result_line(str(out))
    for k, best in find_best(out).items():
        console.story(f"lowest FID at a preview for NFE {k}: {best}")
    own = f" --network {shlex.quote(network)}" if isinstance(teacher.unet, PlainNetwork) and network else ""
    console.story(f"draw from it: hsivi sample {shlex.quote(str(out))} --nfe {nfes[0]}{own}")


def _outputs(
    teacher: "ScoreNet", reference: str | None, fid_images: int, preview_every: int, device: str, keep: int
) -> "Outputs":
    from hsivi_cli.io.samples import write_grid
    from hsivi_cli.methods.distillation import Outputs

    fid, protocol = None, {}
    if reference is not None:
        from hsivi_cli.evaluation.reference import fid_against

        channels, height, width = teacher.shape
        fid = fid_against(reference, (height, width, channels), device)
        protocol = {"reference_sha256": fid.reference_sha256, "extractor_sha256": fid.extractor_sha256}
    images = fid_images if fid else 0
    return Outputs(
        lambda record, diagnosis: None,
        write_grid,
        preview_every,
        fid,
        images,
        protocol,
        tell=console.warn,
        keep=keep,
    )


def _followed(outputs: "Outputs", follower: Follower) -> "Outputs":
    """The outputs of one training: what it logs is shown, with the last FID that was measured."""
    last_fid = ""

    def on_log(record: dict[str, Any], diagnosis: "Diagnosis") -> None:
        nonlocal last_fid
        name = f"fid@{outputs.fid_images}"
        if name in record:
            last_fid = f"{name} {record[name]:.4f} (step {record['step']})"
        found = {"mismatch": diagnosis.mismatch, "critic_error": diagnosis.critic_error}
        skipped = f"{record['skipped']:.0f} steps skipped" if record["skipped"] else ""
        words = (f"mismatch {diagnosis.mismatch:.4f}", f"critic error {diagnosis.critic_error:.4f}", last_fid)
        follower.on_log(record | found, "  ".join(filter(None, (*words, diagnosis.advice, skipped))))

    return dataclasses.replace(outputs, on_log=on_log, on_step=follower.on_step)


def _report_cost(teacher: "ScoreNet", configs: dict[int, "DistillConfig"], as_json: bool) -> None:
    from hsivi_cli.methods import distillation

    report = []
    for k, config in configs.items():
        console.story(f"NFE {k}: timing a step of --batch {config.batch}, after another that warms up")
        with console.guarded_stdout():
            cost = distillation.dry_run(teacher, config)
        about = {"teacher": type(teacher.unet).__name__, "shape": list(teacher.shape), **teacher.schedule.config}
        about.pop("trained_betas", None)
        report.append({"nfe": k, **about, **distillation.resolved(config), "seconds_per_step": cost.seconds_per_step})
        report[-1] |= {"memory_bytes": cost.memory_bytes, "total_seconds": cost.total_seconds}
        report[-1] |= {"rollout_chains": config.rollout_chains}
    total = sum(row["total_seconds"] for row in report)
    if as_json:
        console.result_json({"dry_run": report, "total_seconds": total})
        return
    for row in report:
        said = {"rollout": f"{row['rollout_chains']} chains", "seconds_per_step": figure(row["seconds_per_step"])}
        apart = ("memory_bytes", "total_seconds", "rollout_chains")
        fields = [(name, said.get(name, str(value))) for name, value in row.items() if name not in apart]
        fields += [("memory", f"{row['memory_bytes'] / 2**20:.0f} MiB")]
        fields += [("expected total", f"{row['total_seconds'] / 60:.1f} minutes, previews not counted")]
        console.result_table(f"Dry run for NFE {row['nfe']}", fields)
    if len(report) > 1:
        console.result_table("", [(f"expected total, all {len(report)} students", f"{total / 60:.1f} minutes")])
