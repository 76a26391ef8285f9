"""Encoders q(z | x): a density of the unconstrained parameters that a network makes of the observation.

Four families, each behind a full-covariance Gaussian layer whose mean and precision depend on x, so that a flow has to
learn the shape only: that layer alone, a mixture of such Gaussians, and flows of zuko in front of it: neural splines
(Durkan et al., NeurIPS 2019) and masked autoregressive (Papamakarios et al., NeurIPS 2017). Without observations the
same families are unconditional.

Networks are float32, draws are made in float64 from the same weights: the inverse of a spline in float32 loses digits,
and a draw would depend on its batch.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributions import Distribution

from hsivi_cli.errors import InputError
from hsivi_cli.networks.embedding import EmbeddingKind, build_embedding, mlp, resolve_kind
from hsivi_cli.networks.standardise import Pooling, Standardiser

FAMILIES = ("nsf", "maf", "gaussian", "mixture")
LOG_SCALE = 15.0
"""Logarithms of scales are bent to stay within, so that a bad step cannot make them infinite."""
BLOCK = 50_000
"""Points that are drawn at once."""


@dataclass(frozen=True)
class EncoderConfig:
    """What an encoder is made of; `features` (of the embedding) None is 32, or twice the parameters, at most 128."""

    family: Literal["nsf", "maf", "gaussian", "mixture"] = "nsf"
    embedding: EmbeddingKind = "auto"
    hidden: tuple[int, ...] = (64, 64)
    transforms: int = 3
    bins: int = 8
    components: int = 8
    features: int | None = None


class Encoder(nn.Module):
    """q(z | x) for z in R^`dim` and x of `observation_shape`; None: an unconditional density, and x is left out.

    `noise_dim` standard normals make one draw: `dim`, and one more to choose the component of a mixture.
    """

    def __init__(self, config: EncoderConfig, dim: int, observation_shape: tuple[int, ...] | None) -> None:
        super().__init__()
        self.config, self.dim, self.observation_shape = config, dim, observation_shape
        self.core = _Core(config, dim, observation_shape)
        self.standardise_z = Standardiser((dim,))
        self.standardise_x: Standardiser | None = None
        if observation_shape is not None:
            kind = resolve_kind(config.embedding, observation_shape)
            pooling: Pooling = "last" if kind == "set" else "channel" if kind == "image" else "column"
            self.standardise_x = Standardiser(observation_shape, pooling, squash=True)
        self.noise_dim = dim + (config.family == "mixture")

    def fit_scales(self, z: Float[Tensor, "n d"], x: Float[Tensor, " n *event"] | None = None) -> None:
        """Standardise by prior draws and the observations simulated from them; the state dict keeps what was found."""
        self.standardise_z.fit(z)
        if self.standardise_x is not None:
            if x is None:
                raise InputError("the encoder takes observations: give simulated ones to standardise by")
            self.standardise_x.fit(x)

    def log_prob(
        self, z: Float[Tensor, "b n d"], x: Float[Tensor, " b *event"] | None = None, *, precise: bool = False
    ) -> Float[Tensor, "b n"]:
        """log q(z | x) in float64; differentiable. `precise` computes in float64 throughout, for importance weights."""
        u = self.standardise_z(z)
        found = self._run(u, self._context(x), inverse=False, precise=precise)
        return found.double() + self.standardise_z.log_jacobian

    @torch.no_grad()
    def sample(
        self, noise: Float[Tensor, "b n noise_dim"], x: Float[Tensor, " b *event"] | None = None
    ) -> Float[Tensor, "b n d"]:
        """Draws from q(. | x), a row of standard normal `noise` each; float64.

        A draw depends on its own noise and observation only (up to rounding in the last digits of float64).
        """
        context, rows = self._context(x), []
        per_row = max(1, BLOCK // max(1, noise.shape[1]))
        for first in range(0, len(noise), per_row):
            part = None if context is None else context[first : first + per_row]
            pieces = noise[first : first + per_row].split(BLOCK, 1)
            rows.append(torch.cat([self._run(piece, part, inverse=True, precise=True) for piece in pieces], 1))
        u = torch.cat(rows) if rows else torch.zeros(*noise.shape[:2], self.dim, dtype=torch.float64)
        return self.standardise_z.inverse(u)

    def draw(
        self, n: int, generator: torch.Generator, x: Float[Tensor, " b *event"] | None = None
    ) -> Float[Tensor, "b n d"]:
        """`n` draws from q(. | x) for every observation; one row without observations."""
        rows = 1 if x is None else len(x)
        return self.sample(torch.randn(rows, n, self.noise_dim, generator=generator, dtype=torch.float64), x)

    def beyond(self, x: Float[Tensor, " b *event"]) -> Float[Tensor, " b"]:
        """How far each observation lies outside of the range of those of `fit_scales`, in their scales; 0 inside."""
        assert self.standardise_x is not None
        return self.standardise_x.beyond(x)

    def _context(self, x: Tensor | None) -> Tensor | None:
        if self.standardise_x is None or self.observation_shape is None:
            return None
        if x is None:
            raise InputError("the encoder is conditional: give it observations")
        if x.shape[1:].numel() != math.prod(self.observation_shape):
            raise InputError(
                f"an observation has {x.shape[1:].numel()} numbers, the encoder takes {self.observation_shape}"
            )
        found: Tensor = self.standardise_x(x.reshape(len(x), *self.observation_shape))
        return found

    def _run(self, value: Tensor, context: Tensor | None, inverse: bool, precise: bool) -> Tensor:
        tensors: dict[str, Tensor] = {}
        dtype = next(self.core.parameters()).dtype
        if precise and dtype != torch.float64:
            dtype, held = torch.float64, _tensors(self.core)
            tensors = {name: tensor.double() for name, tensor in held if tensor.is_floating_point()}
        arguments = (value.to(dtype), None if context is None else context.to(dtype), inverse)
        found: Tensor = torch.func.functional_call(self.core, tensors, arguments)
        return found


def build_encoder(
    config: EncoderConfig, dim: int, observation_shape: tuple[int, ...] | None = None, *, seed: int = 0
) -> Encoder:
    """An encoder with the start that `seed` names; torch's own generator is left as it was.

    Give it scales (`fit_scales`) or a state dict next. Raises InputError for a family, an embedding or a shape that
    cannot be.
    """
    if config.family not in FAMILIES:
        raise InputError(f"encoder {config.family!r} is not known: use {', '.join(FAMILIES)}")
    if dim < 1 or min(config.transforms, config.components) < 1 or config.bins < 2 or not config.hidden:
        raise InputError(f"encoder: no density of {dim} parameters can be made of {config}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Encoder(config, dim, observation_shape)


class _Core(nn.Module):
    """The density of standardised parameters given standardised observations, and its inverse."""

    def __init__(self, config: EncoderConfig, dim: int, shape: tuple[int, ...] | None) -> None:
        super().__init__()
        features = config.features or min(128, max(32, 2 * dim))
        self.embedding, context = None, 0
        if shape is not None:
            self.embedding, context = build_embedding(config.embedding, shape, features, config.hidden)
        components = config.components if config.family == "mixture" else 1
        self.gaussians = _Gaussians(dim, context, config.hidden, components)
        self.flow = _flow(config, dim, context) if config.family in ("nsf", "maf") else None

    def forward(self, value: Tensor, x: Tensor | None, inverse: bool) -> Tensor:
        """`value` (b, n, d) to log densities (b, n); with `inverse`, noise (b, n, noise_dim) to draws (b, n, d)."""
        context = None if self.embedding is None or x is None else self.embedding(x)
        rows = None if context is None else context[:, None]
        if self.flow is None:
            found: Tensor = (self.gaussians.draw if inverse else self.gaussians.log_prob)(value, context)
            return found
        transform = self.flow(rows).transform
        if inverse:
            return self.gaussians.restore(transform.inv(value), context)
        inner, log_det = self.gaussians.whiten(value, context)
        outer, log_jacobian = transform.call_and_ladj(inner)
        return _standard_normal(outer) + log_jacobian + log_det


class _Gaussians(nn.Module):
    """`K` Gaussians N(m, (T'T)^-1) given a context, T lower triangular with a positive diagonal.

    The parameters are a linear map of the context plus an MLP that starts at zero. A single Gaussian starts at N(0, I);
    the means of several start apart.
    """

    places: Tensor

    def __init__(self, dim: int, context: int, hidden: Iterable[int], components: int) -> None:
        super().__init__()
        self.dim, self.components = dim, components
        self.sizes = (1, dim, dim, dim * (dim - 1) // 2)  # weight, mean, log diagonal, below it
        start = torch.zeros(components, sum(self.sizes))
        if components > 1:
            start[:, 1 : 1 + dim] = torch.randn(components, dim)
        self.start = nn.Parameter(start.flatten())
        self.register_buffer("places", torch.tril_indices(dim, dim, -1))
        self.net: nn.Module | None = None
        if context:
            self.linear = nn.Linear(context, start.numel(), bias=False)
            self.net = mlp((context, *hidden, start.numel()))
            for layer in (self.linear, self.net[-1]):
                for parameter in layer.parameters():
                    nn.init.zeros_(parameter)

    def parts(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Log weights (b, 1, K), means (b, 1, K, d), factors T (b, 1, K, d, d) and their log determinants (b, 1, K)."""
        raw = self.start[None]
        if context is not None and self.net is not None:
            raw = raw + self.linear(context) + self.net(context)
        raw = raw.reshape(len(raw), 1, self.components, -1)
        weight, mean, log_diagonal, below = raw.split(self.sizes, -1)
        log_diagonal = log_diagonal / (1 + log_diagonal.abs() / LOG_SCALE)
        factor = raw.new_zeros(*raw.shape[:-1], self.dim, self.dim)
        factor[..., self.places[0], self.places[1]] = below
        factor.diagonal(dim1=-2, dim2=-1).copy_(log_diagonal.exp())
        return weight[..., 0].log_softmax(-1), mean, factor, log_diagonal.sum(-1)

    def whiten(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """`T (z - m)` of a single Gaussian (b, n, d), and the log determinant (b, 1)."""
        _, mean, factor, log_det = self.parts(context)
        return _apply(factor, z[:, :, None] - mean)[..., 0, :], log_det[..., 0]

    def log_prob(self, z: Tensor, context: Tensor | None) -> Tensor:
        """Log density of the mixture."""
        weight, mean, factor, log_det = self.parts(context)
        return (weight + log_det + _standard_normal(_apply(factor, z[:, :, None] - mean))).logsumexp(-1)

    def restore(self, u: Tensor, context: Tensor | None) -> Tensor:
        """The inverse of `whiten` for a single Gaussian: (b, n, d) to (b, n, d)."""
        _, mean, factor, _ = self.parts(context)
        solved: Tensor = torch.linalg.solve_triangular(factor[:, :, 0], u.transpose(1, 2)[:, None], upper=False)
        return solved[:, 0].transpose(1, 2) + mean[:, :, 0]

    def draw(self, noise: Tensor, context: Tensor | None) -> Tensor:
        """A draw for each row of noise; of several Gaussians, the last entry chooses one."""
        if self.components == 1:
            return self.restore(noise[..., : self.dim], context)
        weight, mean, factor, _ = self.parts(context)
        share = torch.special.ndtr(noise[..., self.dim, None])
        edges = weight.exp().cumsum(-1)[..., :-1]
        chosen = (share > edges).sum(-1).expand(noise.shape[:2])
        rows = torch.arange(len(noise))[:, None].expand_as(chosen)
        mean, factor = (part.expand(len(noise), *part.shape[1:])[rows, 0, chosen] for part in (mean, factor))
        solved = torch.linalg.solve_triangular(factor, noise[..., : self.dim, None], upper=False)
        return solved[..., 0] + mean


def _flow(config: EncoderConfig, dim: int, context: int) -> nn.Module:
    """A flow of zuko with a standard normal base."""
    checking = Distribution._validate_args
    import zuko  # here, because only these families need it

    Distribution.set_default_validate_args(checking)  # zuko turns torch's checks off for the whole process

    options: dict[str, Any] = {"transforms": config.transforms, "hidden_features": config.hidden}
    if config.family == "nsf":
        return zuko.flows.NSF(dim, context, bins=config.bins, **options)
    return zuko.flows.MAF(dim, context, **options)


def _apply(factor: Tensor, u: Tensor) -> Tensor:
    """Matrices (b, 1, K, d, d) times vectors (b, n, K, d)."""
    return torch.einsum("bkij,bnkj->bnki", factor[:, 0].expand(len(u), -1, -1, -1), u)


def _standard_normal(u: Tensor) -> Tensor:
    return -0.5 * (u.square().sum(-1) + u.shape[-1] * math.log(2 * math.pi))


def _tensors(module: nn.Module) -> Iterable[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()
