"""Latent-variable models of rows: the split, the training through the one loop, and draws of the latents of rows."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hsivi_cli.engine import loop
from hsivi_cli.engine.seeds import Stream, generator
from hsivi_cli.errors import InputError
from hsivi_cli.io.latent_draws import LatentDraws
from hsivi_cli.io.rows import Rows, binarise, clean, read_rows
from hsivi_cli.io.run_directory import checkpoints
from hsivi_cli.methods.ddvi_classes import assign
from hsivi_cli.methods.latent_registry import (
    MANY_MODES,
    METHODS,
    LatentOptions,
    check_latent,
    method_config,
    model_config,
    only,
)
from hsivi_cli.targets.latent import LatentModel, LatentTask, ModelConfig, build_model
from hsivi_cli.targets.latent_priors import PLACED_ON, ClusterPrior
from hsivi_cli.targets.likelihoods import likelihood_for

if TYPE_CHECKING:
    import pandas

BATCH, LABELLED_SHARE = 128, 0.25
MOST_HELD_OUT = 10_000
NEVER = 2**62  # checkpoints come by the clock, and at the end
LOG_EVERY = 100
ROWS_AT_ONCE = 2000
PLACED_AT = 0.4
"""Share of the steps with a normal prior before clusters are placed where the latents have come to lie."""
AXES = (0, 0, 1, 0, 0, 0)
"""Of the rows, in what is collected of each block."""
PRIOR_DRAWS = 10_000
"""Behind the prior's mean and standard deviation, for rows without a number."""
MEAN_DRAWS, FEW_DRAWS, MANY_ROWS = 32, 8, 50_000
"""Draws behind a row's mean and standard deviation where more are not asked for; for more rows than that, few."""


@dataclass(frozen=True)
class Prepared:
    """Rows in the order train, test: `order` (N,) says where each stood in the source, from 0.

    `labels` (N,) of `--labels` and `colors` (N,) of the column to score and colour by are -1 where unknown, in the same
    order; None where there are none. `names` are the classes of `colors`, `label_names` those of `labels`. `facts` are
    lines to tell.
    """

    rows: Rows
    train: int
    order: Int[np.ndarray, " N"]
    model: ModelConfig
    labels: Tensor | None
    colors: Tensor | None
    color_column: str | None
    names: tuple[str, ...]
    label_names: tuple[str, ...]
    gaps: bool
    facts: tuple[str, ...]

    @property
    def values(self) -> Float[Tensor, "N D"]:
        """All rows, those to train on first."""
        return self.rows.tensor()

    @property
    def test(self) -> Float[Tensor, "n D"]:
        """The rows held out; all rows where none is."""
        return self.values[self.train :] if self.train < len(self.rows) else self.values


@dataclass(frozen=True)
class Trained:
    """A method's run: its state, what draws from it, and the CPU seconds that training took here."""

    name: str
    state: Any
    posterior: Any
    seconds: float

    @property
    def model(self) -> LatentModel:
        """The fitted model."""
        model: LatentModel = self.state.model
        return model


def read_latent(
    source: str, options: LatentOptions, on_rows: Callable[[int, int], None] = lambda done, total: None
) -> Rows:
    """The rows, checked; the label and colour columns beside them. Raises InputError in one line."""
    check_latent(options)
    kept = tuple(dict.fromkeys(name for name in (options.labels, options.color_by, options.group_by) if name))
    rows = read_rows(source, options.columns or None, kept, on_rows=on_rows)
    rows = clean(rows if options.binarise is None else binarise(rows, options.binarise))
    for name in kept:
        if rows.other is None or name not in rows.other.columns:
            rows.labels(name)  # says which there are
    beside = [str(name) for name in rows.other.columns if name not in kept] if rows.other is not None else []
    if (beside and rows.kind == "numbers") or len(beside) > 1:
        shown = ", ".join(beside[:4]) + (f" and {len(beside) - 4} more" if len(beside) > 4 else "")
        count = "column is" if len(beside) == 1 else "columns are"
        fact = f"{len(beside)} {count} text, not fitted but written beside the latents: {shown}"
        rows = replace(rows, facts=(*rows.facts, fact))
    if options.clusters is not None and options.clusters > len(rows):
        raise InputError(
            f"--clusters {options.clusters} is more than the {len(rows)} rows of {rows.source}: choose fewer"
        )
    if options.latent > rows.values.shape[1]:
        raise InputError(
            f"--latent {options.latent} is more than the {rows.values.shape[1]} columns of {rows.source}: choose fewer"
        )
    return rows


