"""The methods of `--model latent` by name, and from the options to a model and a method's configuration.

All methods of a comparison share one model, one trunk of the encoder and one split of the rows. Steps and learning
rates are each method's own, unless --steps and --lr choose them.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from types import ModuleType
from typing import Any

import numpy as np

from hsivi_cli.errors import InputError
from hsivi_cli.io.rows import Rows
from hsivi_cli.methods import adversarial, ddvi, ddvi_paper, flow_posterior, gpvae, hierarchical, pca_map, vae
from hsivi_cli.methods.latent_settings import of_method, parse_settings
from hsivi_cli.targets.latent import ModelConfig
from hsivi_cli.targets.latent_priors import GUARDS, PRIORS, WIDEST
from hsivi_cli.targets.likelihoods import LIKELIHOODS

MODEL = "model"
PAPER = "ddvi-paper"
"""How `--method ddvi --paper` is called inside: a method of its own."""
THIN = tuple(WIDEST)
QUICK_LR, PLAIN_LR = 3e-3, ("aae", "sa-vae")
"""Of ddvi, and of all others but two where a prior narrows: rows must keep up with it, and a chain learns slowly. At
1e-3 ddvi ended 2.7 nats lower on ancestry's principal components (seed 0)."""
WARM = 0.3
"""Of ddvi's steps: without them the latents of ancestry's principal components are left unused, 8 nats a row worse."""
HIDDEN, FEATURES = (256, 256), 128
GAMMA, CLUSTER_GAMMA = 0.2, 0.1
"""Of ddvi's sleep phase without labels: at the full rate q learns the fantasies of a decoder that knows nothing yet
faster than rows. On genotypes with clusters the bound was 7 nats lower after 500 steps, on digits with a pinwheel half
a nat at the end."""
MANY_MODES = ("ddvi", PAPER, "iaf", "nsf", "hierarchical")
"""Methods whose posteriors may have several modes: the mean of a row's draws may lie where none of them is."""
IWAE_SAMPLES, SVI_STEPS, WEIGHT_DECAY = 8, 4, 0.1
CHECKED_ROWS = 65536


@dataclass(frozen=True)
class Entry:
    """A method: its module (the verbs of `engine/contract.py`), its configuration's changes, and its default steps."""

    module: ModuleType
    steps: int
    changes: Mapping[str, Any]
    words: str


METHODS: dict[str, Entry] = {
    "ddvi": Entry(ddvi, 5000, {}, "a diffusion model of the latents as the posterior"),
    "gpvae": Entry(gpvae, 5000, {}, "a Gaussian whose mean is a random function of the row"),
    "gpvae-fg": Entry(gpvae, 5000, {"functions": "f+g"}, "a Gaussian whose mean and spread are random functions"),
    "vae": Entry(vae, 5000, {}, "a Gaussian"),
    "iwae": Entry(vae, 5000, {"objective": "iwae", "samples": IWAE_SAMPLES}, "a Gaussian, importance-weighted"),
    "iaf": Entry(flow_posterior, 5000, {"flow": "iaf"}, "an inverse autoregressive flow"),
    "nsf": Entry(flow_posterior, 5000, {"flow": "nsf"}, "a neural spline flow"),
    "hierarchical": Entry(hierarchical, 5000, {}, "a Gaussian below a Gaussian"),
    "aae": Entry(adversarial, 5000, {}, "a point, all of them together made to look like the prior"),
    "sa-vae": Entry(
        vae, 2000, {"svi_train": "through", "svi_steps": SVI_STEPS}, f"a Gaussian improved by {SVI_STEPS} SVI steps"
    ),
    "vae-decay": Entry(vae, 5000, {"weight_decay": WEIGHT_DECAY}, "a Gaussian, its encoder with weight decay"),
    "pca": Entry(pca_map, 50, {}, "exact, of a linear Gaussian model (probabilistic PCA)"),
    PAPER: Entry(ddvi_paper, 20_000, {}, "deterministic chains, as in the public code of DDVI"),
}
NAMES = tuple(name for name in METHODS if name != PAPER)


@dataclass(frozen=True)
class ModelSettings:
    """What `--set model.NAME` chooses: the decoder's hidden layers."""

    hidden: tuple[int, ...] = ModelConfig.hidden


