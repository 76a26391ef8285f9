"""Amortised fits: trained in a run directory, kept there, and opened again with or without the model's file."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hsivi_cli.engine import loop
from hsivi_cli.engine.checkpoint import load_checkpoint, save_checkpoint
from hsivi_cli.errors import InputError
from hsivi_cli.io.files import read_json
from hsivi_cli.io.run_directory import CONFIG, REPORT, checkpoints
from hsivi_cli.methods import amortised
from hsivi_cli.methods.amortised_draws import Constrain
from hsivi_cli.methods.posterior_store import STATE
from hsivi_cli.networks.posterior_encoder import Encoder, EncoderConfig, build_encoder
from hsivi_cli.targets.amortised import AmortisedTarget, load_amortised, read_observations
from hsivi_cli.targets.source import Source, load_source, read_source, save_source
from hsivi_cli.targets.supports import Parameter, constrain_all
from hsivi_cli.targets.user_model import model_maker

NEVER = 2**62  # checkpoints come by the clock, and at the end
LOG_EVERY = 100


@dataclass(frozen=True)
class Opened:
    """A fit to draw from. Without the model's file `target` is None and observations are read by `columns`.

    `order` is that of the columns in the table of the fit.
    """

    encoder: Encoder
    config: amortised.Config
    constrain: Constrain
    columns: tuple[str, ...] | None
    target: AmortisedTarget | None
    make: Callable[[Any], Any] | None
    report: dict[str, Any]
    order: tuple[str, ...] = ()

    @property
    def encoder_width(self) -> int:
        """How many numbers an observation has."""
        shape = self.encoder.observation_shape
        assert shape is not None
        return math.prod(shape)


def train(
    target: AmortisedTarget,
    config: amortised.Config,
    directory: Path,
    on_log: Callable[[dict[str, Any]], None],
    resume: bool,
) -> amortised.State:
    """Train in `directory`, or go on with what is there. Raises InputError, RunError and InterruptError."""
    state = amortised.init(target, config)
    if resume and checkpoints(directory):
        loop.resume(amortised, state, directory)
    settings = loop.LoopConfig(config.steps, config.seed, LOG_EVERY, checkpoint_every=NEVER)
    hooks = loop.Hooks(lambda record: on_log(record | {"steps": config.steps}))
    if stopped := loop.run_loop(amortised, state, settings, directory, hooks):
        raise stopped("interrupted after the last step; checkpoint written, go on with --resume")
    return state


def config_of(tree: dict[str, Any]) -> amortised.Config:
    """The configuration that a run directory keeps as JSON."""
    fields = {name: tree[name] for name in amortised.Config.__dataclass_fields__ if name in tree}
    encoder = EncoderConfig(**(fields.pop("encoder") | {"hidden": tuple(tree["encoder"]["hidden"])}))
    shape = fields.pop("shape", None)
    return amortised.Config(**fields, encoder=encoder, shape=tuple(shape) if shape else None)


def save_amortised(directory: Path, state: amortised.State, source: Source, data: Any) -> None:
    """Write what `open_amortised` needs, as soon as training has ended: what comes after may fail."""
    target = state.target
    supports = [
        {"name": p.name, "shape": list(p.shape), "support": p.support} if isinstance(p.support, str) else None
        for p in target.parameters
    ]
    save_source(directory, source, data)
    tree = {
        "encoder": dict(state.encoder.state_dict()),
        "dim": target.dim,
        "width": target.observed.shape[1],
        "columns": None if target.columns is None else list(target.columns),
        "parameters": supports if all(supports) and supports else None,
    }
    save_checkpoint(directory / STATE, tree)


def open_amortised(path: Path, model: str | None) -> Opened:
    """A saved fit; with the user's `model` file its draws can be checked. Raises InputError if it is unfinished,
    damaged, or was made from another file.
    """
    if not (path / STATE).is_file():
        raise InputError(f"{path} holds an unfinished fit: go on with its command and --resume")
    config, tree = config_of(read_json(path / CONFIG)), load_checkpoint(path / STATE)
    encoder = build_encoder(config.encoder, tree["dim"], config.shape or (tree["width"],), seed=config.seed)
    encoder.load_state_dict(tree["encoder"])
    columns = None if tree["columns"] is None else tuple(tree["columns"])
    report = read_json(path / REPORT) if (path / REPORT).is_file() else {}
    if model is not None:
        table = read_source(load_source(path, model))
        target, order = load_amortised(Path(model), table), tuple(table.columns)
        return Opened(encoder, config, target.constrain, columns, target, model_maker(Path(model)), report, order)
    if tree["parameters"] is None:
        raise InputError(f"{path}: name the model file with --model, its parameters are known to it alone")
    parameters = tuple(Parameter(p["name"], tuple(p["shape"]), p["support"]) for p in tree["parameters"])
    return Opened(encoder, config, lambda z: constrain_all(parameters, z)[0], columns, None, None, report)


def observe(opened: Opened, table: Any, name: str) -> Float[Tensor, "B N"]:
    """The observations in `table`, a row each. Raises InputError for columns that are missing or hold no numbers."""
    if opened.make is not None:
        # in the order that the model has seen before: numpy views of columns in another can have negative strides
        known = [column for column in opened.order if column in table.columns]
        others = [column for column in table.columns if column not in known]
        return read_observations(opened.make, table[[*known, *others]].copy(), name)
    if opened.columns is None:
        raise InputError("the model computes its observations from the table: name its file with --model")
    missing = [column for column in opened.columns if column not in table.columns]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(f"{name} has no column {missing[0]}{more}: the fit was made from {_listed(opened.columns)}")
    rows = table[list(opened.columns)]
    for column in rows.columns:
        if not str(rows[column].dtype).startswith(("int", "float", "uint", "bool")):
            raise InputError(f"{name}: column {column} holds no numbers")
        gaps = rows[column].isna()
        if bool(gaps.any()):
            raise InputError(f"{name}: column {column} has no value in row {int(gaps.to_numpy().argmax()) + 1}")
    return torch.from_numpy(rows.to_numpy(float).copy())


def settings_of(config: amortised.Config) -> dict[str, Any]:
    """The configuration as a run directory keeps it: plain JSON, tuples as lists."""
    fields = asdict(config)
    fields["encoder"]["hidden"] = list(config.encoder.hidden)
    fields["shape"] = None if config.shape is None else list(config.shape)
    return fields | {"amortize": True}


def _listed(columns: tuple[str, ...], most: int = 5) -> str:
    return ", ".join(columns[:most]) + (" ..." if len(columns) > most else "")
