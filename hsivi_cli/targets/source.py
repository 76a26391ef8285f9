"""Where a posterior comes from: a formula on a table, a user's own model, or a named example; kept beside a fit."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hsivi_cli.errors import InputError
from hsivi_cli.io.files import read_json, sha256, write_json
from hsivi_cli.targets.density import Density

SOURCE = "source.json"
TABLE = "data.parquet"


@dataclass(frozen=True)
class Source:
    """What the user named. `model` is the path of a Python file, `example` a name; both None: a regression.

    `data` is a path, or "-" for stdin, and None where the model or the example brings its own.
    """

    data: str | None = None
    formula: str | None = None
    family: str | None = None
    priors: tuple[str, ...] = ()
    model: str | None = None
    example: str | None = None
    na: str = "error"


def check_source(source: Source) -> None:
    """Refuse combinations that mean nothing; raises InputError naming the flag."""
    if source.model and source.example:
        raise InputError("--model and --example exclude each other: name one")
    given = source.formula or source.family or source.priors
    if (source.model or source.example) and given:
        flag = "--formula" if source.formula else "--family" if source.family else "--prior"
        raise InputError(
            f"{flag} belongs to regressions: leave it out with {'--model' if source.model else '--example'}"
        )
    if source.data is None and not (source.model or source.example):
        raise InputError("no data: name a CSV, TSV or parquet file (or - for stdin), or use --model or --example")


def read_source(source: Source) -> Any:
    """The data that the source names: a DataFrame, the object of a `.json` file, or None."""
    from hsivi_cli.io.tables import read_table

    if source.data is None:
        return None
    if source.data.endswith(".json"):
        if not source.model:
            raise InputError(f"{source.data}: JSON data go with --model; a regression wants CSV, TSV or parquet")
        return read_json(Path(source.data))
    return read_table(source.data)


def open_density(source: Source, data: Any) -> Density:
    """The posterior that a source and its data define; raises InputError for whatever is wrong with either."""
    if source.example:
        from hsivi_cli.targets.examples import example_density

        return example_density(source.example, data)
    if source.model:
        from hsivi_cli.targets.user_model import load_user_model

        return load_user_model(Path(source.model), data)
    from hsivi_cli.targets.regression import regression_density

    return regression_density(data, source.formula, source.family, source.priors, source.na)


def save_source(directory: Path, source: Source, data: Any) -> None:
    """Keep a source and a copy of its data in the directory of a fit. The user's model is named and hashed, not copied:
    whoever draws from the fit later must say again that this file may run."""
    from pandas import DataFrame

    fields: dict[str, Any] = {
        "formula": source.formula,
        "family": source.family,
        "priors": list(source.priors),
        "example": source.example,
        "na": source.na,
    }
    if source.model:
        fields |= {"model": Path(source.model).name, "model_sha256": sha256(Path(source.model))}
    if isinstance(data, DataFrame):
        data.to_parquet(directory / TABLE, index=False)
        fields["data"] = TABLE
    elif data is not None:
        write_json(directory / "data.json", data)
        fields["data"] = "data.json"
    write_json(directory / SOURCE, fields)


def load_source(directory: Path, model: str | None) -> Source:
    """The source of a saved fit; `model` is the user's file, needed again where the fit was made with one."""
    fields = read_json(directory / SOURCE)
    if fields.get("model") and model is None:
        raise InputError(f"{directory} was fitted with {fields['model']}: name it with --model, drawing runs it")
    if fields.get("model") and sha256(Path(str(model))) != fields["model_sha256"]:
        raise InputError(f"--model {model} differs from the file that {directory} was fitted with: fit again")
    if model is not None and not fields.get("model"):
        raise InputError(f"--model {model}: {directory} was not fitted with a model file: leave it out")
    data = str(directory / fields["data"]) if fields.get("data") else None
    priors = tuple(fields.get("priors") or ())
    return Source(
        data,
        fields.get("formula"),
        fields.get("family"),
        priors,
        model,
        fields.get("example"),
        fields.get("na", "error"),
    )
