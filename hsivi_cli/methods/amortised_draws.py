"""Draws of an amortised posterior for many observations, each checked, and corrected where the encoder is off.

One pass of the encoder gives the draws. Where the model is at hand, each observation's draws carry exact importance
weights, whose tail (k-hat) says how far they can be trusted; they are resampled by the smoothed weights, and where the
weights are too uneven the observation gets tempered SMC from the prior instead. Weights cannot see a part of the
posterior that the encoder never visits: a few short samplers from the prior, which owe the encoder nothing, can, by the
evidence that they find and the draws lack.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from hsivi_cli.engine.seeds import Stream
from hsivi_cli.engine.seeds import generator as named_generator
from hsivi_cli.errors import InputError, RunError
from hsivi_cli.evaluation.pareto import Smoothed, resample, smooth_weights
from hsivi_cli.evaluation.verdict import KHAT_BAD, KHAT_GOOD, WORDS, Level, Moves, Verdict, Weights, judge
from hsivi_cli.methods.smc_posterior import MOST, SAMPLERS, draw_smc, particles_for
from hsivi_cli.networks.posterior_encoder import Encoder
from hsivi_cli.targets.amortised import AmortisedTarget
from hsivi_cli.targets.density import Density, Parts, column_names, flatten_values
from hsivi_cli.transitions.likelihood_smc import SmcConfig, run_smc
from hsivi_cli.transitions.particle_moves import given_observations

Route = Literal["encoder", "weights", "smc"]
Constrain = Callable[[Float[Tensor, "n d"]], dict[str, Tensor]]
RAW, LEAST_RAW = 2, 2000  # raw draws a draw that is kept, and at least
BLOCK, POINTS = 200_000, 50_000  # raw draws made at once, of as many observations as that is; densities at once
RUNS, PARTICLES, MOVES = 4, 500, 3  # of the samplers that an observation's evidence is checked by
NUMBERS = 20_000_000  # that these hold at once
CLOSE, NEAR = 0.8, 0.2  # effective share of draws that are left uncorrected, to be trusted, and to be of any use
MISSING = 0.05  # of log Z, that independent samplers must find more than the draws before these count as incomplete


@dataclass(frozen=True)
class Evidence:
    """Log evidences (B,) that samplers have found, and the standard errors of these logarithms."""

    log_z: Float64[Tensor, " B"]
    se: Float64[Tensor, " B"]


@dataclass(frozen=True)
class RowDraws:
    """The posterior of one observation: n equally weighted draws of p named scalars.

    `values` (n, p); `log_approx` and `log_prob` (n,) in the unconstrained coordinates, NaN where unknown. `khat` is of
    the encoder's weighted draws, `ess` of all draws that were made, of which `values` are n; both NaN without the
    model. `log_z` is the log evidence with its error. `mean` and `sd` (p,) are of all draws that were made.
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
    on_row: Callable[[int], object] = lambda done: None,
) -> list[RowDraws]:
    """`n` draws for every observation; those of row i depend on the seed, i and the observation alone.

    Without `target` they are the encoder's own, unchecked. `refine` "none" checks and leaves them as they are, "auto"
    corrects them.
    """
    raw = n if target is None else max(RAW * n if refine == "auto" else n, LEAST_RAW)
    rows: list[RowDraws] = []
    size = max(1, BLOCK // raw)
    for first in range(0, len(x), size):
        part = x[first : first + size]
        generators = [named_generator(seed, Stream.DRAW, first + i) for i in range(len(part))]
        noise = [torch.randn(raw, encoder.noise_dim, generator=g, dtype=torch.float64) for g in generators]
        z, log_approx, log_prob = _weigh(encoder, torch.stack(noise), part, target)
        least = None if target is None else sampled_evidence(target, part, _seed(seed, first, 2))
        for i, generator in enumerate(generators):
            values = flatten_values(constrain(z[i])).double()
            if target is None or log_prob is None:
                unknown = torch.full((n,), math.nan, dtype=torch.float64)
                rows.append(RowDraws("encoder", values, log_approx[i], unknown, values.mean(0), values.std(0)))
            else:
                found = _weighted(values, log_approx[i], log_prob[i], n, refine, generator)
                lacking = _lacking(found, least, i)
                if refine == "auto" and (lacking or found.verdict.level == "no"):  # type: ignore[union-attr]
                    before, found = found, _tempered(target, part[i], n, _seed(seed, first + i, 1), found, constrain)
                    lacking = _lacking(found, least, i) or _less(found, before)
                rows.append(_lowered(found, lacking))
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
    verdict = judge(weights.n, Weights(weights.khat, weights.ess)) if corrected else _of_raw(weights)
    if corrected and verdict.level == "no":
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


def _lacking(found: RowDraws, least: Evidence | None, row: int) -> str:
    """What the draws surely lack of the evidence that independent samplers have found; nothing: an empty text."""
    if least is None:
        return ""
    surplus = float(least.log_z[row]) - found.log_z - 3 * math.hypot(found.log_z_se, float(least.se[row]))
    if not surplus > MISSING:
        return ""
    return f"log Z {float(least.log_z[row]):.2f} was found, and these draws account for {found.log_z:.2f}"


def _less(found: RowDraws, before: RowDraws) -> str:
    """What samplers lack of the evidence that the encoder's weighted draws had found."""
    surplus = before.log_z - found.log_z - 3 * math.hypot(found.log_z_se, before.log_z_se)
    return f"the encoder found log Z {before.log_z:.2f}, samplers {found.log_z:.2f}" if surplus > MISSING else ""


def _lowered(found: RowDraws, text: str) -> RowDraws:
    """At most "care", for this reason; "no" where the encoder's own draws lack a part."""
    if not text or found.verdict is None:
        return found
    level: Level = "care" if found.verdict.level != "no" and found.route == "smc" else "no"
    reasons = (text, *(found.verdict.reasons if found.verdict.level == level else ()))
    return replace(found, verdict=Verdict(level, reasons, f"{WORDS[level]}: {'; '.join(reasons)}"))


@torch.no_grad()
def _weigh(
    encoder: Encoder, noise: Float[Tensor, "b r e"], x: Float[Tensor, "b N"], target: AmortisedTarget | None
) -> tuple[Float[Tensor, "b r d"], Float[Tensor, "b r"], Float[Tensor, "b r"] | None]:
    """Draws, log densities of the encoder, and the model's log joint densities."""
    z = encoder.sample(noise, x)
    pieces = z.split(max(1, POINTS // len(x)), 1)
    log_approx = torch.cat([encoder.log_prob(piece, x, precise=True) for piece in pieces], 1)
    return z, log_approx, None if target is None else target.log_prior(z) + target.log_likelihood(z, x)


def sampled_evidence(target: AmortisedTarget, x: Float[Tensor, "b N"], seed: int) -> Evidence | None:
    """What a few short SMC samplers from the prior find of each log evidence; None where the prior has no draws.

    The standard error is the larger of a row's own and what the spread of all rows' runs makes of it.
    """
    if target.sample_prior is None:
        return None
    config = SmcConfig(particles=PARTICLES, moves=MOVES, kernel="random-walk" if target.dim <= 3 else "hmc")
    generator, found = torch.Generator().manual_seed(seed), []
    size = max(1, NUMBERS // (RUNS * PARTICLES * max(target.dim, x.shape[1])))
    for part in x.split(size):
        repeated = part.repeat_interleave(RUNS, 0)
        samplers = given_observations(
            target.dim, target.sample_prior, target.log_prior, target.log_likelihood, repeated
        )
        found.append(run_smc(samplers, len(repeated), config, generator).log_z.reshape(len(part), RUNS))
    log_z = torch.cat(found)
    top = log_z.amax(1, keepdim=True)
    relative = torch.where(top > -math.inf, (log_z - top).exp(), 1.0)
    own = relative.std(1) / relative.mean(1) / math.sqrt(RUNS)
    return Evidence((top[:, 0] + relative.mean(1).log()), torch.maximum(own, own.square().mean().sqrt()))


def _tempered(
    target: AmortisedTarget, x: Float[Tensor, " N"], n: int, seed: int, found: RowDraws, constrain: Constrain
) -> RowDraws:
    """Draws by tempered SMC from the prior, which owe the encoder nothing; `found` again, if that finds no mass."""
    assert target.sample_prior is not None

    def log_likelihood(z: Float[Tensor, "m d"]) -> Float[Tensor, " m"]:
        return target.log_likelihood(z[None], x[None])[0]

    parts = Parts(target.sample_prior, target.log_prior, log_likelihood)
    density = Density(target.name, target.dim, lambda z: target.log_prior(z) + log_likelihood(z), parts=parts)
    try:
        run = draw_smc(density, max(n, LEAST_RAW), seed, particles=particles_for(density, SAMPLERS * MOST))
    except InputError:
        text = "no draw of the prior, and none of the encoder that weights could use, explains it"
        return replace(found, verdict=Verdict("no", (text,), f"do not use: {text}"))
    values = flatten_values(constrain(run.draws.z)).double()
    moves = Moves(run.ess, run.r_hat, run.acceptance, None, run.particles, run.r_hat_noise)
    verdict = judge(len(values), moves=moves)
    if run.note:
        level: Level = "no" if verdict.level == "no" else "care"
        reasons = (run.note, *(verdict.reasons if level == verdict.level else ()))
        verdict = Verdict(level, reasons, f"{WORDS[level]}: {'; '.join(reasons)}")
    unknown = torch.full((n,), math.nan, dtype=torch.float64)
    ess = min(run.ess, float(len(values)))
    figures = (found.khat, ess, run.log_z, run.log_z_se)
    return RowDraws(
        "smc", values[:n], unknown, run.draws.log_prob[:n], values.mean(0), values.std(0), *figures, verdict
    )


def _of_raw(weights: Smoothed) -> Verdict:
    """Draws that nothing corrects are as good as they are close: their weights must be even, not just usable."""
    share = weights.ess / weights.n
    level: Level = "trust" if share >= CLOSE and weights.khat <= KHAT_GOOD else "care" if share >= NEAR else "no"
    level = "no" if weights.khat > KHAT_BAD else level
    text = f"uncorrected, k-hat {weights.khat:.2f}, {share:.0%} of the draws effective"
    return Verdict(level, (text,), f"{WORDS[level]}: {text}")


def _seed(seed: int, row: int, what: int) -> int:
    return int(torch.randint(2**62, (), generator=named_generator(seed, Stream.DRAW, row, what)))


def names_of(constrain: Constrain, dim: int) -> list[str]:
    """The columns of `values`."""
    return column_names(constrain(torch.zeros(1, dim, dtype=torch.float64)))
