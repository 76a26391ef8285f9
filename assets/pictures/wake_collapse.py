"""Draw wake_collapse.png: the wake objective collapses on two moons, SMC-Wake covers both of them.

    python assets/pictures/wake_collapse.py

Two encoders with the same network learn the posteriors of the 100 observations of assets/models/two_moons.csv from the
likelihood alone, without simulations: one by reweighted wake-sleep (`wake`), one by `smc-wake`. Four observations are
drawn, with the exact posterior on a grid. A few minutes on two cores.
"""

import math
from pathlib import Path

import matplotlib
import pandas as pd
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from hsivi_cli.engine.seeds import Stream, generator
from hsivi_cli.methods import amortised
from hsivi_cli.networks.posterior_encoder import EncoderConfig
from hsivi_cli.targets.amortised import load_amortised

HERE = Path(__file__).resolve().parent
PLACES = ((0.1, 0.3), (0.0, -0.2), (-0.2, 0.1), (-0.4, -0.1))  # the observations nearest to these are drawn
STEPS, DRAWS, SIDE, SEED = 1000, 1000, 400, 0
WINDOW = (-0.8, 0.8)  # of the box (-1, 1)
WAKE, SMC_WAKE, EXACT = "#c8553d", "#2a6f97", "#333333"


def main() -> None:
    """Train both, draw, save."""
    torch.set_num_threads(1)  # the tensors are small
    models = HERE.parent / "models"
    target = load_amortised(models / "two_moons.py", pd.read_csv(models / "two_moons.csv"))
    rows = torch.cdist(torch.tensor(PLACES, dtype=torch.float64), target.observed).argmin(1)
    x = target.observed[rows]
    theta, log_exact = exact_posterior(target, x)
    fits = {method: fit(target, method) for method in ("wake", "smc-wake")}

    plt.rcParams.update({"font.size": 10, "font.family": "DejaVu Sans", "axes.linewidth": 0.6})
    figure, axes = plt.subplots(3, len(x), figsize=(2.45 * len(x) + 0.5, 7.7), sharex=True, sharey=True)
    for column in range(len(x)):
        surface = log_exact[column].exp().reshape(SIDE, SIDE).T
        half, level = (density_level(log_exact[column], share) for share in (0.5, 0.95))
        grid = theta[:, 0].reshape(SIDE, SIDE)[:, 0]
        for axis in axes[:, column]:
            axis.set(xlim=WINDOW, ylim=WINDOW, aspect="equal", xticks=(-0.5, 0, 0.5), yticks=(-0.5, 0, 0.5))
            axis.tick_params(length=2, width=0.6)
        axes[0, column].contourf(grid, grid, surface, levels=[level, half, math.inf], colors=["#aaaaaa", EXACT])
        axes[0, column].set_title(f"x = ({x[column, 0]:.2f}, {x[column, 1]:.2f})", fontsize=10)
        for axis, method, colour in zip(axes[1:, column], fits, (WAKE, SMC_WAKE), strict=True):
            axis.contour(grid, grid, surface, levels=[level], colors=EXACT, linewidths=0.6, alpha=0.75)
            z = fits[method].draw(DRAWS, torch.Generator().manual_seed(1), x[[column]])[0]
            draws = target.constrain(z)["theta"]
            axis.scatter(*draws.T, s=2.5, color=colour, alpha=0.45, linewidths=0, zorder=3)
            upper = float((draws.sum(1) > 0).double().mean())
            kl = divergence(fits[method], theta, log_exact[column], x[[column]])
            text = f"KL {kl:,.2f}   upper moon {upper:.0%}" if kl < 100 else f"KL {kl:,.0f}   upper moon {upper:.0%}"
            axis.text(0.03, 0.03, text, transform=axis.transAxes, fontsize=8.5, color=colour)
    for axis, name, colour in zip(axes[:, 0], ("exact", "wake", "SMC-Wake"), (EXACT, WAKE, SMC_WAKE), strict=True):
        axis.set_ylabel(r"$\theta_2$")
        place = {"xycoords": "axes fraction", "rotation": 90, "va": "center"}
        axis.annotate(name, (-0.44, 0.5), **place, fontsize=13, weight="bold", color=colour)
    for axis in axes[-1]:
        axis.set_xlabel(r"$\theta_1$")
    figure.suptitle(
        "Two moons: four of 100 observations, one encoder a method; contours hold 50% and 95% of the exact posterior",
        fontsize=11, y=0.985,
    )  # fmt: skip
    figure.subplots_adjust(left=0.125, right=0.985, bottom=0.06, top=0.92, hspace=0.06, wspace=0.08)
    figure.savefig(HERE / "wake_collapse.png", dpi=150)


def fit(target, method):
    """The encoder that `method` comes to, and a line about it."""
    network = EncoderConfig(family="nsf", hidden=(64, 64), transforms=3)
    config = amortised.Config(
        method=method, steps=STEPS, seed=SEED, lr=5e-3, batch=32, draws=16, kernel="random-walk", encoder=network
    )
    state = amortised.init(target, config)
    for step in range(1, STEPS + 1):
        found = amortised.step(state, None, generator(SEED, Stream.TRAIN, step))
        if step % 250 == 0:
            print(f"{method}: step {step} of {STEPS}, cross-entropy {found['cross_entropy']:.2f}", flush=True)  # noqa: T201
    return state.encoder


def exact_posterior(target, x):
    """The grid (SIDE^2, 2) over the box, and the log density of the exact posterior of each x on it."""
    centre = (torch.arange(SIDE, dtype=torch.float64) + 0.5) / SIDE * 2 - 1
    theta = torch.stack(torch.meshgrid(centre, centre, indexing="ij"), -1).reshape(-1, 2)
    z = torch.logit((theta + 1) / 2)
    log_likelihood = torch.cat([target.log_likelihood(z[None], row[None]) for row in x])  # the prior is flat
    return theta, log_likelihood - log_likelihood.logsumexp(1, keepdim=True) - math.log((2 / SIDE) ** 2)


def density_level(log_density, share):
    """The density above which `share` of the mass on the grid lies."""
    ordered = log_density.exp().sort(descending=True).values
    return float(ordered[int(torch.searchsorted(ordered.cumsum(0) / ordered.sum(), share))])


@torch.no_grad()
def divergence(encoder, theta, log_exact, x):
    """KL(exact || encoder) by the grid; the encoder's density is one of the logits."""
    u = (theta + 1) / 2
    log_q = encoder.log_prob(torch.logit(u)[None], x)[0] - (2 * u * (1 - u)).log().sum(1)
    probability = log_exact.exp() * (2 / SIDE) ** 2
    return float(torch.where(probability > 0, probability * (log_exact - log_q), 0.0).sum())


if __name__ == "__main__":
    main()
