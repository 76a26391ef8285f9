"""An encoder put to the test on simulations of its own model: calibration in one batched pass."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from hsivi_cli.evaluation.amortised_calibration import CoverageCurve, calibrate_draws, coverage_curve, density_ranks
from hsivi_cli.evaluation.calibration import SbcResult
from hsivi_cli.targets.amortised import AmortisedTarget, simulate_pairs
from hsivi_cli.targets.density import column_names, flatten_values

LOG_LIKELIHOOD = "log_likelihood"


@dataclass(frozen=True)
class EncoderCheck:
    """Ranks and their tests, the coverage of regions of highest density, and simulations left out as not finite."""

    sbc: SbcResult
    coverage: CoverageCurve
    lost: int


@torch.no_grad()
def check_encoder(
    target: AmortisedTarget,
    draw: Callable[[int, torch.Generator, Float[Tensor, "R N"]], Float[Tensor, "R L d"]],
    log_q: Callable[[Float[Tensor, "R L d"], Float[Tensor, "R N"]], Float[Tensor, "R L"]],
    replications: int,
    draws: int,
    generator: torch.Generator,
) -> EncoderCheck:
    """Simulate `replications` observations from the prior and rank each truth among `draws` of the encoder.

    What is ranked: every quantity the user sees, the log likelihood, the density log q and the distance from a random
    prior point. `draw` and `log_q` are an encoder's `draw` and `log_prob`. Raises InputError where the model cannot
    simulate.
    """
    simulations = simulate_pairs(target, replications, generator)
    z, x = simulations.z, simulations.x
    samples = draw(draws, generator, x).double()
    together = torch.cat([z[:, None], samples], 1)
    values = target.constrain(together.flatten(0, 1))
    table = flatten_values(values).reshape(len(z), 1 + draws, -1)
    likelihood, density = target.log_likelihood(together, x), log_q(together, x)
    at_truths = (density[:, 0], density[:, 1:])
    sbc = calibrate_draws(
        column_names(values),
        table[:, 0],
        table[:, 1:],
        at_truths,
        generator,
        {LOG_LIKELIHOOD: (likelihood[:, 0], likelihood[:, 1:])},
    )
    return EncoderCheck(sbc, coverage_curve(density_ranks(*at_truths, generator), draws), simulations.lost)
