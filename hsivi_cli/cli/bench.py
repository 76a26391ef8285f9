"""`hsivi bench`: how fast this machine samples, against the peers, all sides in one run."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hsivi_cli.cli import configuration, console, options

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hsivi_cli.methods.benchmark import Case, Row
    from hsivi_cli.methods.benchmark_same import SameImages, SameLosses

WHAT = ("sample", "distill", "kernels", "same")


def bench(
    student: Annotated[
        Path | None, typer.Argument(help="Student or run directory. Default: the shipped student.")
    ] = None,
    nfe: Annotated[int | None, typer.Option("--nfe", min=1, help="Network evaluations an image.")] = None,
    what: Annotated[
        str,
        typer.Option(
            "--what",
            help="sample, distill, kernels; same: what kernels must not change. Several with commas.",
        ),
    ] = "sample",
    batch: Annotated[str, typer.Option("--batch", help="Batch sizes, as 1,64,256.")] = "1,64",
    precision: Annotated[str, typer.Option("--precision", help="fp32, bf16, fp16, or several with commas.")] = "fp32",
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Rounds; each side is timed once a round.")] = 10,
    compile_modes: Annotated[
        str, typer.Option("--compile", help="Modes of torch.compile to time too, as default,reduce-overhead.")
    ] = "",
    cifar: Annotated[
        bool, typer.Option("--cifar", help="A CIFAR-sized network of random weights, in place of a student.")
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="First check every kernel against its reference; exit code 3 if one is off.")
    ] = False,
    images: Annotated[int, typer.Option("--images", min=2, help="Images that --what same draws both ways.")] = 1000,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Steps that --what same distils both ways.")] = 100,
    reference: Annotated[
        str | None, typer.Option("--reference", help="--what same: also the FID against this (see hsivi evaluate).")
    ] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Also draw the times, as a PNG.")] = None,
    device: options.Device = "auto",
    threads: options.Threads = 0,
    as_json: options.AsJson = False,
    config_file: configuration.ConfigFile = None,
) -> None:
    """Time sampling, distillation and kernels: ours, plain torch, torch.compile and diffusers' pipeline.

    The sides take turns in one run; the table says which is faster. On a GPU: `hsivi bench --cifar --check --what
    kernels,sample --batch 1,64,256 --precision bf16 --compile reduce-overhead --json`.
    """
    import torch

    from hsivi_cli.errors import GateError, InputError
    from hsivi_cli.evaluation.reference import fid_against
    from hsivi_cli.methods import benchmark
    from hsivi_cli.methods.benchmark_kernels import check_kernels, kernel_cases
    from hsivi_cli.methods.benchmark_same import same_images, same_losses
    from hsivi_cli.methods.sampling import DEFAULT_NFE
    from hsivi_cli.methods.student import load_student, select_student

    place = torch.device(options.image_device(device, threads))
    wanted = [options.check_choice("--what", item, WHAT) for item in what.split(",")]
    batches = options.parse_integers("--batch", batch)
    if min(batches) < 1:
        raise InputError(f"--batch {batch}: give positive numbers, as 1,64")
    precisions = [options.check_precision(item) for item in precision.split(",")]
    modes = tuple(filter(None, compile_modes.split(",")))
    if check:
        options.resolve_kernels("triton", str(place))
    if cifar:
        model = benchmark.cifar_student(place, nfe or DEFAULT_NFE)
    else:
        shipped = DEFAULT_NFE if student is None and nfe is None else nfe
        model = load_student(select_student(student, shipped), str(place))
    accuracy = check_kernels(place) if check else []
    machine = benchmark.measure_machine(place, precisions)
    rows: list[Row] = []
    same: list[SameImages | SameLosses] = []
    at_once = 64 if 64 in batches else batches[0]  # what kernels must not change is looked at once, not for every size
    for size in batches:
        for kind in precisions:
            for item in wanted:
                if item == "same" and size != at_once:
                    continue
                console.story(f"{item}, batch {size}, {kind}")
                cases: Iterable[Case]
                if item == "sample":
                    cases = [benchmark.sample_case(model, size, kind, modes)]
                elif item == "distill":
                    cases = [benchmark.distill_case(model, size, kind, modes)]
                elif item == "same":
                    fid = fid_against(reference, (*model.shape[1:], model.shape[0]), str(place)) if reference else None
                    same.append(same_images(model, images, size, kind, fid))
                    same.append(same_losses(model, steps, size, kind))
                    continue
                else:
                    cases = kernel_cases(place, size, kind, bool(modes))
                for case in cases:
                    found = benchmark.run_case(case, machine, repeats, place, _tell_failure)
                    rows += found
                    for row in found:  # at once: a long list may be cut short
                        console.story(f"  {row.case}, {row.side}: {row.timing.median * 1e3:.3f} ms")
    off = [a for a in accuracy if not a.error <= a.bound]
    if plot is not None:
        benchmark.plot_rows(rows, plot)
    if as_json:
        payload: dict[str, Any] = {"machine": dataclasses.asdict(machine), "torch": torch.__version__}
        payload |= {"threads": torch.get_num_threads(), "rows": [dataclasses.asdict(row) for row in rows]}
        payload |= {"same": [dataclasses.asdict(found) for found in same]}
        console.result_json(payload | {"accuracy": [dataclasses.asdict(a) for a in accuracy]})
    else:
        if rows:
            _print(rows)
        if same:
            _print_same(same)
    if off:
        worst = max(off, key=lambda a: a.error / a.bound)
        raise GateError(f"{len(off)} kernel results are off, the worst: {worst.kernel} by {worst.error:.1e}")


def _tell_failure(side: str, error: Exception) -> None:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    console.warn(f"{side} is left out: {reason}")


def _print_same(same: "list[SameImages | SameLosses]") -> None:
    table = []
    for found in same:
        fields = dataclasses.asdict(found)
        kernels = "triton" if fields.pop("with_kernels") == "triton" else "torch references"
        precision = fields.pop("precision")
        differences = fields.pop("max_relative_difference", {}).items()
        fields |= {f"{name}, relative difference at most": f"{value:.1e}" for name, value in differences}
        table += [(kernels, precision, name.replace("_", " "), str(v)) for name, v in fields.items() if v is not None]
    console.result_table("With and without kernels", table, ("kernels", "precision", "what", "value"))


def _print(rows: "list[Row]") -> None:
    from hsivi_cli.methods.benchmark import relative_to_best

    table = []
    for row, ratio in zip(rows, relative_to_best(rows), strict=True):
        timing = row.timing
        share = f"{row.bandwidth_share:.0%} of copy" if row.bandwidth_share else ""
        share += f"{row.matmul_share:.0%} of matmul" if row.matmul_share else ""
        spread = f"{timing.low * 1e3:.3f}..{timing.high * 1e3:.3f}"
        verdict = "fastest" if ratio == 1 else f"{ratio:.2f} x the fastest"
        place = (row.case, str(row.batch), row.precision, row.side)
        table.append((*place, f"{timing.median * 1e3:.3f}", spread, share, verdict))
    header = ("case", "batch", "precision", "side", "ms", "quartiles", "share", "")
    console.result_table("Benchmark", table, header)
