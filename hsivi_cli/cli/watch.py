"""`hsivi watch`: the curves of a run in the terminal, while it is written and after."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hsivi_cli.cli import console
from hsivi_cli.cli.wording import duration, figure, pace

if TYPE_CHECKING:
    from hsivi_cli.engine.run_view import RunView, TrainingView

BLOCKS, ASCII = "▁▂▃▄▅▆▇█", "_.-=+*%#"
WIDEST = 60  # columns of a curve
OTHER_COLUMNS = 46  # what a row needs beside its curve
FIDS_SHOWN = 8


def watch(
    run: Annotated[Path, typer.Argument(help="Run directory of distill, train or fit-posterior --save.")],
    every: Annotated[float, typer.Option("--every", min=0.2, max=3600.0, help="Seconds between looks.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Print once and leave, as where stdout is no terminal.")] = False,
) -> None:
    """Watch a run: losses as curves, pace, time left, FIDs so far. It only reads; leave with Ctrl-C.

    Works on a run that is being written, on one that is finished, where it prints once, and on one that was stopped.
    """
    from hsivi_cli.engine.run_view import view_run

    console.result_watch(lambda screen, live: _look(view_run(run), screen, live), every, once)


def _look(view: "RunView", screen: Any, live: bool) -> tuple[Any, bool]:
    """What to show of a run on this rich console, and whether it will not change any more."""
    from rich.console import Group
    from rich.text import Text

    # a screen has room for one training: the one that wrote last
    latest = max(view.trainings, key=lambda training: training.written or 0.0, default=None)
    parts: list[Any] = [Text(f"{view.path}: {_status(view)}", style="bold")]
    if not view.trainings:
        parts.append(Text("nothing logged yet"))
    for training in view.trainings:
        parts += [Text(""), Text(_headline(view, training), style="bold")]
        if not live or training is latest:
            parts += _body(training, screen)
    return Group(*parts), view.finished and view.process is None


def _headline(view: "RunView", training: "TrainingView") -> str:
    if not training.curves:
        return f"{training.name}  nothing logged yet".strip()
    words = [f"step {training.step}" + (f"/{training.steps}" if training.steps else "")]
    if training.seconds_per_step is not None:
        words.append(pace(training.seconds_per_step))
    if not training.finished and view.process is not None and training.seconds_left is not None:
        words.append(f"about {duration(training.seconds_left)} left")
    return "  ".join(filter(None, (training.name, *words)))


def _body(training: "TrainingView", screen: Any) -> list[Any]:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    room = max(8, min(WIDEST, screen.width - OTHER_COLUMNS))
    blocks = BLOCKS if screen.encoding.lower().startswith("utf") else ASCII
    for name, curve in training.curves.items():
        values = [value for _, value in curve]
        span = f"{figure(min(values))} .. {figure(max(values))}"
        table.add_row(Text(name.replace("_", " ")), figure(values[-1]), sparkline(values, room, blocks), span)
    parts: list[Any] = [table] if training.curves else []
    for name, curve in training.curves.items():
        if name.startswith("fid@"):
            best = min(curve, key=lambda point: point[1])
            history = "  ".join(f"{step}: {figure(value)}" for step, value in curve[-FIDS_SHOWN:])
            parts.append(Text(f"{name} at step {history}; lowest {figure(best[1])} at {best[0]}"))
    return [*parts, *([Text(training.advice)] if training.advice else [])]


def _status(view: "RunView") -> str:
    from hsivi_cli.engine.run_view import seconds_since

    written = [training.written for training in view.trainings if training.written is not None]
    ago = f", last written {duration(seconds_since(max(written)))} ago" if written else ""
    if view.process is not None:
        return f"running as process {view.process}{ago}"
    return f"finished{ago}" if view.finished else f"no process writes it{ago}: go on with its command and --resume"


def sparkline(values: Sequence[float], width: int, blocks: str = BLOCKS) -> str:
    """A curve as a line of `width` characters at most, each the mean of as many values, the lower the emptier.

    Where there are many, the twentieth at either end is cut off: one spike must not flatten all that follows. Raises
    ValueError if there are no values.
    """
    if not values:
        raise ValueError("a curve needs values")
    n = min(width, len(values))
    bins = [values[i * len(values) // n : (i + 1) * len(values) // n] for i in range(n)]
    means = [sum(part) / len(part) for part in bins]
    cut, ordered = n // 20, sorted(means)
    low, high = ordered[cut], ordered[n - 1 - cut]
    if not high > low:
        return blocks[0] * n
    heights = (int((mean - low) / (high - low) * len(blocks)) for mean in means)
    return "".join(blocks[min(max(height, 0), len(blocks) - 1)] for height in heights)
