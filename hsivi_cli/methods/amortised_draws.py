"""Draws of an amortised posterior for many observations, each checked, and corrected where the encoder is off.

One pass of the encoder gives the draws. Where the model is at hand, each observation's draws carry exact importance
weights, whose tail (k-hat) says how far they can be trusted; they are resampled by the smoothed weights, and where the
weights are too uneven the observation gets tempered SMC from the prior instead.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from hsivi_cli.engine.seeds import Stream
from hsivi_cli.engine.seeds import generator as named_generator
from hsivi_cli.errors import RunError
from hsivi_cli.evaluation.pareto import resample, smooth_weights
from hsivi_cli.evaluation.verdict import KHAT_BAD, Moves, Verdict, Weights, judge
from hsivi_cli.methods.smc_posterior import MOST, SAMPLERS, draw_smc, particles_for
from hsivi_cli.networks.posterior_encoder import Encoder
from hsivi_cli.targets.amortised import AmortisedTarget
from hsivi_cli.targets.density import Density, Parts, column_names, flatten_values

Route = Literal["encoder", "weights", "smc"]
Constrain = Callable[[Float[Tensor, "n d"]], dict[str, Tensor]]
RAW, LEAST_RAW = 2, 2000  # raw draws a draw that is kept, and at least
BLOCK = 400_000  # raw draws made at once, of as many observations as that is
MISSING = 0.05  # of log Z, that independent samplers must find more than the draws before these count as incomplete


@dataclass(frozen=True)
class RowDraws:
    """The posterior of one observation: n equally weighted draws of p named scalars.

    `values` (n, p); `log_approx` and `log_prob` (n,) in the unconstrained coordinates, NaN where unknown. `khat` and
    `ess` are those of the encoder's weighted draws (`ess` of the draws that were kept, where tempered), NaN without the
    model; `log_z` the log evidence with its error. `mean` and `sd` (p,) are of all weighted draws.
    """

    route: Route
    values: Float64[Tensor, "n p"]
    log_approx: Float64[Tensor, " n"]
    log_prob: Float64[Tensor, " n"]
    mean: Float64[Tensor, " p"]
    sd: Float64[Tensor, " p"]
    khat: float = math.nan
    ess: float = math.nan
    log_z: float = math.nan
    log_z_se: float = math.nan
    verdict: Verdict | None = None


def draw_rows(
    encoder: Encoder,
    x: Float[Tensor, "B N"],
    n: int,
    seed: int,
    constrain: Constrain,
    target: AmortisedTarget | None = None,
    refine: str = "auto",
    least_log_z: Float[Tensor, " B"] | None = None,
    on_row: Callable[[int], object] = lambda done: None,
) -> list[RowDraws]:
    """`n` draws for every observation; those of row i depend on the seed, i and the observation alone.

    Without `target` they are the encoder's own, unchecked. `refine` "none" checks and leaves them as they are, "auto"
    corrects them. `least_log_z` is what independent samplers found of each log evidence: draws that account for less
    have missed a part of the posterior.
    """
    raw = n if target is None else max(RAW * n if refine == "auto" else n, LEAST_RAW)
    rows: list[RowDraws] = []
    size = max(1, BLOCK // raw)
    for first in range(0, len(x), size):
        part = x[first : first + size]
        generators = [named_generator(seed, Stream.DRAW, first + i) for i in range(len(part))]
        noise = [torch.randn(raw, encoder.noise_dim, generator=g, dtype=torch.float64) for g in generators]
        with torch.no_grad():
            z = encoder.sample(torch.stack(noise), part)
            log_approx = encoder.log_prob(z, part, precise=True)
            log_prob = None if target is None else target.log_prior(z) + target.log_likelihood(z, part)
        for i, generator in enumerate(generators):
            values = flatten_values(constrain(z[i])).double()
            if target is None or log_prob is None:
                unknown = torch.full((n,), math.nan, dtype=torch.float64)
                rows.append(RowDraws("encoder", values, log_approx[i], unknown, values.mean(0), values.std(0)))
            else:
                least = None if least_log_z is None else float(least_log_z[first + i])
                found = _weighted(values, log_approx[i], log_prob[i], n, refine, generator)
                if refine == "auto" and _incomplete(found, least):
                    found = _tempered(target, part[i], n, _seed_from(generator), found.khat, constrain)
                rows.append(found)
            on_row(len(rows))
    return rows


def _weighted(
    values: Float64[Tensor, "r p"],
    log_approx: Float64[Tensor, " r"],
    log_prob: Float64[Tensor, " r"],
    n: int,
    refine: str,
    generator: torch.Generator,
) -> RowDraws:
    log_weight = torch.where(log_prob.isnan(), -math.inf, log_prob - log_approx)
    try:
        weights = smooth_weights(log_weight)
    except RunError:  # no draw is possible
        lost = Verdict("no", ("no draw of the encoder is possible",), "do not use: no draw of the encoder is possible")
        kept = slice(n)
        mean, sd = values.mean(0), values.std(0)
        return RowDraws(
            "encoder", values[kept], log_approx[kept], log_prob[kept], mean, sd, math.inf, 0.0, -math.inf, verdict=lost
        )
    corrected = refine == "auto"
    index = resample(weights.log_weight, n, generator) if corrected else torch.arange(n)
    share = weights.log_weight.exp()[:, None] if corrected else torch.full((len(values), 1), 1 / len(values))
    mean = (share * values).sum(0)
    sd = (share * (values - mean).square()).sum(0).sqrt()
    verdict = judge(weights.n, Weights(weights.khat, weights.ess))
    if verdict.level == "no":
        text = f"k-hat {weights.khat:.2f}: the encoder is too far off to be corrected by weights"
        verdict = Verdict("no", (text,), f"do not use: {text}")
    return RowDraws(
        "weights" if corrected else "encoder",
        values[index],
        log_approx[index],
        log_prob[index],
        mean,
        sd,
        weights.khat,
        weights.ess,
        weights.log_z,
        weights.log_z_se,
        verdict,
    )


def _incomplete(found: RowDraws, least_log_z: float | None) -> bool:
    """Whether weights cannot mend these draws: too uneven, or less evidence than samplers have found independently."""
    assert found.verdict is not None
    if found.verdict.level == "no" or found.khat > KHAT_BAD:
        return True
    return least_log_z is not None and least_log_z > found.log_z + 3 * found.log_z_se + MISSING


def _tempered(
    target: AmortisedTarget, x: Float[Tensor, " N"], n: int, seed: int, khat: float, constrain: Constrain
) -> RowDraws:
    """Draws by tempered SMC from the prior, which owe the encoder nothing."""
    assert target.sample_prior is not None

    def log_likelihood(z: Float[Tensor, "m d"]) -> Float[Tensor, " m"]:
        return target.log_likelihood(z[None], x[None])[0]

    parts = Parts(target.sample_prior, target.log_prior, log_likelihood)
    density = Density(target.name, target.dim, lambda z: target.log_prior(z) + log_likelihood(z), parts=parts)
    found = draw_smc(density, n, seed, particles=particles_for(density, SAMPLERS * MOST))
    values = flatten_values(constrain(found.draws.z)).double()
    moves = Moves(found.ess, found.r_hat, found.acceptance, None, found.particles, found.r_hat_noise)
    verdict = judge(max(n, int(found.ess)), moves=moves)
    if found.note:
        verdict = Verdict("care", (found.note,), f"use with care: {found.note}")
    unknown = torch.full((n,), math.nan, dtype=torch.float64)
    mean, sd = values.mean(0), values.std(0)
    figures = (khat, found.ess, found.log_z, found.log_z_se)
    return RowDraws("smc", values, unknown, found.draws.log_prob, mean, sd, *figures, verdict)


def _seed_from(generator: torch.Generator) -> int:
    return int(torch.randint(2**62, (), generator=generator))


def names_of(constrain: Constrain, dim: int) -> list[str]:
    """The columns of `values`."""
    return column_names(constrain(torch.zeros(1, dim, dtype=torch.float64)))