def prepare(rows: Rows, options: LatentOptions) -> Prepared:
    """Split the rows (the memory of `rows` is reordered), read the labels, choose the model. Raises InputError."""
    labels, label_names = rows.labels(options.labels) if options.labels else (None, ())
    if labels is not None:
        _check_labels(rows, str(options.labels), labels, len(label_names))
    column = options.color_by or options.labels
    colors, names = rows.labels(column) if column else (None, ())
    model, facts = model_config(options, rows, len(label_names))
    try:
        likelihood_for(model.likelihood, rows.tensor(), rows.columns)
    except InputError as err:
        hint = " (--binarise 0.5 makes it so)" if model.likelihood == "bernoulli" else ""
        raise InputError(f"{rows.source}: {err}{hint}") from err
    count = len(rows)
    held = min(round(options.hold_out * count), MOST_HELD_OUT, count - 2)
    if options.hold_out and held < 1:
        held = 0
        facts += (f"{count} rows are too few to hold any out: all figures are of rows trained on",)
    elif held:
        facts += (f"{held} of {count} rows are held out by seed {options.seed}; all figures are of those",)
    order = _move_to_end(rows.values, held, options.seed)
    places = torch.from_numpy(order)
    labels, colors = (None if codes is None else codes[places] for codes in (labels, colors))
    gaps = any_missing(rows.values)
    if gaps:
        facts += ("values are missing: the likelihood leaves them out, the encoder is told which ones",)
    if labels is not None and held and "ddvi" in options.methods:
        facts += ("ddvi is told the labels of the rows it trains on, never of those held out",)
    elif labels is not None:
        facts += (f'{options.method} learns nothing from --labels "{options.labels}": they colour and score',)
    facts = (*rows.facts, *facts)
    return Prepared(rows, count - held, order, model, labels, colors, column, names, label_names, gaps, facts)


def _check_labels(rows: Rows, name: str, labels: Tensor, classes: int) -> None:
    known = int((labels >= 0).sum())
    if classes == 1:
        raise InputError(f'--labels {name}: "{name}" of {rows.source} holds one class only: two or more are needed')
    if classes == known > 2:
        raise InputError(
            f'--labels {name}: no two rows of {rows.source} share a label in "{name}", which names rows and groups '
            f"none: choose another column, or only show it with --color-by {name}"
        )


def train(
    prepared: Prepared,
    name: str,
    options: LatentOptions,
    directory: Path,
    on_log: Callable[[dict[str, Any]], None],
    resume: bool,
) -> Trained:
    """Train a method in `directory`, or go on with what is there. Raises InputError, RunError and InterruptError."""
    rows = prepared.values[: prepared.train]
    known = prepared.labels[: prepared.train] if prepared.labels is not None and name == "ddvi" else None
    config = method_config(name, only(options, name), prepared.model, prepared.gaps)
    module: Any = METHODS[name].module
    model = build_model(prepared.model, rows)
    clustered = isinstance(model.prior, ClusterPrior) and known is None  # with labels the clusters are the classes
    if isinstance(model.prior, ClusterPrior) and clustered:
        model.prior.broaden()
    state = module.init(LatentTask(rows, model, known), config)
    if resume and checkpoints(directory):
        loop.resume(module, state, directory)
    batch: Any = _batches(rows, known, getattr(config, "batch", BATCH))
    hooks = loop.Hooks(lambda record: on_log(record | {"steps": config.steps, "method": name}), batch=batch)
    began = time.process_time()

    def run_to(last: int) -> None:
        settings = loop.LoopConfig(last, config.seed, LOG_EVERY, checkpoint_every=NEVER)
        if stopped := loop.run_loop(module, state, settings, directory, hooks):
            raise stopped("interrupted after the last step; checkpoint written, go on with --resume")

    prior = state.model.prior
    if isinstance(prior, ClusterPrior) and not prior.placed:
        run_to(min(config.steps, max(1, round(PLACED_AT * config.steps))))
        place_clusters(prior, module.posterior(state), rows, config.seed)
    run_to(config.steps)
    return Trained(name, state, module.posterior(state), time.process_time() - began)


