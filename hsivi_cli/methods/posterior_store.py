"""Fits on disk: a run directory with the options, the source and its data, the trained state, and the report."""

import hashlib
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from hsivi_cli.engine.checkpoint import load_checkpoint, save_checkpoint
from hsivi_cli.errors import HsiviError, InputError, InterruptError
from hsivi_cli.evaluation.verdict import WORDS, Verdict
from hsivi_cli.io.files import read_json, sha256, write_json
from hsivi_cli.io.run_directory import CONFIG, POSTERIOR, REPORT, run_directory
from hsivi_cli.methods.posterior import Fit, restore, state_tree
from hsivi_cli.methods.posterior_registry import FitOptions
from hsivi_cli.methods.posterior_report import PosteriorReport
from hsivi_cli.targets.source import Source, load_source, open_density, read_source, save_source

STATE = "fit.safetensors"


@contextmanager
def fit_directory(
    save: Path | None, source: Source, data: Any, settings: Mapping[str, Any], draws: int, resume: bool
) -> Iterator[Path]:
    """The directory that a fit is kept in, held for this process alone, or a temporary one that vanishes.

    `settings`, plain JSON, must be the same again for a run to be resumed.

    Raises InputError as `run_directory` does: if it is occupied, or the options of a resumed run differ.
    """
    if save is None:
        try:
            with tempfile.TemporaryDirectory(prefix="hsivi-") as directory:
                yield Path(directory)
        except (InterruptError, KeyboardInterrupt) as err:
            kind = type(err) if isinstance(err, InterruptError) else InterruptError
            raise kind("interrupted; nothing was kept: with --save DIR a run can go on later") from err
        return
    config = {"kind": POSTERIOR, "draws": draws, **settings, "source": _source_facts(source, data)}
    try:
        with run_directory(save, config, resume):
            yield save
    except HsiviError as err:  # run directories are named by --out elsewhere
        raise type(err)(str(err).replace("--out", "--save")) from err


def check_save(save: Path, resume: bool) -> None:
    """What can be said of the place of a fit before its data are read; raises InputError as `fit_directory` would."""
    if resume or not save.exists():
        return
    if not save.is_dir() or (any(save.iterdir()) and not (save / CONFIG).is_file()):
        raise InputError(f"{save} exists and holds no run of ours: choose another --save")
    if (save / STATE).is_file():
        raise InputError(f"{save} exists already: add --resume to go on with it, or choose another --save")


def save_fit(directory: Path, fit: Fit, source: Source, data: Any, report: PosteriorReport) -> None:
    """Write what `load_fit` needs: the source with its data, the trained state, and the report beside it."""
    save_source(directory, source, data)
    write_json(directory / REPORT, report.to_json())
    save_checkpoint(directory / STATE, state_tree(fit))


def load_fit(path: Path, model: str | None = None) -> Fit:
    """A saved fit; `model` is the user's model file, where it was fitted with one.

    Raises InputError if the fit was interrupted, is damaged, or was made from another model file.
    """
    config = read_json(path / CONFIG)
    if config.get("amortize"):
        raise InputError(f"{path} is an amortised fit: hsivi sample draws from it, with --observe for new rows")
    if not (path / STATE).is_file():
        raise InputError(f"{path} holds an unfinished fit: go on with its command and --resume")
    source = load_source(path, model)
    density = open_density(source, read_source(source))
    fields = {name: config[name] for name in FitOptions.__dataclass_fields__ if name in config}
    return restore(density, FitOptions(**fields), load_checkpoint(path / STATE))


def with_verdict_of_fit(path: Path, report: PosteriorReport) -> PosteriorReport:
    """The report on further draws of a fit, its verdict never better than the fit's own: fewer draws show less."""
    own = read_json(path / REPORT)["verdict"]
    levels = ("trust", "care", "no")
    if own["level"] not in levels or levels.index(own["level"]) <= levels.index(report.verdict.level):
        return report
    reasons = tuple(f"the fit said: {reason}" for reason in own["reasons"])
    line = f"{WORDS[own['level']]}: {'; '.join(reasons)}"
    return replace(report, verdict=Verdict(own["level"], reasons, line))


def _source_facts(source: Source, data: Any) -> dict[str, Any]:
    """What must stay the same for a run to be resumed; paths may change, contents may not."""
    facts: dict[str, Any] = asdict(source) | {"data": None, "model": None, "priors": list(source.priors)}
    if source.model:
        facts["model"] = sha256(Path(source.model))
    if data is not None:
        facts["data"] = _data_sha256(data)
    return facts


def _data_sha256(data: Any) -> str:
    import json

    import pandas

    if isinstance(data, pandas.DataFrame):
        digest = hashlib.sha256(json.dumps([str(name) for name in data.columns]).encode())
        digest.update(pandas.util.hash_pandas_object(data, index=False).to_numpy().tobytes())
        return digest.hexdigest()
    return hashlib.sha256(json.dumps(data, sort_keys=True, default=str).encode()).hexdigest()
