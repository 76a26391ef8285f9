"""Priors of latents, each with an exact sampler and the exact density of what it samples, smooth in z.

Sampling is float64 and returned in torch's default type, on the generator's device; `log_prob` keeps the type of z.
"""

import math
from typing import Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from hsivi_cli.errors import InputError, RunError
from hsivi_cli.targets.latent_shapes import LOG_TWO_PI, Petals, Pinwheel, Square, SwissRoll, as_default, normal_noise

PRIORS = ("normal", "pinwheel", "swiss-roll", "square", "mixture")
PLACED_ON, PLACE_STARTS = 10_000, 10
"""Latents that clusters are placed on, and runs of EM of which the best is kept."""
NARROWEST = 1e-4
"""Variance added to each cluster's: latents of an encoder without noise may coincide."""
WIDEST = {"pinwheel": (0.25, 0.005), "swiss-roll": (0.7, 0.1), "square": (0.5, 0.03), "mixture": (0.5, 0.05)}
"""Of a thin prior's brush: where training begins (wider, the pinwheel's arms would fold over), and the finest."""
GUARDS = {
    "pinwheel": ((0.025, 1e-3), (0.125, 1e-5)),
    "swiss-roll": ((0.4, 1e-4),),
    "square": ((0.15, 1e-3), (0.5, 1e-5)),
    "mixture": ((0.5, 1e-4),),
}
LEVELS = 24


class LatentPrior(Protocol):
    """A density on R^dim, and where it has `classes` above 1, one of each class; their equal mixture is the whole."""

    name: str
    dim: int
    classes: int

    def sample(self, n: int, generator: torch.Generator) -> Float[Tensor, "n d"]:
        """n draws."""

    def log_prob(self, z: Float[Tensor, "*n d"]) -> Float[Tensor, "*n"]:
        """Log density, exact and differentiable."""

    def sample_class(self, k: Int[Tensor, " n"], generator: torch.Generator) -> Float[Tensor, "n d"]:
        """A draw of each class named in k."""

    def log_prob_class(self, z: Float[Tensor, "*n d"]) -> Float[Tensor, "*n classes"]:
        """Log density of each class."""


class Normal:
    """N(0, I)."""

    name, classes = "normal", 1

    def __init__(self, dim: int) -> None:
        self.dim = dim

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """n draws."""
        return as_default(normal_noise(generator, n, self.dim))

    def log_prob(self, z: Tensor) -> Tensor:
        """Log density."""
        return -0.5 * (z.square().sum(-1) + self.dim * LOG_TWO_PI)

    def sample_class(self, k: Tensor, generator: torch.Generator) -> Tensor:
        """The one class is the whole."""
        return self.sample(len(k), generator)

    def log_prob_class(self, z: Tensor) -> Tensor:
        """The one class is the whole."""
        return self.log_prob(z)[..., None]


class ClusterPrior(nn.Module):
    """`z = h_k + s_k N(0, I)` with class k of learned weight: heads (K, d), log scales (K,), logits (K,).

    Draws of a class are differentiable in its head and scale. `base` is the scale at the start (the study's .125),
    `spread` the standard deviation of the heads: heads that begin together stay together. After `broaden` it is
    N(0, I), with nothing to learn, until `place` fits the clusters to latents that a model has found: clusters that
    are there before the latents hold whatever comes near them first.
    """

    name = "clusters"
    placed: Bool[Tensor, ""]

    def __init__(
        self,
        clusters: int,
        dim: int,
        generator: torch.Generator | None = None,
        base: float = 0.125,
        spread: float = 1.0,
    ) -> None:
        super().__init__()
        if clusters < 2:
            raise InputError(f"--clusters {clusters}: two clusters or more are needed")
        self.classes, self.dim = clusters, dim
        self.heads = nn.Parameter(spread * torch.randn(clusters, dim, generator=generator))
        self.log_scale = nn.Parameter(torch.full((clusters,), math.log(base)))
        self.logits = nn.Parameter(torch.zeros(clusters))
        self.register_buffer("placed", torch.tensor(True))

    @property
    def log_weights(self) -> Float[Tensor, " K"]:
        """Log weights of the clusters."""
        return self.logits.log_softmax(-1)

    def broaden(self) -> None:
        """Be N(0, I) until `place`."""
        self.placed.fill_(False)

    @torch.no_grad()
    def place(self, latents: Float[Tensor, "n d"], seed: int) -> None:
        """The clusters of maximum likelihood for latents of rows, by EM: for a fixed posterior the best of the bound.

        Raises InputError for fewer latents than clusters, and RunError where they are not finite.
        """
        from sklearn.mixture import GaussianMixture

        if len(latents) < self.classes:
            raise InputError(f"--clusters {self.classes}: there are only {len(latents)} rows to train on")
        if not bool(latents.isfinite().all()):
            raise RunError("diverged: the latents are not finite: use a lower --lr")
        chosen = torch.randperm(len(latents), generator=torch.Generator().manual_seed(seed))[:PLACED_ON]
        mixture = GaussianMixture(
            self.classes, covariance_type="spherical", n_init=PLACE_STARTS, reg_covar=NARROWEST, random_state=seed
        ).fit(latents[chosen].double().cpu().numpy())
        self.heads.copy_(torch.from_numpy(mixture.means_))
        self.log_scale.copy_(0.5 * torch.from_numpy(mixture.covariances_).log())
        self.logits.copy_(torch.from_numpy(mixture.weights_).log())
        self.placed.fill_(True)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """n draws, clusters by their weights."""
        weights = self.log_weights.detach().exp().to(generator.device)
        return self.sample_class(torch.multinomial(weights, n, True, generator=generator), generator)

    def sample_class(self, k: Tensor, generator: torch.Generator) -> Tensor:
        """A draw of each cluster named in k."""
        noise = normal_noise(generator, len(k), self.dim).to(self.heads)
        if not self.placed:
            return noise
        k = k.to(self.heads.device)
        return self.heads[k] + self.log_scale[k].exp()[:, None] * noise

    def log_prob_class(self, z: Tensor) -> Tensor:
        """Log density of each cluster, without its weight."""
        if not self.placed:
            return Normal(self.dim).log_prob(z)[..., None].expand(*z.shape[:-1], self.classes)
        square = (z[..., None, :] - self.heads).square().sum(-1)
        return -0.5 * square * (-2 * self.log_scale).exp() - self.dim * (self.log_scale + 0.5 * LOG_TWO_PI)

    def log_prob(self, z: Tensor) -> Tensor:
        """Log density of the weighted mixture."""
        if not self.placed:
            return Normal(self.dim).log_prob(z)
        return (self.log_prob_class(z) + self.log_weights).logsumexp(-1)


