"""The metrics of a run: one JSON object a line, and their curves as a picture."""

import json
import math
import sys
from pathlib import Path
from typing import Any

from hsivi_cli.io.files import atomic_file, parse_json


def append_metrics(path: Path, record: dict[str, Any]) -> None:
    """Append one line, in a single write; what is not finite is null in it, for every JSON reader."""
    finite = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in record.items()}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(finite) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole records; a damaged line is left out: a last one cut short by a crash, or one without its step."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")  # what is no UTF-8 is no JSON either, or a wrong name
    except FileNotFoundError:
        return []
    records = []
    for line in text.splitlines():
        try:
            record = parse_json(line)
        except ValueError:
            continue
        if isinstance(record, dict) and is_number(record.get("step")):
            records.append(record)
    return records


def is_number(value: Any) -> bool:
    """Whether a value from a log is a finite number, that a float can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def rewind_metrics(path: Path, step: int) -> None:
    """Drop the lines after `step`, so that a resumed run does not repeat them."""
    if path.is_file():
        kept = [record for record in read_metrics(path) if record["step"] <= step]
        with atomic_file(path) as temporary:
            temporary.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")


def plot_metrics(records: list[dict[str, Any]], names: tuple[str, ...], path: Path) -> None:
    """Curves of the named metrics against the step, one panel each, as a PNG."""
    from matplotlib.figure import Figure

    names = tuple(name for name in names if any(name in record for record in records))
    if not names:
        return
    figure = Figure(figsize=(7, 2.2 * len(names)), layout="constrained")
    for axes, name in zip(figure.subplots(len(names), 1, squeeze=False).flat, names, strict=True):
        points = [(record["step"], record[name]) for record in records if is_number(record.get(name))]
        axes.plot([x for x, _ in points], [y for _, y in points], linewidth=1.2, marker="." if len(points) < 20 else "")
        axes.set_ylabel(name.replace("_", " "))
        axes.grid(alpha=0.3)
    axes.set_xlabel("step")
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