def place_clusters(prior: ClusterPrior, posterior: Any, rows: Float[Tensor, "n D"], seed: int) -> None:
    """Fit the clusters to a draw of each of some of the rows."""
    chosen = torch.randperm(len(rows), generator=generator(seed, Stream.INIT, 8))[:PLACED_ON]
    drawn: LatentDraws = posterior.draw(rows[chosen], 1, generator(seed, Stream.INIT, 9), False)
    prior.place(drawn.z[0], seed)


@dataclass(frozen=True)
class Latents:
    """Of n rows: posterior means and standard deviations (n, d), draws (k, n, d) or None, the cluster of each or None.

    `typical` (n, d) is of each row's draws the one least far from the others: near the mean of a posterior of one mode,
    and never where a posterior of several has none. `uncertainty` (n,) is that of the approximation itself, where the
    method has one.
    """

    mean: Float[Tensor, "n d"]
    sd: Float[Tensor, "n d"]
    draws: Float[Tensor, "k n d"] | None
    cluster: Int[Tensor, " n"] | None
    uncertainty: Float[Tensor, " n"] | None
    typical: Float[Tensor, "n d"] | None = None


@torch.no_grad()
def latents_of(
    posterior: Any,
    model: LatentModel,
    x: Float[Tensor, "n D"],
    seed: int,
    draws: int = 0,
    on_rows: Callable[[int], None] = lambda count: None,
) -> Latents:
    """Latents of rows, block by block; those of a row without any number are the prior's.

    More draws than `MEAN_DRAWS` are other ones: a row's draws come from one stream.
    """
    k = max(draws, MEAN_DRAWS if len(x) <= MANY_ROWS else FEW_DRAWS)
    clustered = model.prior.classes > 1
    whole: list[Tensor | None] = []
    for index, block in enumerate(x.split(ROWS_AT_ONCE)):
        found: LatentDraws = posterior.draw(block, k, generator(seed, Stream.DRAW, index), weigh=False)
        found = _prior_where_empty(found, block, model, generator(seed, Stream.DRAW, index, 1))
        cluster = assign(model.prior, found.z.to(model.like())).mean(0).argmax(-1) if clustered else None
        unsure = posterior.uncertainty(block).mean_sd if hasattr(posterior, "uncertainty") else None
        parts = (
            found.mean,
            found.sd,
            found.z[:draws] if draws else None,
            cluster,
            unsure,
            typical_draw(found.z[:MEAN_DRAWS]),
        )
        if not whole:  # made once: small tensors kept from each block would leave the heap in pieces, GBs of them
            whole = [None if part is None else _as_many(part, len(x), AXES[i]) for i, part in enumerate(parts)]
        for part, all_rows, axis in zip(parts, whole, AXES, strict=True):
            if part is not None and all_rows is not None:
                all_rows.narrow(axis, index * ROWS_AT_ONCE, len(block)).copy_(part)
        on_rows(min((index + 1) * ROWS_AT_ONCE, len(x)))
    mean, sd, drawn, cluster, unsure, typical = whole
    assert mean is not None
    assert sd is not None
    return Latents(mean, sd, drawn, cluster, unsure, typical)


def _prior_where_empty(
    found: LatentDraws, x: Float[Tensor, "n D"], model: LatentModel, noise: torch.Generator
) -> LatentDraws:
    """The posterior of a row without a number is the prior, whatever an encoder makes of it."""
    empty = x.isnan().all(1)
    if not bool(empty.any()):
        return found
    z, mean, sd = found.z.clone(), found.mean.clone(), found.sd.clone()
    count = int(empty.sum())
    z[:, empty] = model.prior.sample(len(z) * count, noise).to(z).view(len(z), count, -1)
    many = model.prior.sample(PRIOR_DRAWS, noise)
    mean[empty], sd[empty] = many.mean(0).to(mean), many.std(0).to(sd)
    return LatentDraws(z, None, mean, sd)