@dataclass(frozen=True)
class LatentOptions:
    """What the user asked for, plain JSON; None leaves a choice to the rows and the method.

    `settings` are those of `parse_settings`. A row's number counts as 1 above `binarise`, else as 0. `embedding`
    "image" makes encoder and decoder convolutional.
    """

    method: str = "ddvi"
    latent: int = 2
    prior: str | None = None
    clusters: int | None = None
    family: str | None = None
    labels: str | None = None
    color_by: str | None = None
    group_by: str | None = None
    columns: tuple[str, ...] = ()
    noise: str | None = None
    steps: int | None = None
    lr: float | None = None
    seed: int = 0
    iwae: int = 64
    hold_out: float = 0.1
    compare: tuple[str, ...] = ()
    binarise: float | None = None
    embedding: str | None = None
    settings: tuple[str, ...] = ()

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods to be trained, the one whose draws are kept first."""
        return (self.method, *(name for name in self.compare if name != self.method))


def check_latent(options: LatentOptions) -> None:
    """Refuse what means nothing, or not together, before any file is read; raises InputError naming the flag."""
    for name in options.methods:
        if name not in METHODS:
            flag = "--method" if name == options.method else "--compare"
            raise InputError(f"{flag} {name}: --model latent knows {', '.join(NAMES)}")
    if options.prior is not None and options.prior not in PRIORS:
        raise InputError(f"--prior {options.prior}: --model latent knows {', '.join(PRIORS)}")
    if options.family is not None and options.family not in LIKELIHOODS:
        raise InputError(f"--family {options.family}: --model latent knows {', '.join(LIKELIHOODS)}")
    if options.binarise is not None and options.family not in (None, "bernoulli"):
        raise InputError(f"--binarise makes every number 0 or 1: leave --family {options.family} out")
    known = {name: METHODS[name].module.Config for name in options.methods}
    own = parse_settings(options.settings, options.method, known | {MODEL: ModelSettings})[MODEL]
    if min(own.get("hidden", (1,)), default=1) < 1:
        raise InputError("--set model.hidden: layers of one unit or more are needed")
    if options.embedding not in (None, "mlp", "image"):
        raise InputError(f"--embedding {options.embedding}: --model latent knows mlp and image")
    if options.embedding == "image" and "hidden" in own:
        raise InputError("--set model.hidden: a decoder of images has convolutions, leave one of the two out")
    if options.embedding == "image" and PAPER in options.methods:
        raise InputError("--paper has no convolutions: leave --embedding image out")
    if options.prior is not None and options.clusters is not None:
        raise InputError("--prior and --clusters exclude each other: clusters are a prior of their own")
    if options.noise not in (None, "column", "shared"):
        raise InputError(f"--noise {options.noise}: choose column or shared")
    taken = [name for name in (options.labels, options.color_by, options.group_by) if name in options.columns]
    if taken:
        raise InputError(f"--columns {taken[0]}: a column of labels or colours is never data, leave it out")
    if options.clusters is not None and options.clusters < 2:
        raise InputError(f"--clusters {options.clusters}: two clusters or more are needed")
    if not 0 <= options.hold_out <= 0.9:
        raise InputError(f"--hold-out {options.hold_out:g}: a share of the rows from 0 to 0.9 is needed")
    if PAPER in options.methods and (options.clusters is not None or options.labels is not None):
        raise InputError("--paper is for fixed priors and no labels: leave --clusters and --labels out")
    if options.method == "pca" and (options.prior not in (None, "normal") or options.clusters is not None):
        raise InputError("--method pca has the prior normal: leave --prior and --clusters out")


def guess_family(rows: Rows) -> tuple[str, str]:
    """The likelihood that rows suggest, and the line that says so."""
    if rows.kind == "genotypes":
        return "binomial", "binomial: the rows are genotypes"
    if rows.kind == "images":
        return "gaussian", "gaussian, one noise for all pixels: the rows are images"
    highest = 0.0
    for begin in range(0, len(rows), CHECKED_ROWS):
        block = rows.values[begin : begin + CHECKED_ROWS]
        if not bool((np.isnan(block) | (block == 0) | (block == 1) | (block == 2)).all()):
            return "gaussian", "gaussian, with a noise for each column"
        highest = max(highest, float(np.nanmax(block, initial=0.0)))
    if highest == 1:
        return "bernoulli", "bernoulli: all numbers are 0 or 1"
    return "binomial", "binomial: all numbers are 0, 1 or 2, as genotypes are (--family gaussian if they are not)"


def model_config(options: LatentOptions, rows: Rows, classes: int) -> tuple[ModelConfig, tuple[str, ...]]:
    """The model that all methods share, and lines to tell the user; `classes` is how many labels there are (or 0)."""
    given = options.family or (options.binarise is not None and "bernoulli")
    family, line = (given, "") if given else guess_family(rows)
    facts = [f"likelihood {line}"] if line else []
    clusters, prior = options.clusters or 0, options.prior or "normal"
    if "ddvi" in options.methods and classes and options.prior is None and not clusters:
        clusters = max(classes, 2)
        facts.append(f"prior of {clusters} clusters, one for each label (--prior and --clusters choose)")
    thin = not clusters and prior in THIN
    if thin:
        shares = ", ".join(f"{share:g} of it drawn with a brush of {width:g}" for width, share in GUARDS[prior])
        facts.append(f"the {prior} prior is thin, so that rows off it cost little: {shares}")
    if thin and set(options.methods) - {PAPER}:
        facts.append("training approaches a thin prior from a broad one, over three quarters of its steps")
    if options.noise and family != "gaussian":
        raise InputError(f"--noise is of the gaussian likelihood, the rows' is {family}: leave it out")
    convolutional = options.embedding == "image"
    if convolutional and rows.shape is None:
        raise InputError(f"--embedding image: the rows of {rows.source} are no images: leave it out")
    own = parse_settings(of_method(options.settings, options.method, MODEL), MODEL, {MODEL: ModelSettings})[MODEL]
    noise = options.noise or ("shared" if rows.kind == "images" else "column")
    config = ModelConfig(
        options.latent,
        prior,
        clusters,
        str(family),
        **own,
        shape=rows.shape if convolutional else None,
        noise="shared" if noise == "shared" else "column",
        seed=options.seed,
    )
    return config, tuple(facts)


def method_config(name: str, options: LatentOptions, model: ModelConfig, gaps: bool) -> Any:
    """The configuration of the method called `name`; `gaps`: whether any number is missing."""
    entry = METHODS[name]
    steps = options.steps or entry.steps
    fields: dict[str, Any] = {"seed": options.seed, "steps": steps} | dict(entry.changes)
    own = parse_settings(options.settings, options.method, {name: entry.module.Config})[name]
    if name == "pca":
        # columns of a table have units of their own, pixels do not
        fields |= {"steps": steps if gaps else 1, "standardise": model.noise == "column"}
        return pca_map.Config(**(fields | own))
    thin = model.prior in THIN and not model.clusters
    if name == "ddvi" or (thin and name not in (PAPER, *PLAIN_LR)):
        fields["lr"] = QUICK_LR
    if options.lr is not None:
        fields["lr"] = options.lr
    if name != PAPER:
        fields |= {"hidden": HIDDEN, "features": FEATURES, "shape": model.shape}
    if name == "ddvi":
        fields["warm"] = WARM
    if name == "ddvi" and not options.labels:
        fields["gamma"] = CLUSTER_GAMMA if model.clusters else GAMMA
    return entry.module.Config(**(fields | own))


def config_to_json(config: Any) -> dict[str, Any]:
    """A method's configuration as a run directory keeps it."""
    tree: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    return tree


def config_from_json(name: str, tree: Mapping[str, Any]) -> Any:
    """The configuration again. Raises InputError for a method there is not."""
    if name not in METHODS:
        raise InputError(f'the fit is of a method "{name}" that this version does not know')
    fields = {key: tuple(value) if isinstance(value, list) else value for key, value in tree.items()}
    return METHODS[name].module.Config(**fields)


def only(options: LatentOptions, name: str) -> LatentOptions:
    """The options of a run of one method of a comparison."""
    return replace(options, method=name, compare=(), settings=of_method(options.settings, options.method, name))
