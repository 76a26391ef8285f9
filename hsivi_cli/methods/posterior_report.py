"""What a fit says of itself: the summary, the checks, and the one line of the verdict."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hsivi_cli.errors import InputError
from hsivi_cli.evaluation.calibration import SbcResult, run_sbc
from hsivi_cli.evaluation.pareto import tail_shape
from hsivi_cli.evaluation.posterior_summary import ParameterSummary, summarise
from hsivi_cli.evaluation.predictive_check import PredictiveCheck, check_predictive
from hsivi_cli.evaluation.verdict import Moves, Verdict, Weights, judge
from hsivi_cli.methods.posterior import AUTO, FROM_PRIOR, USABLE_KHAT, Fit, Posterior, draw_posterior, fit_posterior
from hsivi_cli.methods.posterior_registry import FitOptions
from hsivi_cli.targets.density import Density, column_names, flatten_values

NEGLIGIBLE = 0.02  # of log Z
HEAVY = 0.5  # shape of a tail whose variance is infinite
MOST_TAILS = 200  # columns whose tails are looked at
SBC_DRAWS = 99  # ranks 0 .. 99 of each replication
MANY = 0.02  # unknowns a response, beyond which the sd of replicated responses says nothing
MOST_RESPONSES = 20_000  # of a predictive check; a million rows would take longer than the fit


@dataclass(frozen=True)
class PosteriorReport:
    """Everything that is printed. `elbo`, `log_z` and `khat` are None where the method, or a flat prior, has none."""

    method: str
    route: str
    n: int
    summary: list[ParameterSummary]
    verdict: Verdict
    ess: float
    khat: float | None
    elbo: float | None
    elbo_se: float | None
    log_z: float | None
    log_z_se: float | None
    modes: int
    predictive: PredictiveCheck | None
    calibration: SbcResult | None
    note: str

    def to_json(self) -> dict[str, Any]:
        """Plain JSON: what a script wants to read."""
        fields: dict[str, Any] = {"method": self.method, "correction": self.route, "n": self.n}
        fields |= {"verdict": {"level": self.verdict.level, "reasons": list(self.verdict.reasons)}}
        fields |= {"ess": self.ess, "khat": self.khat, "elbo": self.elbo, "elbo_se": self.elbo_se}
        fields |= {"log_z": self.log_z, "log_z_se": self.log_z_se, "modes": self.modes, "note": self.note}
        fields["parameters"] = {row.name: {k: v for k, v in asdict(row).items() if k != "name"} for row in self.summary}
        if self.predictive is not None:
            fields["predictive_p"] = {check.name: check.p for check in self.predictive.statistics}
        if self.calibration is not None:
            passed, found = self.calibration.passed, self.calibration
            fields["sbc"] = {"passed": passed, "replications": found.replications, "failing": list(found.failing)}
            fields["sbc"]["p_values"] = dict(zip(found.columns, map(float, found.p_values), strict=True))
        return fields


def report_on(fit: Fit, posterior: Posterior, calibration: SbcResult | None, seed: int) -> PosteriorReport:
    """Summarise the draws and judge them."""
    refined, raw = posterior.refined, posterior.weights
    ess = posterior.ess
    if posterior.weighted is not None and raw is not None:
        summary = summarise(posterior.columns, posterior.weighted, raw.log_weight)
    else:
        summary = summarise(posterior.columns, posterior.values, ess=ess)
    semi_implicit = fit.method.startswith("hsivi")
    weights = Weights(raw.khat, raw.ess, approximate=semi_implicit, drawn=raw.n) if raw is not None else None
    moves = None
    if refined is not None:
        weights = None  # the moves' own evidence counts: they leave the posterior unchanged wherever they started
        # particles do not cross between far modes: there the agreement of independent islands is the evidence
        memory = None if fit.modes > 1 else refined.memory
        moves = Moves(refined.ess, refined.r_hat, refined.acceptance, memory, refined.particles, refined.r_hat_noise)
    predictive = _predictive(fit.density, posterior, seed)
    n = len(posterior.values)
    non_finite = int((~posterior.values.isfinite().all(1)).sum())
    if raw is not None:
        non_finite += math.ceil(n * raw.non_finite / raw.n)
    verdict = _with_tails(judge(n, weights, moves, predictive, calibration, non_finite), fit, posterior)
    verdict = _with_means(verdict, summary)
    if posterior.route == "smc" and fit.method in FROM_PRIOR and refined is not None and refined.note:
        verdict = _lowered(verdict, refined.note)
    shown = raw if raw is not None else fit.pilot if fit.method != AUTO else None
    elbo_se = shown.elbo_se if shown is not None else None
    log_z, log_z_se = (raw.log_z, raw.log_z_se) if raw is not None else (None, None)
    if refined is not None:
        bridged = refined.log_z is not None and math.isfinite(refined.log_z)
        evidence = (refined.log_z, refined.log_z_se) if bridged else (refined.smc_log_z, refined.smc_log_z_se)
        log_z, log_z_se = evidence
    verdict = _with_evidence(verdict, fit, log_z, log_z_se)
    if semi_implicit and refined is None:  # one bank of components serves all draws: their spread is not the error
        log_z_se = elbo_se = None
    if not fit.density.proper_prior:  # known only up to the constant that the flat prior stands for
        log_z = log_z_se = None
    return PosteriorReport(
        method=fit.method,
        route=posterior.route,
        n=len(posterior.values),
        summary=summary,
        verdict=verdict,
        ess=ess,
        khat=shown.khat if shown is not None else None,
        elbo=shown.elbo if shown is not None else None,
        elbo_se=elbo_se,
        log_z=log_z,
        log_z_se=log_z_se,
        modes=fit.modes,
        predictive=predictive,
        calibration=calibration,
        note=posterior.note,
    )


def _with_tails(verdict: Verdict, fit: Fit, posterior: Posterior) -> Verdict:
    """Lower a trust where a tail is so heavy that a mean or sd may not exist: then no sample shows it whole."""
    centred = (posterior.values - posterior.values.median(0).values).abs().T[:MOST_TAILS]
    heavy = [name for name, far in zip(posterior.columns, centred, strict=False) if tail_shape(far.log()) > HEAVY]
    if not heavy and not fit.heavy:
        return verdict
    more = f" and {len(heavy) - 3} more" if len(heavy) > 3 else ""
    whose = f"the tails of {', '.join(heavy[:3])}{more}" if heavy else "the posterior's tails"
    return _lowered(verdict, f"{whose} are so heavy that means, sds and extreme quantiles are not reliable")


def _with_evidence(verdict: Verdict, fit: Fit, log_z: float | None, log_z_se: float | None) -> Verdict:
    """Lower the verdict where draws around the fit found surely more evidence than the final ones account for.

    Draws that have missed a part of the posterior look perfect among themselves; only their evidence is too small.
    """
    if log_z is None or log_z_se is None or not fit.least_log_z > log_z + 3 * log_z_se + NEGLIGIBLE:
        return verdict
    share = 1 - math.exp(log_z - fit.least_log_z)
    text = f"{share:.0%} of the posterior at least is missing: pilot draws found log Z above {fit.least_log_z:.2f}"
    text += f", these draws account for {log_z:.2f}"
    return Verdict("no", (text,), f"do not use: {text}")


def _with_means(verdict: Verdict, summary: list[ParameterSummary]) -> Verdict:
    """Lower a trust where the mean of some parameter rests on few draws, though the weights are even."""
    poor = [(row.khat, row.name) for row in summary if row.khat is not None and row.khat > USABLE_KHAT]
    if verdict.level != "trust" or not poor:
        return verdict
    worst, name = max(poor)
    more = f" and {len(poor) - 1} more" if len(poor) > 1 else ""
    text = f"the mean of {name}{more} rests on few draws (its k-hat {worst:.2f})"
    return _lowered(verdict, text)


def _lowered(verdict: Verdict, text: str) -> Verdict:
    """At most "care", for this reason."""
    if verdict.level == "trust":
        return Verdict("care", (text,), f"use with care: {text}")
    return Verdict(verdict.level, (*verdict.reasons, text), f"{verdict.line}; {text}")


def calibrate(
    density: Density,
    options: FitOptions,
    replications: int,
    directory: Path,
    on_refit: Callable[[int], object] | None = None,
) -> SbcResult:
    """Simulation-based calibration of the whole fit on the model's own prior.

    Raises InputError where the model has an improper prior or cannot simulate.
    """
    predictive = density.predictive
    if predictive is None or predictive.condition is None:
        raise InputError("--sbc needs a model that simulates its response: see Model(simulate=...)")
    if predictive.prior is None:
        raise InputError("--sbc needs proper priors: replace the flat ones, or drop --sbc")
    condition = predictive.condition

    def refit(response: Float[Tensor, " N"], draws: int, replication: int) -> Float[Tensor, "draws d"]:
        again = replace(options, seed=options.seed + replication + 1)
        fit = fit_posterior(condition(response), again, directory)
        # more draws than asked for, thinned: resampled draws may repeat
        posterior = draw_posterior(fit, 8 * draws, again.seed)
        return posterior.z[::8][:draws]

    def named(z: Float[Tensor, "n d"], response: Float[Tensor, " N"]) -> Float[Tensor, "n p"]:
        # the log density depends on the data: without it, draws that ignore them would pass (Modrak et al. 2023)
        with torch.no_grad():
            height = condition(response).log_prob(z)
        return torch.cat([flatten_values(density.constrain(z)).double(), height[:, None]], 1)

    columns = [*_columns(density), "lp__"]
    generator = torch.Generator().manual_seed(options.seed)
    return run_sbc(
        predictive.prior, predictive.simulate, refit, replications, SBC_DRAWS, generator, columns, named, on_refit
    )


def _columns(density: Density) -> list[str]:
    return column_names(density.constrain(torch.zeros(1, density.dim, dtype=torch.float64)))


def _predictive(density: Density, posterior: Posterior, seed: int) -> PredictiveCheck | None:
    found = density.predictive
    if found is None:
        return None
    limit = max(50, min(1000, MOST_RESPONSES * 1000 // max(len(found.observed), 1)))
    check = check_predictive(posterior.z, found.observed, found.simulate, torch.Generator().manual_seed(seed), limit)
    if density.dim > MANY * len(found.observed):
        # p coefficients make responses that are drawn from their fit more variable than the n observed, by 2 p / n
        check = replace(check, statistics=tuple(one for one in check.statistics if one.name != "sd"))
    return check
