"""From the options of `--amortize` to a configuration, for the model at hand."""

import math
import re
from dataclasses import dataclass
from typing import Any

from hsivi_cli.errors import InputError
from hsivi_cli.methods.amortised import AMORTISED, Config
from hsivi_cli.networks.posterior_encoder import FAMILIES, EncoderConfig
from hsivi_cli.targets.amortised import AmortisedTarget

ESTIMATORS = ("a", "b", "c", "naive", "pimh")
EMBEDDINGS = ("auto", "identity", "mlp", "set", "image")
# measured on two moons and ten Gaussians; a flow's step costs hardly more with more pairs, up to a thousand
PAIRS = {"npe": 1024}
# a fixed budget of simulations is gone through again and again, and stopped by those held out
FEW_SIMULATIONS, FEW_PAIRS, BUDGET_LR, PASSES, LEAST_STEPS = 20_000, 128, 5e-3, 60, 600
WAKE_DRAWS = {"wake": 64, "defensive-wake": 64}
HIDDEN = (128, 128)
REFRESHED = 10  # of as many observations one gets a new run each time: estimator (a) needs several
FEW_DIMENSIONS = 3  # where a random walk moves particles as well as gradients do, at less cost
SLEEP = 0.5  # of SMC-Wake's gradient from simulations, where the model has them


@dataclass(frozen=True)
class AmortisedOptions:
    """What the user asked for; None leaves a choice to the model and the method."""

    method: str = "smc-wake"
    estimator: str | None = None
    encoder: str | None = None
    embedding: str | None = None
    shape: str | None = None
    particles: int | None = None
    simulations: int | None = None
    sleep: float | None = None
    steps: int | None = None
    lr: float | None = None
    seed: int = 0


def check_amortised(options: AmortisedOptions) -> None:
    """Refuse what means nothing together; raises InputError naming the flag."""
    if options.method not in AMORTISED:
        raise InputError(f"--amortize goes with --method {', '.join(AMORTISED)}, not {options.method}")
    choices = (
        ("estimator", ESTIMATORS, ("smc-wake",)),
        ("encoder", FAMILIES, AMORTISED),
        ("embedding", EMBEDDINGS, AMORTISED),
        ("particles", None, ("smc-wake", "wake", "defensive-wake", "msc")),
        ("simulations", None, ("smc-wake", "npe")),
        ("sleep", None, ("smc-wake",)),
    )
    for name, allowed, methods in choices:
        value = getattr(options, name)
        if value is not None and options.method not in methods:
            raise InputError(f"--{name} does nothing for --method {options.method}: it belongs to {', '.join(methods)}")
        if value is not None and allowed is not None and value not in allowed:
            raise InputError(f"--{name} {value} is unknown: use {', '.join(allowed)}")
    if options.sleep is not None and not 0 <= options.sleep < 1:
        raise InputError(f"--sleep {options.sleep}: a share from 0 to below 1 (all simulations is --method npe)")
    if options.shape is not None:
        parse_shape(options.shape)


def configure(options: AmortisedOptions, target: AmortisedTarget) -> Config:
    """The configuration of a run. Raises InputError for one observation where nothing else is to be learned from."""
    check_amortised(options)
    simulator = target.simulate is not None and target.sample_prior is not None
    sleep = options.sleep if options.sleep is not None else SLEEP if simulator else 0.0
    chosen: dict[str, Any] = {"method": options.method, "seed": options.seed}
    chosen["sleep"] = sleep if options.method == "smc-wake" else 0.0
    if options.simulations and options.method == "smc-wake" and not chosen["sleep"]:
        raise InputError("--simulations does nothing with --sleep 0, or without simulate=... in the model")
    learns_elsewhere = options.method == "npe" or chosen["sleep"] > 0
    if len(target.observed) < 2 and not learns_elsewhere:
        raise InputError(
            f"{target.name}: one observation alone cannot be amortised over: give a table of many rows, give the model "
            "simulate=..., or leave --amortize out"
        )
    chosen["refresh_count"] = max(Config.refresh_count, len(target.observed) // REFRESHED)
    if target.dim <= FEW_DIMENSIONS:
        chosen["kernel"] = "random-walk"
    if options.method in PAIRS:
        chosen["pairs"] = PAIRS[options.method]
    if options.simulations:
        chosen["pairs"] = FEW_PAIRS if options.simulations <= FEW_SIMULATIONS else chosen.get("pairs", Config.pairs)
        passes = int(PASSES * options.simulations / chosen["pairs"])
        chosen |= {"lr": BUDGET_LR, "steps": max(LEAST_STEPS, min(Config.steps, passes))}
    if options.method in WAKE_DRAWS:
        chosen["draws"] = WAKE_DRAWS[options.method]
    if options.particles is not None:
        chosen["particles" if options.method == "smc-wake" else "draws"] = options.particles
    given: dict[str, Any] = {"estimator": options.estimator, "simulations": options.simulations}
    given |= {"steps": options.steps, "lr": options.lr}
    chosen |= {name: value for name, value in given.items() if value is not None}
    network = {"family": options.encoder, "embedding": options.embedding}
    encoder = EncoderConfig(hidden=HIDDEN, **{name: value for name, value in network.items() if value is not None})  # type: ignore[arg-type]
    shape = parse_shape(options.shape) if options.shape is not None else None
    width = target.observed.shape[1]
    if shape is not None and math.prod(shape) != width:
        raise InputError(f"--shape {options.shape} has {math.prod(shape)} numbers, an observation has {width}")
    return Config(**chosen, encoder=encoder, shape=shape)


def parse_shape(text: str) -> tuple[int, ...]:
    """`10x3`: a set of 10 rows of 3; `1x8x8`: an image; `5`: a vector."""
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){0,2}", text):
        raise InputError(f"--shape {text}: write 10x3 for a set of 10 rows of 3 numbers, or 1x8x8 for an image")
    return tuple(int(size) for size in text.split("x"))
