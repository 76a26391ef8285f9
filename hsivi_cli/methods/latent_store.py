"""Latent-variable fits on disk: opened again for new rows and for fantasies, without the rows they were fitted to."""

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hsivi_cli.engine.checkpoint import load_checkpoint, save_checkpoint
from hsivi_cli.errors import InputError
from hsivi_cli.io.files import read_json, write_json
from hsivi_cli.io.rows import Rows, binarise, read_rows
from hsivi_cli.io.run_directory import REPORT
from hsivi_cli.methods.latent_fit import Prepared, Trained
from hsivi_cli.methods.latent_registry import METHODS, LatentOptions, config_from_json, config_to_json
from hsivi_cli.methods.posterior_store import STATE
from hsivi_cli.targets.latent import LatentModel, LatentTask, ModelConfig, build_model


@dataclass(frozen=True)
class OpenedLatent:
    """A fit: what draws latents, the model, the columns a row must have, and the report beside it.

    `gaps`: whether numbers were missing in the rows it was fitted to. `seen` are the least and the largest number (D,)
    of each column that the fit has seen; None where none can be far. Where `binarise` is a number, those of a row count
    as 1 above it, else as 0.
    """

    name: str
    posterior: Any
    model: LatentModel
    columns: tuple[str, ...]
    shape: tuple[int, int, int] | None
    kind: str
    alleles: dict[str, str]
    seen: tuple[Tensor, Tensor] | None
    gaps: bool
    binarise: float | None
    report: dict[str, Any]


def settings_of(options: LatentOptions) -> dict[str, Any]:
    """The options as a run directory keeps them: plain JSON; a resumed run must have the same."""
    lists = {name: list(getattr(options, name)) for name in ("compare", "columns", "settings")}
    return {"latent_model": True, **asdict(options), **lists}


def digest_of(rows: Rows) -> dict[str, Any]:
    """What must not change for a run to be resumed. Before the rows are reordered."""
    digest = hashlib.sha256("\n".join(rows.columns).encode())
    digest.update(rows.values.data)
    return {"rows": len(rows), "sha256": digest.hexdigest()}


def save_latent(
    directory: Path, trained: Trained, prepared: Prepared, report: dict[str, Any], threshold: float | None = None
) -> None:
    """Write what `open_latent` needs, and the report beside it; `threshold` is that of `--binarise`."""
    rows, model = prepared.rows, prepared.model
    write_json(directory / REPORT, report | {"model": _plain(model.to_json())})
    gaussian = model.likelihood == "gaussian" and rows.shape is None  # other numbers cannot be far
    tree = {
        "method": trained.name,
        "config": config_to_json(trained.state.config),
        "model": _plain(model.to_json()),
        "state": METHODS[trained.name].module.state_dict(trained.state),
        "columns": list(rows.columns),
        "shape": None if rows.shape is None else list(rows.shape),
        "kind": rows.kind,
        "alleles": dict(rows.alleles),
        "gaps": prepared.gaps,
        "seen": [torch.from_numpy(edge(rows.values, 0)) for edge in (np.nanmin, np.nanmax)] if gaussian else None,
        "binarise": threshold,
        "levels": list(trained.model.likelihood.levels),
        "labelled": prepared.labels is not None and trained.name == "ddvi",
    }
    save_checkpoint(directory / STATE, tree)


def open_latent(path: Path) -> OpenedLatent:
    """A saved fit. Raises InputError if it is unfinished or damaged."""
    if not (path / STATE).is_file():
        raise InputError(f"{path} holds an unfinished fit: go on with its command and --resume")
    try:
        tree, report = load_checkpoint(path / STATE), read_json(path / REPORT)
    except InputError as err:
        raise InputError(f"{err}: its command with --resume writes it anew from the checkpoint") from err
    try:
        return _restore(tree, report)
    except (KeyError, TypeError, RuntimeError) as err:
        raise InputError(f"{path / STATE} is damaged, or of another version ({str(err)[:80]}): fit again") from err


def _restore(tree: dict[str, Any], report: dict[str, Any]) -> OpenedLatent:
    name, config = tree["method"], config_from_json(tree["method"], tree["config"])
    module: Any = METHODS[name].module
    rows = _stand_in(tree)
    labels = torch.zeros(len(rows), dtype=torch.long) if tree["labelled"] else None
    model = build_model(ModelConfig.from_json(tree["model"]), rows)
    state = module.init(LatentTask(rows, model, labels), config)
    module.load_state_dict(state, tree["state"])
    shape, seen = tree["shape"], tree["seen"]
    return OpenedLatent(
        name,
        module.posterior(state),
        state.model,
        tuple(tree["columns"]),
        (shape[0], shape[1], shape[2]) if shape else None,
        tree["kind"],
        dict(tree["alleles"]),
        (seen[0], seen[1]) if seen else None,
        bool(tree["gaps"]),
        tree.get("binarise"),
        report,
    )


def read_new_rows(
    opened: OpenedLatent, source: str, on_rows: Callable[[int, int], None] = lambda done, total: None
) -> tuple[Rows, Float[Tensor, "n D"]]:
    """Rows for a fit, its columns in its order. Raises InputError for what is missing or impossible."""
    # images of another size have other columns, and would be told so pixel by pixel
    rows = read_rows(source, alleles=opened.alleles) if opened.shape else None
    if rows is not None and rows.shape is not None and opened.shape is not None and rows.shape != opened.shape:
        had, have = (f"{shape[0]}x{shape[1]}" for shape in (opened.shape, rows.shape))
        raise InputError(f"{source} holds images of {have}, the fit is of {had}")
    if rows is None or rows.shape is None:
        rows = read_rows(source, columns=opened.columns, alleles=opened.alleles, on_rows=on_rows)
    if opened.binarise is not None:
        rows = binarise(rows, opened.binarise)
    x = rows.tensor()
    try:
        opened.model.likelihood.check(x, opened.columns)
    except InputError as err:
        raise InputError(f"{source}: {err}") from err
    return rows, x


def _stand_in(tree: dict[str, Any]) -> Float[Tensor, "2 D"]:
    """Rows that a model can be built on before its state is restored: of categories, up to the highest level."""
    columns = len(tree["columns"])
    rows = torch.zeros(2, columns)
    rows[1] = torch.tensor(tree["levels"], dtype=torch.float32) - 1 if tree["levels"] else 1.0
    return rows


def _plain(tree: dict[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in tree.items()}