def typical_draw(z: Float[Tensor, "k n d"]) -> Float[Tensor, "n d"]:
    """Of each row's k draws the one with the least sum of distances to the others."""
    rows = z.transpose(0, 1)
    best = torch.cdist(rows, rows).sum(-1).argmin(1)
    return rows[torch.arange(len(rows), device=z.device), best]


def of_method(latents: Latents, method: str) -> Latents:
    """Without typical draws where posteriors have one mode: their means say the same."""
    return latents if method in MANY_MODES else replace(latents, typical=None)


def in_order(latents: Latents, order: Int[np.ndarray, " N"]) -> Latents:
    """Latents in the order of the source."""
    places = torch.from_numpy(np.argsort(order))
    draws = None if latents.draws is None else latents.draws[:, places]
    beside = (latents.cluster, latents.uncertainty, latents.typical)
    cluster, uncertainty, typical = (None if part is None else part[places] for part in beside)
    return Latents(latents.mean[places], latents.sd[places], draws, cluster, uncertainty, typical)


def latent_frame(latents: Latents, beside: "pandas.DataFrame | None") -> "pandas.DataFrame":
    """One row an observation: what stood beside the numbers, then z1.., z1.sd.., z1.typical.., cluster, uncertainty,

    z1.draw1...
    """
    import pandas

    columns: dict[str, Any] = {"row": np.arange(1, len(latents.mean) + 1)}
    if beside is not None:
        columns |= {str(name): beside[name].to_numpy() for name in beside.columns}
    names = [f"z{j + 1}" for j in range(latents.mean.shape[1])]
    for suffix, values in (("", latents.mean), (".sd", latents.sd)):
        columns |= {name + suffix: values[:, j].float().numpy() for j, name in enumerate(names)}
    if latents.typical is not None:
        columns |= {f"{name}.typical": latents.typical[:, j].float().numpy() for j, name in enumerate(names)}
    if latents.cluster is not None:
        columns["cluster"] = latents.cluster.numpy() + 1
    if latents.uncertainty is not None:
        columns["uncertainty"] = latents.uncertainty.float().numpy()
    if latents.draws is not None:
        for i, drawn in enumerate(latents.draws):
            columns |= {f"{name}.draw{i + 1}": drawn[:, j].float().numpy() for j, name in enumerate(names)}
    return pandas.DataFrame(columns)


def _as_many(part: Tensor, rows: int, axis: int) -> Tensor:
    return part.new_empty([rows if i == axis else size for i, size in enumerate(part.shape)])


def _batches(rows: Tensor, labels: Tensor | None, batch_size: int = BATCH) -> Callable[[torch.Generator], Any]:
    """A minibatch from a step's own generator; a quarter of it are rows with a label, where there are labels."""
    size = min(batch_size, len(rows))
    known = None if labels is None else (labels >= 0).nonzero()[:, 0]

    def batch(generator: torch.Generator) -> Tensor | tuple[Tensor, Tensor]:
        chosen = torch.randint(len(rows), (size,), generator=generator)
        if labels is None:
            return rows[chosen]
        assert known is not None
        some = -(-size // round(1 / LABELLED_SHARE))
        chosen[:some] = known[torch.randint(len(known), (some,), generator=generator)]
        return rows[chosen], labels[chosen]

    return batch


def _move_to_end(values: Float[np.ndarray, "N D"], held: int, seed: int) -> Int[np.ndarray, " N"]:
    """Swap `held` rows, drawn by the seed, to the end of `values` in place; returns where each row stood before."""
    count = len(values)
    order = np.arange(count)
    chosen = torch.randperm(count, generator=generator(seed, Stream.INIT, 7))[:held].numpy()
    ahead = np.sort(chosen[chosen < count - held])
    behind = np.setdiff1d(np.arange(count - held, count), chosen)
    order[ahead], order[behind] = behind, ahead
    values[ahead], values[behind] = values[behind], values[ahead]
    return order


def any_missing(values: Float[np.ndarray, "N D"]) -> bool:
    """Whether any number is missing."""
    return any(bool(np.isnan(values[i : i + 65536]).any()) for i in range(0, len(values), 65536))
