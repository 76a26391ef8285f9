"""Draws of a DDVI posterior with their exact weights, block by block."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from hsivi_cli.io.latent_draws import LatentDraws
from hsivi_cli.methods import ddvi_classes
from hsivi_cli.objectives.ddvi_bound import pathwise_bound

if TYPE_CHECKING:
    from hsivi_cli.methods.ddvi import State

CHAINS_AT_ONCE, NUMBERS_AT_ONCE = 20_000, 20_000_000
"""Chains, and numbers of decoded rows, that are held at once."""


@dataclass(frozen=True)
class Posterior:
    """The fitted posterior (LatentPosterior). `is_bound`: whether the mean of its log weights is one."""

    state: "State"
    is_bound: bool = True

    @torch.no_grad()
    def draw(self, x: Float[Tensor, "n D"], k: int, generator: torch.Generator, weigh: bool = True) -> LatentDraws:
        """k chains a row, with their exact weights `p(x, y_0) r(y_{1:T} | y_0) / q(y_{0:T} | x)`, float64."""
        like, dim = self.state.model.like(), self.state.encoder.dim
        z = torch.empty(k, len(x), dim, dtype=like.dtype, device=like.device)
        log_weight = torch.empty(k, len(x), dtype=torch.float64, device=like.device) if weigh else None
        chains = max(1, min(CHAINS_AT_ONCE, NUMBERS_AT_ONCE // x.shape[1]))
        draws = min(k, chains)
        for first in range(0, len(x), max(1, chains // draws)):
            rows = slice(first, first + max(1, chains // draws))
            block = x[rows].to(like)
            for one in range(0, k, draws):
                part = slice(one, min(one + draws, k))
                z[part, rows], weights = _draw(self.state, block, part.stop - one, generator, weigh)
                if log_weight is not None and weights is not None:
                    log_weight[part, rows] = weights
        return LatentDraws(z, log_weight, z.mean(0), z.std(0, correction=min(1, k - 1)))

    @torch.no_grad()
    def latents(self, x: Float[Tensor, "n D"], generator: torch.Generator) -> Float[Tensor, "n d"]:
        """One draw a row without its weight: the step network alone, no decoder. Classes: of the most likely one."""
        state, like, found = self.state, self.state.model.like(), []
        for block in x.split(CHAINS_AT_ONCE):
            encoded = state.encoder.encode(block.to(like))
            if encoded.logits is not None:
                encoded = ddvi_classes.most_likely(state, encoded)
            shape = (state.noise.times + 1, len(block), state.encoder.dim)
            found.append(state.encoder.draw(encoded, normals(shape, like, generator)))
        return torch.cat(found)

    def classify(self, x: Float[Tensor, "n D"]) -> Float[Tensor, "n classes"]:
        """q(k | x), of a posterior that has learned from labels."""
        like = self.state.model.like()
        return torch.cat(
            [ddvi_classes.class_probabilities(self.state, part.to(like)) for part in x.split(CHAINS_AT_ONCE)]
        )


def normals(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normals of the type and on the device of `like`."""
    return torch.randn(shape, generator=generator, dtype=like.dtype, device=generator.device).to(like.device)


def _draw(
    state: "State", rows: Float[Tensor, "n D"], k: int, generator: torch.Generator, weigh: bool
) -> tuple[Float[Tensor, "k n d"], Float[Tensor, "k n"] | None]:
    if state.encoder.classes > 1:
        return ddvi_classes.draw(state, rows, k, generator, weigh)
    encoder, n = state.encoder, len(rows)
    encoded = encoder.encode(rows)
    noise = normals((state.noise.times + 1, k * n, encoder.dim), encoded.start_mean, generator)
    if not weigh:
        return encoder.draw(encoded, noise).view(k, n, -1), None
    chain = encoder.run(encoded, noise)
    z = chain.z.view(k, n, -1)
    log_joint = state.model.log_joint(rows, z).double().reshape(-1)
    return z, pathwise_bound(log_joint, chain, state.noise).view(k, n)
