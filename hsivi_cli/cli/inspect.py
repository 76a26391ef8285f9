"""`hsivi inspect`: what a checkpoint, a run or a file of tensors holds."""

from pathlib import Path
from typing import Annotated, Any

import typer

from hsivi_cli.cli import console, options


def inspect(
    path: Annotated[
        Path, typer.Argument(help="Teacher, student or run directory, 'shipped', .safetensors, .pt, .pt2 or .npz file.")
    ],
    as_json: options.AsJson = False,
) -> None:
    """Say what a checkpoint or run is: architecture, parameters, schedule, grid, hashes, metrics so far."""
    from hsivi_cli.io.files import asset
    from hsivi_cli.methods.describe import describe

    facts = describe(asset("mnist") if path == Path("shipped") and not path.exists() else path)
    if as_json:
        console.result_json(facts)
        return
    rows = [row for name, value in facts.items() for row in _rows(name, value)]
    console.result_table("", rows)


def _rows(name: str, value: Any) -> list[tuple[str, str]]:
    """One row a fact; a nested object gets a row for each of its own."""
    label = name
    if isinstance(value, dict) and value:
        nested = [row for key, item in value.items() for row in _rows(f"{name}.{key}", item)]
        return [(label, ""), *nested] if not label.count(".") and len(nested) > 8 else nested
    if isinstance(value, list | tuple):
        return [(label, " ".join(str(item) for item in value))]
    return [(label, "none" if value in (None, {}) else str(value))]
