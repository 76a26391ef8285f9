"""What a latent-variable fit says of itself: likelihood of rows held out, the map's scores, and a verdict."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hsivi_cli.engine.seeds import Stream, generator
from hsivi_cli.errors import RunError
from hsivi_cli.evaluation.latent_metrics import Bounds, ClusterScores, Paired, bounds, collapse, inference_gaps, paired
from hsivi_cli.evaluation.pareto import smooth_weights
from hsivi_cli.evaluation.verdict import KHAT_BAD, WORDS, Level, Verdict
from hsivi_cli.methods.latent_fit import Latents, Prepared, Trained, latents_of
from hsivi_cli.methods.latent_registry import PAPER
from hsivi_cli.methods.latent_scores import score_map
from hsivi_cli.methods.latent_training import gaussian_draws
from hsivi_cli.networks.decoders import column_scales
from hsivi_cli.targets.likelihoods import likelihood_for

MOST_TEST, MOST_JUDGED, KHAT_DRAWS = 2000, 50, 500
"""Rows held out that the likelihood is estimated on, those whose weights are judged, and draws of each of those."""
DRAWS_AT_ONCE = 50_000
FEW, MANY = 0.1, 0.5
"""Shares of the judged rows whose k-hat may be above the limit: for trust, and for use at all."""
WIDE_GAP = 1.0
"""Nats between IWAE and ELBO from which draws are noticeably not those of the posterior."""
MOST_SEEN = 50_000
"""Rows trained on that columns alone are estimated from."""
MOST_GAP, GAP_DRAWS = 32, 2000
"""Rows whose gaps are measured, and draws of each behind its log p(x)."""
GAUSSIAN = ("gpvae", "gpvae-fg", "vae", "iwae", "sa-vae", "vae-decay")
"""Methods whose gaps mean something: the best of a search is of their own family."""


@dataclass(frozen=True)
class LatentReport:
    """Figures of one method on n rows: bounds in nats a row with standard errors over rows; None: there is none.

    `pseudo_elbo` is what `--paper` calls an ELBO; it bounds nothing. `alone` is the log likelihood of columns that know
    nothing of each other, in the same nats: what a model without latents has. `explained` is the share of the variance
    of rows that a draw's reconstruction explains, `used` how many latents vary with the row, `khats` their k-hats.
    `clusters` are those of the prior, k-means and a Gaussian mixture against the classes: see `latent_scores`. `bounds`
    are the rows' own, not part of the JSON.
    """

    method: str
    rows: int
    held_out: bool
    iwae_samples: int
    iwae: float | None
    iwae_se: float | None
    elbo: float | None
    elbo_se: float | None
    pseudo_elbo: float | None
    alone: float
    explained: float
    used: int
    latent: int
    khats: tuple[float, ...]
    scores: dict[str, float]
    clusters: dict[str, ClusterScores]
    seconds: float
    steps: int
    verdict: Verdict
    bounds: Bounds | None = None

    def less(self, other: "LatentReport") -> Paired | None:
        """Paired differences of the bounds to those of another method; None where one of the two has none."""
        return None if self.bounds is None or other.bounds is None else paired(self.bounds, other.bounds)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        fields = asdict(replace(self, bounds=None))
        del fields["bounds"]
        fields["verdict"] = {"level": self.verdict.level, "reasons": list(self.verdict.reasons)}
        khats = np.array(self.khats or (math.nan,))
        above = float((khats > KHAT_BAD).mean()) if self.khats else None
        fields["khat"] = {"rows": len(self.khats), "median": float(np.median(khats)), "share_above_0.7": above}
        return {name: value for name, value in fields.items() if name != "khats"}


def report_on_fit(
    trained: Trained,
    prepared: Prepared,
    iwae_samples: int,
    seed: int,
    gap: bool = False,
    on_stage: Callable[[int], None] = lambda stages: None,
) -> LatentReport:
    """Measure a fit on the rows held out (at most 2000 of them), in three stages; `gap`: gaps of Gaussians too.

    Raises InputError where the latents are not finite.
    """
    x, posterior, model = prepared.test[:MOST_TEST], trained.posterior, trained.model
    found = bounds(posterior, x, iwae_samples, generator(seed, Stream.SIMULATE, 0))
    on_stage(1)
    khats = _khats(posterior, x[:MOST_JUDGED], seed) if found is not None else ()
    pseudo = None
    if hasattr(posterior, "pseudo_elbo"):
        pseudo = float(posterior.pseudo_elbo(x, generator(seed, Stream.SIMULATE, 0)).mean())
    on_stage(1)
    latents = latents_of(posterior, model, x, seed, 1)
    assert latents.draws is not None
    if not bool(latents.mean.isfinite().all() and latents.draws.isfinite().all()):
        raise RunError("diverged: the latents are not finite: use a lower --lr")
    scale = _prior_sd(model)
    used = collapse(latents.mean.float() / scale, latents.sd.float() / scale).active
    with torch.no_grad():
        rebuilt = model.reconstruct(latents.draws[0].to(model.like())).float()
    alone = columns_alone(prepared, x)
    scores, clusters = score_map(trained, prepared, latents, seed)
    if gap and trained.name in GAUSSIAN:
        scores |= _gaps(trained, x, latents, seed)
    on_stage(1)
    return LatentReport(
        trained.name,
        len(x),
        prepared.train < len(prepared.rows),
        iwae_samples,
        None if found is None else found.iwae,
        None if found is None else found.iwae_se,
        None if found is None else found.elbo,
        None if found is None else found.elbo_se,
        pseudo,
        float(alone.mean()),
        _explained(x, rebuilt),
        used,
        latents.mean.shape[1],
        khats,
        scores,
        clusters,
        trained.seconds,
        trained.state.step,
        _judge(trained.name, found, khats, used, latents.mean.shape[1], alone if x.shape[1] > used else None),
        found,
    )


@torch.no_grad()
def _gaps(trained: Trained, x: Float[Tensor, "n D"], latents: Latents, seed: int) -> dict[str, float]:
    """Nats a row between the encoder's Gaussian and the best one of a search from it, and from there to log p(x), over

    a few rows. log p(x) is the importance-weighted bound of draws of that best Gaussian.
    """
    like, rows, noise = trained.model.like(), slice(0, MOST_GAP), generator(seed, Stream.SIMULATE, 3)
    x, mean, sd = (part[rows].to(like) for part in (x, latents.mean, latents.sd))
    with torch.enable_grad():
        gaps = inference_gaps(trained.model.log_joint, x, mean, sd, noise, draws=200)
    best = gaussian_draws(trained.model, x, gaps.best_mean.to(like), gaps.best_sd.to(like), GAP_DRAWS, noise)
    assert best.log_weight is not None
    log_p = best.log_weight.logsumexp(0) - math.log(GAP_DRAWS)
    return {
        "amortisation gap": float(gaps.amortisation.mean()),
        "approximation gap": float((log_p - gaps.best_elbo).mean()),
    }


def _prior_sd(model: Any) -> Float[Tensor, " d"]:
    drawn = model.prior.sample(4096, torch.Generator().manual_seed(0)).detach()
    sd: Tensor = drawn.std(0).float().cpu()
    return sd


def _explained(x: Float[Tensor, "n D"], rebuilt: Float[Tensor, "n D"]) -> float:
    """1 - squared error over variance, summed over the columns in units of each column's own spread."""
    there = ~x.isnan()
    count = there.sum(0).clamp_min(1)
    mean = x.double().nan_to_num(0.0).sum(0) / count
    spread = (x - mean).nan_to_num(0.0).square().sum(0)
    error = (x - rebuilt).double().nan_to_num(0.0).square().sum(0)
    moving = spread > 0
    return float(1 - (error[moving] / spread[moving]).mean()) if bool(moving.any()) else math.nan


