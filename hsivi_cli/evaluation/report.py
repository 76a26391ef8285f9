"""What an evaluation found and under which protocol: figures mean nothing without it."""

import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import hsivi_cli
from hsivi_cli.evaluation.extractors import Extractor
from hsivi_cli.evaluation.metrics import METRIC_SEED, Estimate, Features, Statistics, compute_metrics

COMPARABLE_N = 50_000
AS_READ = "uint8, as read"


@dataclass(frozen=True)
class EvaluationReport:
    """Metrics, the protocol they were computed under (plain JSON), and what the reader should be warned of."""

    metrics: tuple[Estimate, ...]
    protocol: dict[str, Any]
    warnings: tuple[str, ...]

    @property
    def fid(self) -> Estimate:
        """The Frechet distance."""
        return next(metric for metric in self.metrics if metric.name == "fid")

    def to_json(self) -> dict[str, Any]:
        """Plain JSON: values by name with N (`fid@5000`), null where one cannot be had; `notes` says why, or how."""
        return {
            "metrics": {metric.key: metric.value for metric in self.metrics},
            "notes": {metric.key: metric.note for metric in self.metrics},
            "protocol": self.protocol,
            "warnings": list(self.warnings),
        }


def evaluation_report(
    samples: Features,
    reference: Features | Statistics,
    extractor: Extractor,
    drawn: dict[str, Any] | None = None,
) -> EvaluationReport:
    """Compute the metrics and state the protocol.

    `drawn` says how the samples were made, where they were drawn here: seed, NFE, solver or student hash, quantisation,
    the teacher's own FID (plain JSON). Raises InputError if samples and reference do not fit each other.
    """
    metrics = compute_metrics(samples, reference)
    protocol: dict[str, Any] = {
        "n": samples.n,
        "samples": {"source": samples.source, "sha256": samples.sha256, "quantisation": AS_READ} | (drawn or {}),
        "reference": {"source": reference.source, "sha256": reference.sha256, "n": reference.n},
        "features": {"extractor": extractor.name, "weights_sha256": extractor.sha256, "resize": extractor.resize},
        "metric_seed": METRIC_SEED,
        "versions": versions(),
    }
    return EvaluationReport(metrics, protocol, _warnings(samples, reference))


def versions() -> dict[str, str]:
    """Versions of everything that can move a figure."""
    found = {"hsivi": hsivi_cli.__version__, "python": platform.python_version()}
    for package in ("torch", "torch-fidelity", "diffusers", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


def _warnings(samples: Features, reference: Features | Statistics) -> tuple[str, ...]:
    found: list[str] = []
    if samples.n < COMPARABLE_N:
        found.append(f"N = {samples.n} is below {COMPARABLE_N}: FID is biased upwards, compare at equal N only")
    dimensions = samples.features.shape[1]
    if samples.n <= dimensions:
        found.append(f"N = {samples.n} is no more than the {dimensions} features: the covariance is rank-deficient")
    if reference.sha256 == samples.sha256:
        found.append("samples and reference are the same images")
    if isinstance(reference, Statistics) and reference.extractor_sha256 is None:
        found.append(f"{reference.source} does not say which extractor made it: if another one did, no figure holds")
    return tuple(found)
