"""The Lorenz convection bridge (Sountsov et al. 2020, Inference Gym): 30 noisy states, x seen at 20 of them.

`s_1 ~ N(0, I_3)`, `s_{t+1} ~ N(s_t + h f(s_t), 0.1 sqrt(h))` with h = 0.02 and
`f(x, y, z) = (10 (y - x), x (28 - z) - y, x y - 8 z / 3)`, `o_t ~ N(x_t, 1)` for t = 1..10 and 21..30.
Unconstrained order: time-major, x_1, y_1, z_1, x_2, ... From the origin, variational methods end in a far worse local
optimum beside the unstable zero path, a thousand nats down; `initial` is the mode.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from hsivi_cli.targets.density import Batch, Density, Predictive
from hsivi_cli.targets.examples.common import normal_log_density, randn

TIMES = 30
SEEN = torch.tensor([*range(10), *range(20, 30)])
STEP = 0.02
STEP_SD = 0.1 * STEP**0.5
# fmt: off
OBSERVED = torch.tensor([
    -0.2761459, 0.18631345, 0.1467675, -1.3148443, -1.2150469, -0.44544014, -0.5505127, -0.9422926, -1.9986963,
    0.13876402, -16.095385, -18.901144, -21.515736, -22.736586, -23.451488, -21.417793, -15.236895, -7.6766376,
    -0.19389218, 6.26647,
], dtype=torch.float64)
# the mode given these observations, found by Newton's method to four digits after the point
MODE = torch.tensor([
    [-0.3155, -0.5252, -0.4661], [-0.3575, -0.6944, -0.4380], [-0.4249, -0.8839, -0.4098],
    [-0.5170, -1.1077, -0.3805], [-0.6352, -1.3790, -0.3489], [-0.7839, -1.7116, -0.3129],
    [-0.9694, -2.1214, -0.2695], [-1.1997, -2.6271, -0.2141], [-1.4852, -3.2516, -0.1398],
    [-1.8382, -4.0226, -0.0359], [-2.2752, -4.9730, 0.1138], [-2.8149, -6.1426, 0.3338],
    [-3.4805, -7.5773, 0.6617], [-4.3000, -9.3289, 1.1537], [-5.3058, -11.4512, 1.8943],
    [-6.5349, -13.9925, 3.0083], [-8.0265, -16.9792, 4.6765], [-9.8170, -20.3838, 7.1526],
    [-11.9304, -24.0695, 10.7733], [-14.3582, -27.6987, 15.9418], [-17.0261, -30.6076, 23.0456],
    [-19.7424, -31.6828, 32.2392], [-22.1305, -29.3754, 43.0298], [-23.5796, -22.1356, 53.7369],
    [-23.2911, -9.5554, 61.3101], [-20.5441, 6.1523, 62.4914], [-15.2046, 20.2013, 56.6307],
    [-8.1232, 28.5037, 47.4673], [-0.7976, 31.0964, 40.3049], [5.5814, 30.6707, 37.6593],
], dtype=torch.float64)
# fmt: on


def example() -> Density:
    """The published observations, with the mode to start from."""
    return lorenz_density(OBSERVED, MODE.reshape(-1))


def drift(state: Float[Tensor, "... 3"]) -> Float[Tensor, "... 3"]:
    """Lorenz's vector field (10, 28, 8/3)."""
    x, y, z = state.unbind(-1)
    return torch.stack([10 * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z], -1)


def lorenz_density(observed: Float[Tensor, " 20"], initial: Float[Tensor, " 90"] | None = None) -> Density:
    """The bridge given `observed`, x at the times SEEN."""

    def states(z: Batch) -> Float[Tensor, "n 30 3"]:
        return z.reshape(len(z), TIMES, 3)

    def constrain(z: Batch) -> dict[str, Tensor]:
        s = states(z)
        return {"x": s[..., 0], "y": s[..., 1], "z": s[..., 2]}

    def log_likelihood(z: Batch) -> Float[Tensor, "n 20"]:
        return normal_log_density(observed, states(z)[:, SEEN, 0], 1.0)

    def log_prob(z: Batch) -> Float[Tensor, " n"]:
        s = states(z)
        before, after = s[:, :-1], s[:, 1:]
        moves = normal_log_density(after, before + STEP * drift(before), STEP_SD).sum((1, 2))
        return normal_log_density(s[:, 0], 0.0, 1.0).sum(1) + moves + log_likelihood(z).sum(1)

    def gradient(z: Batch) -> Batch:
        s = states(z)
        before = s[:, :-1]
        pull = (s[:, 1:] - before - STEP * drift(before)) / STEP_SD**2
        x, y, height = before.unbind(-1)
        by_x, by_y, by_z = pull.unbind(-1)
        # pull times the Jacobian of s + h f(s)
        back = pull + STEP * torch.stack(
            [
                -10 * by_x + (28 - height) * by_y + y * by_z,
                10 * by_x - by_y + x * by_z,
                -x * by_y - 8 / 3 * by_z,
            ],
            -1,
        )
        none = torch.zeros_like(s[:, :1])
        by_state = torch.cat([back, none], 1) - torch.cat([s[:, :1], pull], 1)
        misses = torch.zeros_like(s[..., 0]).index_add(1, SEEN, observed - s[:, SEEN, 0])
        seen = torch.stack([misses, torch.zeros_like(misses), torch.zeros_like(misses)], -1)
        return (by_state + seen).reshape(len(z), 3 * TIMES)

    def simulate(z: Batch, generator: torch.Generator) -> Float[Tensor, "n 20"]:
        return states(z)[:, SEEN, 0] + randn(len(z), len(SEEN), generator=generator)

    def prior(n: int, generator: torch.Generator) -> Batch:
        path = [randn(n, 3, generator=generator)]
        for _ in range(TIMES - 1):
            path.append(path[-1] + STEP * drift(path[-1]) + STEP_SD * randn(n, 3, generator=generator))
        return torch.stack(path, 1).reshape(n, 3 * TIMES)

    return Density(
        "lorenz",
        3 * TIMES,
        log_prob,
        constrain,
        gradient,
        Predictive(observed, simulate, log_likelihood, prior, lambda response: lorenz_density(response)),
        ("prior: a Lorenz system in steps of 0.02 from normal(0, 1), noise 0.1 sqrt(0.02) a step",),
        initial=initial,
    )
