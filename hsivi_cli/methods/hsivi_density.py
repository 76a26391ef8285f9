"""The log density of a finished HSIVI chain at its own draws: two estimates that are never too low in the mean.

`q(x_0) = E q(x_0 | x_1)` has no closed form. Both estimates average J importance weights of paths that may have led to
x_0, the draw's own path being one of them; so `E exp(log p - estimate) = Z` exactly, and `E[log p - estimate]` is below
the ELBO (Yin & Zhou 2018, arXiv 1805.11183; Sobolev & Vetrov 2019, arXiv 1909.13035).
- "prior": x_1 from the chain itself. One matrix product serves all draws, but J components cannot tell more than
  log J nats about where x_0 came from: fine in a few dimensions, hopeless in sixty correlated ones.
- "reverse": whole paths from Gaussian backward steps `r(x_{k+1} | x_k)`, regressed on walks of the chain. Exact with
  J = 1 where the chain is linear.
A pilot of other walks decides which of the two is lower.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from hsivi_cli.engine.seeds import Stream, generator
from hsivi_cli.networks.conditional_gaussian import ConditionalGaussian
from hsivi_cli.objectives.hsivi_bound import log_mixture_sum

Rows = Float[Tensor, "n d"]
LOG_TWO_PI = math.log(2 * math.pi)
WALKS = 4096  # that the backward steps are regressed on
PILOT = 512  # walks that the two estimates are compared with
BANK = 16_384  # rows of noise for backward paths
ROWS_AT_ONCE, PATHS_AT_ONCE = 2048, 16_384
BANK_SEED, WALK_SEED, PILOT_SEED, BACK_SEED, TRIAL_SEED = 1, 3, 4, 5, 6


@dataclass(frozen=True)
class Walk:
    """States x_0 .. x_K of n chains, the target's end first, and a uniform number for each, its own as the rest."""

    states: list[Rows]
    spin: Float[Tensor, " n"]


@dataclass(frozen=True)
class BackwardStep:
    """`r(x_{k+1} | x_k) = N(x_k matrix + offset, factor factor^T)`."""

    matrix: Float[Tensor, "d i"]
    offset: Float[Tensor, " i"]
    factor: Float[Tensor, "i i"]

    def draw(self, x: Rows, noise: Rows) -> Rows:
        """x_{k+1} of standard normal noise."""
        return torch.addmm(self.offset, x, self.matrix) + noise @ self.factor.T

    def log_prob(self, above: Rows, x: Rows) -> Float[Tensor, " n"]:
        """`log r(above | x)`."""
        centred = (above - torch.addmm(self.offset, x, self.matrix)).T
        noise = torch.linalg.solve_triangular(self.factor, centred, upper=False)
        log_det = self.factor.diagonal().log().sum()
        return -0.5 * noise.square().sum(0) - log_det - 0.5 * len(centred) * LOG_TWO_PI


@dataclass(frozen=True)
class PriorEstimate:
    """`1/J sum_j q(x_0 | x_1^(j))`: the last layer's `means` and `log_sigma` at J - 1 inputs, shared by all draws."""

    layers: Sequence[ConditionalGaussian]
    means: Rows
    log_sigma: Float[Tensor, "s d"]

    @property
    def note(self) -> str:
        """What it is, in one line."""
        return _note("q(x_0 | x_1^(j))", len(self.means) + 1)

    def log_prob(self, walk: Walk) -> Float[Tensor, " n"]:
        """The estimate at x_0 of each walk."""
        x = walk.states[0]
        log_sum = _layer_log_prob(self.layers[0], x, walk.states[1])
        if len(self.means):
            sums = [log_mixture_sum(rows, self.means, self.log_sigma) for rows in x.split(ROWS_AT_ONCE)]
            log_sum = torch.logaddexp(log_sum, torch.cat(sums))
        return log_sum - math.log(len(self.means) + 1)


