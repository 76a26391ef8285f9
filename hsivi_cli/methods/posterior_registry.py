"""Every posterior method by the name that `--method` knows, and the configuration that the user's options make."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hsivi_cli.errors import InputError
from hsivi_cli.methods import gaussian_vi, hsivi_lb, hsivi_sm_posterior, langevin_vi, smc_wake
from hsivi_cli.targets.density import Density


@dataclass(frozen=True)
class FitOptions:
    """What the user asked for; None leaves a choice to the method. Plain JSON, so that a fit can keep it."""

    method: str = "auto"
    covariance: str = "full-rank"
    steps: int | None = None
    bridges: int | None = None
    layers: int | None = None
    layerwise: bool = False
    lr: float | None = None
    paper: bool = False
    refine: str = "auto"
    seed: int = 0
    encoder: str | None = None
    estimator: str | None = None
    particles: int | None = None


@dataclass(frozen=True)
class PosteriorMethod:
    """A module with the verbs of `engine.contract`, its configuration for a density, and the options it takes."""

    module: Any
    configure: Callable[[FitOptions, Density], Any]
    takes: frozenset[str]
    whitened: bool = True


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _gaussian(options: FitOptions, density: Density) -> gaussian_vi.Config:
    chosen: dict[str, Any] = {"covariance": options.covariance}
    if options.paper:  # Geffner & Domke's stage 1: mean field from N(0, I), Adam at a constant rate
        chosen = {"covariance": "mean-field", "from_mode": False, "lr": 0.01, "lr_schedule": "constant"}
    return gaussian_vi.Config(seed=options.seed, **chosen | _given(steps=options.steps, lr=options.lr))


def _langevin(kind: langevin_vi.Kind) -> Callable[[FitOptions, Density], langevin_vi.Config]:
    def configure(options: FitOptions, density: Density) -> langevin_vi.Config:
        defaults: dict[str, Any] = {"steps": 150_000, "lr": 1e-3} if options.paper else {"steps": 1000, "lr": 3e-3}
        chosen = defaults | _given(steps=options.steps, lr=options.lr, bridges=options.bridges)
        return langevin_vi.Config(kind=kind, paper=options.paper, seed=options.seed, **chosen)

    return configure


def _hsivi(module: Any) -> Callable[[FitOptions, Density], Any]:
    def configure(options: FitOptions, density: Density) -> Any:
        chosen: dict[str, Any] = module.published_settings(density.dim) if options.paper else {}
        chosen |= _given(steps=options.steps, lr=options.lr, layers=options.layers)
        return module.Config(seed=options.seed, training="layerwise" if options.layerwise else "joint", **chosen)

    return configure


def _wake(options: FitOptions, density: Density) -> smc_wake.Config:
    chosen = _given(steps=options.steps, lr=options.lr, particles=options.particles)
    chosen |= _given(family=options.encoder, estimator=options.estimator)
    return smc_wake.Config(seed=options.seed, **chosen)


_PATH = frozenset({"steps", "lr", "bridges"})
_ENCODED = frozenset({"steps", "lr", "encoder", "estimator", "particles"})
_LAYERED = frozenset({"steps", "lr", "layers", "layerwise"})

POSTERIOR_METHODS: dict[str, PosteriorMethod] = {
    "vi": PosteriorMethod(gaussian_vi, _gaussian, frozenset({"steps", "lr", "covariance"}), whitened=False),
    "smc-wake": PosteriorMethod(smc_wake, _wake, _ENCODED, whitened=False),
    **{kind: PosteriorMethod(langevin_vi, _langevin(kind), _PATH) for kind in langevin_vi.KINDS if kind != "vi"},
    "hsivi-lb": PosteriorMethod(hsivi_lb, _hsivi(hsivi_lb), _LAYERED),
    "hsivi-sm": PosteriorMethod(hsivi_sm_posterior, _hsivi(hsivi_sm_posterior), _LAYERED),
}
_FLAGS = {"steps": None, "lr": None, "bridges": None, "layers": None, "layerwise": False, "covariance": "full-rank"}
_FLAGS |= dict.fromkeys(("encoder", "estimator", "particles"))


UNTRAINED = ("auto", "smc")
"""Methods without a module, which take no training options."""


def check_options(options: FitOptions) -> None:
    """Refuse a method that is not there and options that the method would ignore; raises InputError."""
    if options.method in UNTRAINED:
        taken: frozenset[str] = frozenset()
        if options.paper and options.method == "auto":
            raise InputError("--paper belongs to one method: name it with --method")
        if options.paper or (options.method == "smc" and options.refine != "auto"):
            raise InputError(f"--{'paper' if options.paper else 'refine'} does nothing for --method {options.method}")
    elif options.method in POSTERIOR_METHODS:
        if options.paper and options.method == "smc-wake":
            raise InputError("--paper does nothing for --method smc-wake")
        taken = POSTERIOR_METHODS[options.method].takes
    else:
        raise InputError(
            f"--method {options.method!r} is unknown: choose {', '.join([*UNTRAINED, *POSTERIOR_METHODS])}"
        )
    for name, default in _FLAGS.items():
        if getattr(options, name) != default and name not in taken:
            takers = [method for method, entry in POSTERIOR_METHODS.items() if name in entry.takes]
            raise InputError(f"--{name} does nothing for --method {options.method}: it belongs to {', '.join(takers)}")
