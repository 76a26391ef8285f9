"""`--method pca`: probabilistic principal components (Tipping & Bishop 1999), the linear map that others have to beat.

`x = W z + mean + scale e`, `z ~ N(0, I)`, e Gaussian of one variance: everything is exact, the maximum of the
likelihood in closed form, the posterior of each row, and `log p(x)`. With missing entries the closed form of the
rows with means put in is the start, and steps of EM on the entries that are there follow.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hsivi_cli.errors import InputError
from hsivi_cli.io.latent_draws import LatentDraws
from hsivi_cli.networks.decoders import MlpDecoder, column_scales
from hsivi_cli.objectives.gpvae_bound import LOG_TWO_PI
from hsivi_cli.targets.latent import LatentModel, LatentTask
from hsivi_cli.targets.latent_priors import make_prior
from hsivi_cli.targets.likelihoods import Likelihood

NUMBERS_AT_ONCE = 10_000_000
MOST_COLUMNS = 3000
"""Up to as many the covariance matrix is formed; beyond, its leading vectors come from products with the rows."""
LOWEST_SHARE = 1e-8
"""Of the mean variance: with as many latents as columns the noise has none."""


@dataclass(frozen=True)
class Config:
    """Plain JSON fields. `standardise`: columns of unit variance first. `steps` of EM, where entries are missing.

    `dim` None is the prior's dimension of the task's model.
    """

    steps: int = 50
    seed: int = 0
    dim: int | None = None
    standardise: bool = False


@dataclass
class State:
    """The map, float64: `weight` (D, d), `mean` (D,), `noise` (D,) standard deviations; `scale` (D,) of columns."""

    step: int
    task: LatentTask
    config: Config
    weight: Float[Tensor, "D d"]
    mean: Float[Tensor, " D"]
    noise: Float[Tensor, " D"]
    scale: Float[Tensor, " D"]

    @property
    def model(self) -> LatentModel:
        """The same as a LatentModel: affine decoder, Gaussian likelihood, prior N(0, I); float64."""
        decoder = MlpDecoder(self.weight.shape[1], (), len(self.mean)).double()
        first: Any = decoder.net[0]
        with torch.no_grad():
            first.weight.copy_(self.weight)
            first.bias.copy_(self.mean)
        prior = make_prior("normal", self.weight.shape[1])
        model = LatentModel(prior, decoder, Likelihood("gaussian"), log_sd=self.noise.log())
        return model.requires_grad_(False)


def init(target: LatentTask, config: Config) -> State:
    """The map of maximum likelihood; with missing entries its start. Raises InputError where d exceeds the columns."""
    rows = target.rows
    dim = target.model.prior.dim if config.dim is None else config.dim
    if not 1 <= dim <= rows.shape[1]:
        raise InputError(f"--latent {dim}: PCA of {rows.shape[1]} columns has 1 to {rows.shape[1]} components")
    if len(rows) < 2:
        raise InputError("PCA needs two rows or more")
    mean, sd = (part.double() for part in column_scales(rows.double()))
    scale = sd if config.standardise else torch.ones_like(sd)
    values, vectors, total = _leading(rows, mean, scale, dim)
    columns = len(mean)
    rest = (total - values.sum()) / max(columns - dim, 1)
    variance = torch.clamp(rest, min=LOWEST_SHARE * total / columns + 1e-300)
    weight = vectors * (values - variance).clamp_min(0).sqrt()
    return State(0, target, config, scale[:, None] * weight, mean, scale * variance.sqrt(), scale)


def step(state: State, batch: Tensor | tuple[Tensor, Tensor] | None, generator: torch.Generator) -> dict[str, float]:
    """A step of EM over all rows of the task where entries are missing; else the map is final. The batch is unused."""
    state.step += 1
    rows = state.task.rows
    if not bool(rows.isnan().any()):
        return {"elbo": float(log_evidence(state, rows).mean())}
    d, columns = state.weight.shape[1] + 1, len(state.mean)
    squares, cross = torch.zeros(columns, d, d).double(), torch.zeros(columns, d).double()
    power, count = torch.zeros(columns).double(), torch.zeros(columns).double()
    total = 0.0
    blocks = list(_blocks(rows, d * d))
    for x in blocks:
        mean, covariance, log_p = _solve(state, x)
        there = (~x.isnan()).double()
        u = (x.double() - state.mean).div(state.scale).nan_to_num(0.0)
        one = torch.ones(len(x), 1).double()
        extended = torch.cat([mean, one], 1)
        second = extended[:, :, None] * extended[:, None]
        second[:, :-1, :-1] += covariance
        squares += torch.einsum("nj,nab->jab", there, second)
        cross += u.T @ extended
        power += (u**2).sum(0)
        count += there.sum(0)
        total += float(log_p.sum())
    fitted = torch.linalg.solve(squares + 1e-12 * torch.eye(d).double(), cross[..., None])[..., 0]
    left = power - 2 * (fitted * cross).sum(1) + torch.einsum("ja,jab,jb->j", fitted, squares, fitted)
    variance = left.sum() / count.sum()
    state.weight = state.scale[:, None] * fitted[:, :-1]
    state.mean = state.mean + state.scale * fitted[:, -1]
    state.noise = state.scale * variance.clamp_min(1e-300).sqrt()
    return {"elbo": total / len(rows)}


def principal_scores(state: State, x: Float[Tensor, "n D"]) -> Float[Tensor, "n d"]:
    """Coordinates along the components in units of the (scaled) data: what is called PCA. NaN counts as the mean."""
    weight = state.weight / state.scale[:, None]
    vectors = torch.linalg.svd(weight, full_matrices=False).U if state.step else _normalised(weight)
    return ((x.double() - state.mean) / state.scale).nan_to_num(0.0) @ vectors


def log_evidence(state: State, x: Float[Tensor, "n D"]) -> Float[Tensor, " n"]:
    """log p(x) in nats, exact; missing entries are integrated out."""
    return torch.cat([_solve(state, part)[2] for part in _blocks(x, state.weight.shape[1] ** 2)])


@dataclass(frozen=True)
class PcaPosterior:
    """The exact Gaussian posterior (LatentPosterior); `sd` are its marginal ones, draws are correlated.

    Weights are log p(x), the same for every draw, under this linear Gaussian model. Where the task's likelihood is of
    whole numbers they are None: a density and a probability cannot be compared.
    """

    state: State

    @torch.no_grad()
    def draw(self, x: Float[Tensor, "n D"], k: int, generator: torch.Generator, weigh: bool = True) -> LatentDraws:
        """k draws a row, float64."""
        state, parts = self.state, []
        for part in _blocks(x, state.weight.shape[1] * (state.weight.shape[1] + k)):
            mean, covariance, log_p = _solve(state, part)
            noise = torch.randn(k, *mean.shape, generator=generator, dtype=torch.float64)
            z = mean + torch.einsum("nab,knb->kna", torch.linalg.cholesky(covariance), noise)
            parts.append((z, log_p.expand(k, -1), mean, covariance.diagonal(dim1=1, dim2=2).sqrt()))
        z, log_weight = (torch.cat([part[i] for part in parts], 1) for i in (0, 1))
        mean, sd = (torch.cat([part[i] for part in parts]) for i in (2, 3))
        comparable = state.task.model.likelihood.name == "gaussian"
        return LatentDraws(z, log_weight if comparable and weigh else None, mean, sd)


def posterior(state: State) -> PcaPosterior:
    """The map as it is now."""
    return PcaPosterior(state)


def state_dict(state: State) -> dict[str, Any]:
    """Tensors and plain JSON; the rows are not part of it."""
    return {name: getattr(state, name) for name in ("step", "weight", "mean", "noise", "scale")}


def load_state_dict(state: State, tree: dict[str, Any]) -> None:
    """Restore a map, in place."""
    for name in ("step", "weight", "mean", "noise", "scale"):
        setattr(state, name, tree[name])


def _solve(state: State, x: Float[Tensor, "n D"]) -> tuple[Tensor, Tensor, Tensor]:
    """Posterior mean (n, d) and covariance (n, d, d) of rows with gaps, and log p(x) (n,)."""
    whitened = state.weight / state.noise[:, None]
    there = ~x.isnan()
    u = ((x.double() - state.mean) / state.noise).masked_fill(~there, 0.0)
    d = whitened.shape[1]
    if bool(there.all()):
        precision = (torch.eye(d).double() + whitened.T @ whitened).expand(len(x), d, d)
    else:
        products = (whitened[:, :, None] * whitened[:, None]).flatten(1)
        precision = torch.eye(d).double() + (there.double() @ products).unflatten(1, (d, d))
    factor = torch.linalg.cholesky(precision)
    projected = u @ whitened
    mean = torch.cholesky_solve(projected[..., None], factor)[..., 0]
    log_det = 2 * factor.diagonal(dim1=1, dim2=2).log().sum(1)
    constant = there.double() @ (state.noise.log() + 0.5 * LOG_TWO_PI)
    log_p = -0.5 * ((u**2).sum(1) - (projected * mean).sum(1) + log_det) - constant
    return mean, torch.cholesky_inverse(factor), log_p


def _leading(
    rows: Float[Tensor, "N D"], mean: Tensor, scale: Tensor, dim: int
) -> tuple[Float[Tensor, " d"], Float[Tensor, "D d"], Float[Tensor, ""]]:
    """Largest eigenvalues and vectors of the covariance of rows with gaps filled by means, and its trace."""
    columns = len(mean)

    def centred(block: Tensor) -> Tensor:
        return ((block.double() - mean) / scale).nan_to_num(0.0)

    if columns <= MOST_COLUMNS:
        covariance = torch.zeros(columns, columns, dtype=torch.float64)
        for block in _blocks(rows):
            u = centred(block)
            covariance += u.T @ u / len(rows)
        values, vectors = torch.linalg.eigh(covariance)
        values, vectors = values[-dim:].flip(0), vectors[:, -dim:].flip(1)
        return values, _signed(vectors), covariance.diagonal().sum()
    from scipy.sparse.linalg import LinearOperator, eigsh

    trace = sum((centred(block) ** 2).sum() / len(rows) for block in _blocks(rows))

    def product(vector: np.ndarray) -> np.ndarray:
        v = torch.from_numpy(np.ascontiguousarray(vector)).double().reshape(columns)
        found = torch.zeros(columns).double()
        for block in _blocks(rows):
            u = centred(block)
            found += u.T @ (u @ v) / len(rows)
        return found.numpy()

    operator = LinearOperator((columns, columns), matvec=product, dtype=np.float64)
    start = np.random.default_rng(0).standard_normal(columns)
    found, basis = eigsh(operator, k=min(dim, columns - 1), v0=start)
    order = np.argsort(found)[::-1].copy()
    return torch.from_numpy(found[order]), _signed(torch.from_numpy(basis[:, order])), torch.as_tensor(trace)


def _signed(vectors: Tensor) -> Tensor:
    """The largest entry of each vector positive: a map must not be mirrored by the linear algebra library."""
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors * torch.where(largest < 0, -1.0, 1.0)


def _normalised(weight: Tensor) -> Tensor:
    return weight / weight.norm(dim=0).clamp_min(1e-300)


def _blocks(rows: Tensor, each: int = 0) -> tuple[Tensor, ...]:
    """Rows in blocks whose work in float64 is bounded, `each` numbers besides its own for a row."""
    return rows.split(max(1, math.floor(NUMBERS_AT_ONCE / (rows.shape[1] + each))))