@dataclass(frozen=True)
class ReverseEstimate:
    """`1/J sum_j q(x_0, path_j) / r(path_j | x_0)` with J = `paths`, `backward` being the steps from x_0 to x_K.

    A draw's J - 1 paths take their noise from as many rows of a common `bank`, from a place of its own: independent of
    the draw itself and of each other, as the weights ask, and of another draw's, but for rows that both happen to take.
    """

    layers: Sequence[ConditionalGaussian]
    backward: list[BackwardStep]
    bank: Float[Tensor, "b i"]
    paths: int

    @property
    def note(self) -> str:
        """What it is, in one line."""
        return _note("q(x_0, path_j) / r(path_j | x_0), r regressed", self.paths)

    def log_prob(self, walk: Walk) -> Float[Tensor, " n"]:
        """The estimate at x_0 of each walk."""
        rows = max(1, PATHS_AT_ONCE // self.paths)
        parts = zip(walk.spin.split(rows), *(state.split(rows) for state in walk.states), strict=True)
        return torch.cat([self._log_prob(spin, states) for spin, *states in parts])

    def _log_prob(self, spin: Float[Tensor, " n"], states: list[Rows]) -> Float[Tensor, " n"]:
        """Paths 0 (the own one) .. J-1 of every draw at once; the log joint of a path less its backward log density."""
        place = (spin * len(self.bank)).long().unsqueeze(1) + torch.arange(self.paths)
        noise = self.bank[place.flatten() % len(self.bank)].split([len(step.offset) for step in self.backward], 1)
        log_weight = torch.zeros(len(spin) * self.paths, dtype=torch.float64)
        below = states[0].repeat_interleave(self.paths, 0)
        for layer, step, zeta, own in zip(self.layers, self.backward, noise, states[1:], strict=True):
            above = step.draw(below, zeta)
            above[:: self.paths] = own
            log_weight += _layer_log_prob(layer, below, above) - step.log_prob(above, below)
            below = above
        log_weight += -0.5 * below.square().sum(1) - 0.5 * below.shape[1] * LOG_TWO_PI
        return log_weight.view(-1, self.paths).logsumexp(1) - math.log(self.paths)


Estimate = PriorEstimate | ReverseEstimate


def _note(what: str, count: int) -> str:
    own = "the draw's own among them"
    return f"log_approx is a semi-implicit estimate, log 1/J sum_j {what}, with J = {count}, {own}"


def walk_chain(
    layers: Sequence[ConditionalGaussian], x: Rows, noise: Sequence[Rows], spin: Float[Tensor, " n"]
) -> Walk:
    """From base draws x_K; `noise` of the first layer walked, number K-1, comes first. `spin` is standard normal."""
    states = [x]
    for layer, zeta in zip(reversed(layers), noise, strict=True):
        mean, log_sigma = layer(states[0])
        states.insert(0, mean + log_sigma.exp() * zeta)
    return Walk(states, torch.special.ndtr(spin))


@torch.no_grad()
def prior_estimate(
    layers: Sequence[ConditionalGaussian], base_dim: int, components: int, seed: int, purpose: int = BANK_SEED
) -> PriorEstimate:
    """J = `components`, inputs from walks that `seed` and a purpose name."""
    bank = random_walks(layers, base_dim, max(components - 1, 1), seed, purpose)
    return PriorEstimate(layers, *layers[0](bank.states[1][: components - 1]))


@torch.no_grad()
def reverse_estimate(
    layers: Sequence[ConditionalGaussian], base_dim: int, paths: int, seed: int
) -> ReverseEstimate | None:
    """J = `paths`, backward steps regressed on walks that `seed` names; None where the dimension is too large."""
    backward = _regress(random_walks(layers, base_dim, WALKS, seed, WALK_SEED))
    if backward is None:
        return None
    draws = generator(seed, Stream.INIT, BACK_SEED)
    size = sum(len(step.offset) for step in backward)
    return ReverseEstimate(layers, backward, torch.randn((BANK, size), generator=draws, dtype=torch.float64), paths)


@torch.no_grad()
def best_estimate(
    layers: Sequence[ConditionalGaussian], base_dim: int, components: int, paths: int, seed: int
) -> Estimate:
    """The one that is lower in the mean of a pilot; it depends on the layers and `seed` alone, and not on the draws."""
    prior = prior_estimate(layers, base_dim, components, seed)
    reverse = reverse_estimate(layers, base_dim, paths, seed) if paths > 0 else None
    if reverse is None:
        return prior
    pilot = random_walks(layers, base_dim, PILOT, seed, PILOT_SEED)
    # other components than the draws will meet: a choice would flatter those that it was made by
    trial = prior_estimate(layers, base_dim, components, seed, TRIAL_SEED)
    gain = (trial.log_prob(pilot) - reverse.log_prob(pilot)).mean()
    return reverse if float(gain) > 0 else prior


def random_walks(layers: Sequence[ConditionalGaussian], base_dim: int, count: int, seed: int, purpose: int = 0) -> Walk:
    """Walks that a seed and a purpose name."""
    draws = generator(seed, Stream.INIT, purpose)
    sizes = [base_dim, *(layer.dim for layer in layers)]
    x, *noise = (torch.randn((count, size), generator=draws, dtype=torch.float64) for size in sizes)
    return walk_chain(layers, x, noise, torch.randn(count, generator=draws, dtype=torch.float64))


def _regress(walk: Walk) -> list[BackwardStep] | None:
    """Least squares of each state on the one below; None where there are too few walks for the dimension."""
    steps = []
    for x, above in zip(walk.states, walk.states[1:], strict=False):
        if len(x) < 8 * (x.shape[1] + above.shape[1]):
            return None
        design = torch.cat([x, torch.ones_like(x[:, :1])], 1)
        solution = torch.linalg.lstsq(design, above).solution
        residual = above - design @ solution
        covariance = residual.T @ residual / (len(x) - design.shape[1])
        factor, failed = torch.linalg.cholesky_ex(covariance)
        if int(failed):
            return None
        steps.append(BackwardStep(solution[:-1], solution[-1], factor))
    return steps


def _layer_log_prob(layer: ConditionalGaussian, x: Rows, above: Rows) -> Float[Tensor, " n"]:
    mean, log_sigma = layer(above)
    noise = (x - mean) * (-log_sigma).exp()
    return -0.5 * noise.square().sum(1) - log_sigma.sum(1) - 0.5 * x.shape[1] * LOG_TWO_PI
