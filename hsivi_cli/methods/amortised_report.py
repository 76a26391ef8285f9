"""What an amortised fit says of itself: each observation, all of them together, and the encoder alone."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hsivi_cli.evaluation.verdict import KHAT_BAD, WORDS, Level, Verdict
from hsivi_cli.methods.amortised_draws import RowDraws
from hsivi_cli.targets.encoder_check import EncoderCheck

FEW = 0.05  # share of the observations that may fall short before all are judged by them
COVERAGE_AT = (0.5, 0.9)
FAR = 1.0  # standard deviations beyond the range of training, where nobody has checked what the encoder does


@dataclass(frozen=True)
class AmortisedReport:
    """Everything that is printed of B observations; `check` is the encoder's calibration, None where not measured.

    `beyond` (B,) is how far an observation lies outside of those that training has seen, in their standard deviations;
    None where these are the ones trained on.
    """

    method: str
    columns: tuple[str, ...]
    rows: list[RowDraws]
    verdict: Verdict
    encoder: str
    check: EncoderCheck | None
    beyond: Float[Tensor, " B"] | None = None
    simulated: int = 0
    lost: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain JSON: what a script wants to read."""
        fields: dict[str, Any] = {"method": self.method, "amortised": True, "n": len(self.rows[0].values)}
        fields |= {"verdict": {"level": self.verdict.level, "reasons": list(self.verdict.reasons)}}
        fields |= {
            "encoder": self.encoder,
            "calibrated": self.calibrated,
            "simulated": self.simulated,
            "lost": self.lost,
        }
        fields["observations"] = [self._row(i) for i in range(len(self.rows))]
        if self.check is not None:
            found, curve = self.check.sbc, self.check.coverage
            fields["sbc"] = {
                "passed": found.passed and curve.inside,
                "replications": found.replications,
                "failing": list(found.failing),
                "p_values": dict(zip(found.columns, map(float, found.p_values), strict=True)),
                "coverage": {f"{level:g}": _covered(self.check, level) for level in (0.5, 0.8, 0.9, 0.95)},
                "coverage_inside_band": curve.inside,
            }
        return _plain(fields)

    @property
    def calibrated(self) -> bool | None:
        """Whether the encoder's calibration passed, None where it was not measured."""
        return None if self.check is None else _passed(self.check)

    def _row(self, i: int) -> dict[str, Any]:
        row = self.rows[i]
        draws = row.values.quantile(torch.tensor([0.05, 0.95], dtype=torch.float64), 0)
        fields: dict[str, Any] = {"observation": i + 1, "correction": row.route, "khat": row.khat, "ess": row.ess}
        fields |= {"log_z": row.log_z, "log_z_se": row.log_z_se}
        fields["level"] = row.verdict.level if row.verdict is not None else None
        if self.beyond is not None:
            fields["beyond"] = float(self.beyond[i])
        figures = zip(self.columns, row.mean.tolist(), row.sd.tolist(), *draws.tolist(), strict=True)
        fields["parameters"] = {
            name: {"mean": mean, "sd": sd, "q5": q5, "q95": q95} for name, mean, sd, q5, q95 in figures
        }
        return fields


def report_on_rows(
    method: str,
    columns: tuple[str, ...],
    rows: list[RowDraws],
    check: EncoderCheck | None,
    beyond: Float[Tensor, " B"] | None = None,
    simulated: tuple[int, int] = (0, 0),
    inherited: tuple[str, bool | None] | None = None,
) -> AmortisedReport:
    """Judge the draws of all observations. `simulated` counts (made, lost).

    `inherited` is what a fit said of its encoder, and whether calibration passed. Corrected draws are judged by their
    weights and moves; the encoder's own by its calibration as well.
    """
    encoder, calibrated = inherited or (_of_encoder(check), None if check is None else _passed(check))
    verdict = _of_rows(rows, calibrated, beyond)
    return AmortisedReport(method, columns, rows, verdict, encoder, check, beyond, *simulated)


