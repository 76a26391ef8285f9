"""The only place that writes to stdout or stderr: stdout is the result, stderr is the story.

Of several processes (engine.processes) the first alone talks.
"""

import json
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from functools import cache, partial
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table

import hsivi_cli
from hsivi_cli.engine import processes
from hsivi_cli.errors import RunError

SECONDS_BETWEEN_LINES = 10.0
_PACKAGE = Path(hsivi_cli.__file__).parent
_stderr = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)


def story(message: str) -> None:
    """One line of the story, to stderr; markup is not interpreted, so paths with brackets survive."""
    if processes.talks():
        _stderr.print(message, markup=False)


def warn(message: str) -> None:
    """A warning, to stderr."""
    if processes.talks():
        _stderr.print(f"warning: {message}", markup=False, style="yellow")


def error(message: str, bug: BaseException | None = None) -> None:
    """The one line a failed command ends with, to stderr; above it where a `bug` came from. One process tells it."""
    if not processes.speaks():
        return
    if bug is not None:
        traceback.print_exception(bug)
    where = "" if processes.is_main() else f"process {processes.rank()}: "
    _stderr.print(f"error: {where}{message}", markup=False, style="red")


def stdout() -> TextIO:
    """Where results go; raises RunError if the caller has closed it (`>&-`)."""
    if not processes.talks():
        return _nowhere()
    if sys.stdout is None:
        raise RunError("stdout is closed: there is nowhere to print the result")
    return sys.stdout


def result_json(payload: dict[str, Any]) -> None:
    """Print one JSON object as the result, to stdout; not-a-number becomes null so that every parser reads it."""
    result_line(json.dumps(_finite(payload), allow_nan=False))


def result_line(line: str) -> None:
    """Print one plain line of the result, to stdout."""
    stdout().write(line + "\n")
    stdout().flush()


def result_bytes(data: bytes | memoryview) -> None:
    """Stream binary results to stdout, all of them: an unbuffered stream (PYTHONUNBUFFERED) takes a part at a time."""
    rest, stream = memoryview(data), stdout().buffer
    while rest:
        rest = rest[stream.write(rest) :]
    stream.flush()


def result_table(title: str, rows: Sequence[tuple[str, ...]], header: tuple[str, ...] | None = None) -> None:
    """Print a table as the result, to stdout."""
    on_terminal = stdout().isatty()
    table = Table(title=title, title_justify="left", show_header=header is not None, box=None, pad_edge=False)
    for name in header or tuple("" for _ in rows[0]):
        table.add_column(name, overflow="fold", no_wrap=not on_terminal)
    for row in rows:
        table.add_row(*(cell.replace("[", r"\[") for cell in row))
    # off a terminal a row is a line, however long, so that names and hashes can be searched for
    width = None if on_terminal else 10_000
    Console(file=stdout(), highlight=False, width=width, emoji=False).print(table)


@cache
def _nowhere() -> TextIO:
    return open(os.devnull, "w", encoding="utf-8")


def story_terminal() -> Console | None:
    """The console of the story where stderr is a terminal, for what is redrawn in place; None elsewhere."""
    redrawn = sys.stderr is not None and sys.stderr.isatty() and not _stderr.is_dumb_terminal
    return _stderr if redrawn and processes.talks() else None


def result_watch(look: Callable[[Console, bool], tuple[Any, bool]], seconds: float, once: bool) -> None:
    """Show what `look(screen, live)` returns, a renderable and whether it is final, every so often until it is.

    Once only, if asked or where stdout is no terminal. Ctrl-C is how a user leaves, and no failure.
    """
    live_here = stdout().isatty() and not once
    # off a terminal a line is a line, however long
    screen = Console(file=stdout(), highlight=False, emoji=False, width=None if stdout().isatty() else 10_000)
    shown, final = look(screen, live_here)
    if final or not live_here:
        screen.print(look(screen, False)[0])
        return
    from rich.live import Live

    with suppress(KeyboardInterrupt), Live(shown, console=screen, auto_refresh=False, vertical_overflow="crop") as live:
        while not final:
            time.sleep(seconds)
            shown, final = look(screen, True)
            live.update(shown, refresh=True)


@contextmanager
def guarded_stdout() -> Iterator[None]:
    """Send to stderr what other code prints, such as a user's model file: stdout is for the result alone."""
    with redirect_stdout(sys.stderr if processes.talks() else _nowhere()):
        yield


@contextmanager
def told_warnings() -> Iterator[None]:
    """Tell what our modules below cli/ warn of (`warnings.warn`) as `warn` does, each sentence once.

    What others warn of is shown as Python shows it.
    """
    told, shown = set[str](), warnings.showwarning

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        sentence = " ".join(str(message).split())
        if category is not UserWarning or not Path(filename).is_relative_to(_PACKAGE):
            shown(message, category, filename, lineno, file, line)
        elif sentence not in told:
            told.add(sentence)
            warn(sentence)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = shown


class Advance:
    """Moves a progress bar: `advance(n)` by n, `advance.to(n)` to n."""

    def __init__(self, update: Callable[..., None]) -> None:
        self._update = update

    def __call__(self, n: int) -> None:
        self._update(advance=n)

    def to(self, n: float, total: float | None = None) -> None:
        """Set the bar to n finished, of as many as are now known."""
        self._update(completed=n) if total is None else self._update(completed=n, total=total)


class _Lines:
    """What a bar would show, as a line now and then, for a log."""

    def __init__(self, title: str, total: float) -> None:
        self.title, self.total, self.done = title, total, 0.0
        self.began = self.told = time.monotonic()

    def __call__(self, advance: float = 0, completed: float | None = None, total: float | None = None) -> None:
        self.done = self.done + advance if completed is None else completed
        self.total, now = total or self.total, time.monotonic()
        if now - self.told < SECONDS_BETWEEN_LINES or not 0 < self.done < self.total:
            return
        self.told = now
        left = (now - self.began) * (self.total / self.done - 1)
        story(f"{self.title} {self.done:.0f} of {self.total:.0f}, about {left:.0f} s left")


@contextmanager
def progress(title: str, total: int, lines: bool = False) -> Iterator[Advance]:
    """A bar on stderr where that is a terminal, elsewhere nothing, or `lines` where it takes long; yields its mover."""
    if lines and not sys.stderr.isatty():
        yield Advance(_Lines(title, total))
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    silent = not (sys.stderr.isatty() and processes.talks())
    with Progress(*columns, console=_stderr, disable=silent, transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield Advance(partial(bar.update, task))


def _finite(value: Any) -> Any:
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