class Guarded:
    """A thin shape of which a little is drawn with wider brushes: `GUARDS` has their widths and shares.

    Off a thin shape the density falls by thousands of nats: one such row would be all that a step learns from, and all
    that a mean over rows shows. Now it costs some fifteen nats, and the way back rises at every distance. The share is
    so small that it is no place to live in.
    """

    def __init__(self, name: str, dim: int) -> None:
        shares = [share for _, share in GUARDS[name]]
        self.inner = _shape(name, dim, 0.0)
        self._parts = [self.inner, *(_shape(name, dim, width) for width, _ in GUARDS[name])]
        self._shares = [1 - sum(shares), *shares]
        self.name, self.dim, self.classes = self.inner.name, self.inner.dim, self.inner.classes

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """n draws."""
        return self._choose([part.sample(n, generator) for part in self._parts], generator)

    def sample_class(self, k: Tensor, generator: torch.Generator) -> Tensor:
        """A draw of each class."""
        return self._choose([part.sample_class(k, generator) for part in self._parts], generator)

    def log_prob(self, z: Tensor) -> Tensor:
        """Log density of the mixture."""
        return self._mix([part.log_prob(z) for part in self._parts])

    def log_prob_class(self, z: Tensor) -> Tensor:
        """Log density of each class."""
        return self._mix([part.log_prob_class(z) for part in self._parts])

    def _mix(self, parts: list[Tensor]) -> Tensor:
        return torch.stack([p + math.log(s) for p, s in zip(parts, self._shares, strict=True)]).logsumexp(0)

    def _choose(self, parts: list[Tensor], generator: torch.Generator) -> Tensor:
        place = torch.rand(len(parts[0]), 1, generator=generator, device=generator.device, dtype=torch.float64)
        found, ahead = parts[0], 0.0
        for part, share in zip(parts[1:], self._shares[1:], strict=True):
            found = torch.where((place >= ahead) & (place < ahead + share), part, found)
            ahead += share
        return found


class Narrowing:
    """A thin prior that training approaches from a broad one: the same shape drawn with an ever finer brush.

    Off a thin shape the density falls by thousands of nats within a few deviations: rows that do not begin on it never
    come to it. `approach` chooses how wide the brush is, geometrically from `WIDEST` down to the shape's own; each
    width is an exact density with its sampler. As made, and after training, it is the shape itself (`Guarded`).
    """

    def __init__(self, name: str, dim: int) -> None:
        self.exact = Guarded(name, dim)
        widest, own = WIDEST[name]
        widths = [widest * (own / widest) ** (level / (LEVELS - 1)) for level in range(LEVELS)]
        self._levels = [*(_shape(name, dim, width) for width in widths), self.exact]
        self._now: LatentPrior = self.exact
        self.name, self.dim, self.classes = self.exact.name, self.exact.dim, self.exact.classes

    def approach(self, share: float) -> None:
        """The brush at that share of the way, 0 the widest and 1 the shape's own."""
        self._now = self._levels[min(int(max(share, 0.0) * LEVELS), LEVELS)]

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """n draws."""
        return self._now.sample(n, generator)

    def sample_class(self, k: Tensor, generator: torch.Generator) -> Tensor:
        """A draw of each class."""
        return self._now.sample_class(k, generator)

    def log_prob(self, z: Tensor) -> Tensor:
        """Log density."""
        return self._now.log_prob(z)

    def log_prob_class(self, z: Tensor) -> Tensor:
        """Log density of each class."""
        return self._now.log_prob_class(z)


def make_prior(name: str, dim: int) -> LatentPrior:
    """The prior of that name in `dim` dimensions; thin shapes can be approached from broad ones (`Narrowing`).

    Raises InputError for a name there is not, and for dimensions the prior does not have.
    """
    if name not in PRIORS:
        raise InputError(f'there is no prior "{name}": choose {", ".join(PRIORS)}, or give --clusters')
    if name in ("pinwheel", "mixture") and dim != 2:
        raise InputError(f"the {name} prior has two dimensions, not {dim}: use --latent 2, or another prior")
    if name in ("swiss-roll", "square") and dim < 2:
        raise InputError(f"the {name} prior has two dimensions or more, not {dim}: use --latent 2, or another prior")
    return Narrowing(name, dim) if name in WIDEST else Normal(dim)


def _shape(name: str, dim: int, width: float) -> LatentPrior:
    if name == "pinwheel":
        return Pinwheel(width=width)
    if name == "mixture":
        return Petals(width=width)
    return SwissRoll(dim, max(width, SwissRoll.own)) if name == "swiss-roll" else Square(dim, width=width)