def _khats(posterior: Any, x: Float[Tensor, "n D"], seed: int) -> tuple[float, ...]:
    """k-hat of the weights of each row; infinite where no draw has any."""
    found: list[float] = []
    for index, block in enumerate(x.split(max(1, DRAWS_AT_ONCE // KHAT_DRAWS))):
        log_weight = posterior.draw(block, KHAT_DRAWS, generator(seed, Stream.SIMULATE, 1, index)).log_weight
        for row in log_weight.T:
            try:
                found.append(smooth_weights(row).khat)
            except RunError:
                found.append(math.inf)
    return tuple(found)


def columns_alone(prepared: Prepared, x: Float[Tensor, "n D"]) -> Float[Tensor, " n"]:
    """Log likelihood of rows under the columns' own means (shares) and noise in rows trained on, float64."""
    seen, x = prepared.values[: min(prepared.train, MOST_SEEN)].double(), x.double()
    likelihood = likelihood_for(prepared.model.likelihood, seen)
    sd = column_scales(seen)[1]
    if prepared.model.noise == "shared":
        sd = sd.square().mean(0, keepdim=True).sqrt()
    return likelihood.log_prob(likelihood.base(seen).expand(len(x), -1), x, sd.log())


def _judge(
    method: str,
    found: Bounds | None,
    khats: tuple[float, ...],
    used: int,
    latent: int,
    alone: Float[Tensor, " n"] | None = None,
) -> Verdict:
    """Weights carry the verdict: where most rows' weights have a tail that cannot be corrected, nothing is left."""
    findings: list[tuple[Level, str]] = []
    if method == PAPER:
        findings.append(("care", "what --paper calls an ELBO is not a bound, and no weights check its draws"))
    elif found is None:
        findings.append(("care", f"draws of {method} have no density: nothing checks them"))
    else:
        findings.append(_of_weights(found, khats))
    if used == 0:
        findings.append(("care", f"collapsed: none of the {latent} latents varies with the row, the map says nothing"))
    elif 2 * used <= latent:
        findings.append(("care", f"collapsed: {used} of {latent} latents vary with the row"))
    if found is not None and used and alone is not None and found.iwae <= float(alone.mean()):
        text = f"IWAE-{found.draws} is {found.iwae:.2f} nats, and columns that know nothing of each other have"
        findings.append(("care", f"the latents tell nothing of these rows: {text} {float(alone.mean()):.2f}"))
    order = ("trust", "care", "no")
    level = max((level for level, _ in findings), key=order.index)
    reasons = tuple(text for own, text in findings if own == level)
    return Verdict(level, reasons, f"{WORDS[level]}: {'; '.join(reasons)}")


def _of_weights(found: Bounds, khats: tuple[float, ...]) -> tuple[Level, str]:
    lost = int((~(found.elbo_rows.isfinite() & found.iwae_rows.isfinite())).sum())
    if lost:
        rows = len(found.elbo_rows)
        return "no", f"the bound of {lost} of {rows} rows is not finite: use a lower --lr or more --steps"
    gap = max(0.0, float((found.iwae_rows - found.elbo_rows).mean()))
    high = sum(khat > KHAT_BAD for khat in khats) / max(len(khats), 1)
    text = f"IWAE-{found.draws} is {gap:.2f} nats above the ELBO, k-hat above {KHAT_BAD} in {high:.0%} of rows"
    if high > MANY:
        return "no", f"{text}: draws are not of the posterior, use the map alone"
    if high > FEW or gap > WIDE_GAP:
        return "care", f"{text}: draws are only near the posterior's"
    return "trust", text