def _of_rows(rows: list[RowDraws], calibrated: bool | None, beyond: Float[Tensor, " B"] | None) -> Verdict:
    judged, total = [row.verdict for row in rows if row.verdict is not None], len(rows)
    if not judged:
        text = "nothing has checked these draws: name the model with --model"
        far = [] if beyond is None else (beyond > FAR).nonzero()[:, 0].tolist()
        if far:
            text = f"{_some(far, total)} far outside of what training has seen, and {text}"
        level: Level = "no" if far else "care"
        return Verdict(level, (text,), f"{WORDS[level]}: {text}")
    poor = [i for i, verdict in enumerate(judged) if verdict.level == "no"]
    noisy = [i for i, verdict in enumerate(judged) if verdict.level == "care"]
    uncorrected = all(row.route == "encoder" for row in rows)
    reasons: list[str] = []
    level = "trust"
    if poor:
        level = "no" if len(poor) > FEW * total else "care"
        way_on = ", leave out --refine none" if uncorrected else ""
        reasons.append(f"{_some(poor, total)}: {judged[poor[0]].reasons[0]}{way_on}")
    if len(noisy) > FEW * total:
        level = "no" if level == "no" else "care"
        reasons.append(f"{_some(noisy, total)}: {judged[noisy[0]].reasons[0]}")
    if uncorrected and calibrated is False:
        level = max(level, "care", key=("trust", "care", "no").index)
        reasons.append("the encoder is not calibrated, and nothing corrects its draws")
    if level == "trust":
        reasons = [_how(rows)]
    return Verdict(level, tuple(reasons), f"{WORDS[level]}: {'; '.join(reasons)}")


def _how(rows: list[RowDraws]) -> str:
    tempered = sum(row.route == "smc" for row in rows)
    khats = torch.tensor([row.khat for row in rows if row.route != "smc"])
    parts = []
    if len(khats):
        parts.append(f"k-hat at most {float(khats.max()):.2f} in {len(khats)} of {len(rows)} observations")
    if tempered:
        lacking = sum(row.route == "smc" and row.khat <= KHAT_BAD for row in rows)
        why = f" ({lacking} because the encoder's draws lacked evidence)" if lacking else ""
        parts.append(f"{tempered} by tempered SMC instead{why}")
    return ", ".join(parts)


def _of_encoder(check: EncoderCheck | None) -> str:
    """What calibration says of the encoder on observations it has not seen, in one line."""
    if check is None:
        return "encoder alone: not calibrated (the model simulates nothing, or --sbc 0)"
    covered = ", ".join(f"{_covered(check, level):.0%} in the {level:.0%} region" for level in COVERAGE_AT)
    size = f"{check.sbc.replications} simulated observations"
    if _passed(check):
        return f"encoder alone: calibrated in {size} ({covered})"
    whose = f"; ranks fail for {', '.join(check.sbc.failing[:3])}" if check.sbc.failing else ""
    off = ""
    if not check.coverage.inside:
        off = "; overconfident" if check.coverage.deviation < 0 else "; too wide"
    return f"encoder alone: not calibrated in {size} ({covered}{off}{whose})"


def _passed(check: EncoderCheck) -> bool:
    return check.sbc.passed and check.coverage.inside


def _covered(check: EncoderCheck, level: float) -> float:
    nearest = int(abs(check.coverage.levels - level).argmin())
    return float(check.coverage.observed[nearest])


def _some(which: list[int], total: int, most: int = 5) -> str:
    """As "3 of 100 observations (4, 17, 80)"."""
    numbers = ", ".join(str(i + 1) for i in which[:most]) + (" ..." if len(which) > most else "")
    return f"{len(which)} of {total} observations ({numbers})"


def _plain(value: Any) -> Any:
    """JSON has no numbers that are not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def outside(beyond: Float[Tensor, " B"]) -> str:
    """Which observations lie outside of the range of training, and how far."""
    rows = (beyond > 0).nonzero()[:, 0]
    farthest = rows[beyond[rows].argsort(descending=True)].tolist()
    return (
        f"{_some(farthest, len(beyond))} outside of the range that training has seen, the first by "
        f"{float(beyond.max()):.3g} standard deviations: the encoder extrapolates there"
    )
