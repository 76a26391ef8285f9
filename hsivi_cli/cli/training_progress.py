"""Progress of a training: a live bar where stderr is a terminal, elsewhere a plain line every half minute."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from hsivi_cli.cli import console
from hsivi_cli.cli.wording import duration, pace
from hsivi_cli.io.event_log import EventLog

SECONDS_BETWEEN_LINES = 30.0  # a log of a long run must not be flooded
SECONDS_TO_SECOND_LINE = 5.0  # the first that knows the pace


class Pace:
    """Seconds a step since this process took up the training: what ran before a resumption is not counted.

    Nor is the first step, which pays for warming up.
    """

    def __init__(self, steps: int, clock: Callable[[], float]) -> None:
        self.steps, self._clock = steps, clock
        self._began = self._latest = clock()
        self.step = self._first = 0
        self._since: float | None = None

    def at(self, step: int) -> None:
        """Note that this step is done; one that is not above the last begins anew, as after a roll-back."""
        now = self._clock()
        if self._since is None or step <= self.step:
            self._since, self._first = now, step
        self.step, self._latest = step, now

    @property
    def seconds_per_step(self) -> float | None:
        """The mean; None as long as there is nothing to measure."""
        if self._since is None or self.step <= self._first:
            return None
        return (self._latest - self._since) / (self.step - self._first)

    @property
    def seconds_left(self) -> float | None:
        """What remains at that pace; it counts down between steps."""
        rate = self.seconds_per_step
        if rate is None:
            return None
        return max(0.0, (self.steps - self.step) * rate - (self._clock() - self._latest))

    def __str__(self) -> str:
        rate, left = self.seconds_per_step, self.seconds_left
        words = [pace(rate)] if rate is not None else []
        if self.step >= self.steps:
            words.append(f"took {duration(self._latest - self._began)}")
        elif left is not None:
            words.append(f"about {duration(left)} left")
        return "  ".join(words)


class _Display(Protocol):
    """What is moved by every step, and shows from then on what a log line had to say."""

    def on_step(self, step: int) -> None: ...

    def say(self, text: str) -> None: ...


class Follower:
    """Follows one training: its steps and its log lines go to the display, and to the event files if there are any."""

    def __init__(self, display: _Display, events: EventLog | None) -> None:
        self._display, self._events = display, events

    def on_step(self, step: int) -> None:
        """This step is done."""
        if self._events is not None:
            self._events.on_step(step)
        self._display.on_step(step)

    def on_log(self, record: dict[str, Any], text: str) -> None:
        """Its log line: figures for the event files, and what to say of them."""
        if self._events is not None:
            self._events.add(record)
        self._display.say(text)


@contextmanager
def follow(title: str, steps: int, events: Path | None = None) -> Iterator[Follower]:
    """Show a training on stderr until the block ends; a bar leaves its last state.

    `events` names a directory for TensorBoard's event files; raises InputError if that is not installed.
    """
    terminal = console.story_terminal()
    log = EventLog(events) if events is not None else None
    try:
        with _lines(title, steps) if terminal is None else _bar(title, steps, terminal) as display:
            yield Follower(display, log)
    finally:
        if log is not None:
            log.close()


class _Lines:
    """A line for the first step, so that a log shows that it runs, one with a pace soon, then one every half minute."""

    def __init__(self, title: str, steps: int) -> None:
        self._title, self._text, self._pace = title, "", Pace(steps, time.monotonic)
        self._told_at, self._told_step, self._wait = 0.0, 0, 0.0

    def on_step(self, step: int) -> None:
        self._pace.at(step)
        # the last step is told when all of it is known, at the end
        if step < self._pace.steps and time.monotonic() - self._told_at >= self._wait:
            self.tell()

    def say(self, text: str) -> None:
        self._text = text

    def tell(self) -> None:
        """Print the line, if it has not been printed for this step."""
        step = self._pace.step
        if step != self._told_step:
            self._wait = SECONDS_BETWEEN_LINES if self._wait else SECONDS_TO_SECOND_LINE
            self._told_at, self._told_step = time.monotonic(), step
            words = (self._title, f"step {step}/{self._pace.steps}", str(self._pace), self._text)
            console.story("  ".join(filter(None, words)))


@contextmanager
def _lines(title: str, steps: int) -> Iterator[_Lines]:
    lines = _Lines(title, steps)
    yield lines
    lines.tell()


@contextmanager
def _bar(title: str, steps: int, terminal: Any) -> Iterator[_Display]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
    from rich.text import Text

    measured, said = Pace(steps, time.monotonic), Text("", no_wrap=True, overflow="ellipsis")

    class PaceColumn(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(str(measured), no_wrap=True)

    class Bar(Progress):
        def get_renderables(self) -> Iterator[Any]:
            yield self.make_tasks_table(self.tasks)
            if said.plain:
                yield said

    class Shown:
        def on_step(self, step: int) -> None:
            bar.start()  # only now: of a training that was finished before there is nothing to show
            measured.at(step)
            bar.update(task, completed=step)

        def say(self, text: str) -> None:
            said.plain = "  " + text

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), PaceColumn())
    bar = Bar(*columns, console=terminal)
    task = bar.add_task(title, total=steps)
    try:
        yield Shown()
    finally:
        bar.stop()
