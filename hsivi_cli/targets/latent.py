"""Latent-variable models: a prior of the latents, a decoder, a likelihood of the numbers of a row.

`p(x, z) = p(z) p(x | decoder(z))` for each row x of D numbers and its latents z in R^d. Missing numbers (NaN) are
integrated out, which for a factorised likelihood means leaving them out. Decoder outputs are relative to the data: the
model's `offset` and `gain` begin where a model without latents would end, so that rows of any unit train alike.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hsivi_cli.errors import InputError
from hsivi_cli.networks.decoders import ConvDecoder, MlpDecoder, column_scales
from hsivi_cli.targets.latent_priors import ClusterPrior, LatentPrior, Narrowing, make_prior
from hsivi_cli.targets.likelihoods import Likelihood, likelihood_for

LOWEST_SHARE = 1e-4
"""A learned standard deviation stays above this share of its column's: densities have no upper bound."""
START_SHARE = 0.5
"""Where the learned standard deviation begins, as a share of the column's."""


@dataclass(frozen=True)
class ModelConfig:
    """Plain JSON fields. `shape` (height, width, channels) makes the decoder convolutional, `hidden` is then unused;

    `clusters` above 0 is the learned cluster prior, and `prior` is then unused. `noise` is the Gaussian likelihood's:
    one standard deviation a column, or one for all (in units of the data, as in probabilistic PCA)."""

    latent: int = 2
    prior: str = "normal"
    clusters: int = 0
    likelihood: str = "gaussian"
    hidden: tuple[int, ...] = (256, 256)
    shape: tuple[int, int, int] | None = None
    noise: Literal["column", "shared"] = "column"
    seed: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain values; `from_json` is the inverse."""
        return asdict(self)

    @staticmethod
    def from_json(values: dict[str, Any]) -> "ModelConfig":
        """The configuration again, lists made tuples."""
        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return ModelConfig(**plain)


class LatentModel(nn.Module):
    """`p(z) p(x | z)` of rows x (n, D) with latents z (..., n, d); each part may be trained.

    `log_sd` (1,) or (D,) belongs to the Gaussian likelihood, and is None for the others. `offset` (P,) and `gain` (P,)
    act on the decoder's outputs; None: the outputs are taken as they are.
    """

    log_sd: nn.Parameter | None
    offset: Tensor | None
    gain: Tensor | None
    lowest_log_sd: Tensor | None

    def __init__(
        self,
        prior: LatentPrior,
        decoder: nn.Module,
        likelihood: Likelihood,
        log_sd: Float[Tensor, " D_or_1"] | None = None,
        offset: Float[Tensor, " P"] | None = None,
        gain: Float[Tensor, " P"] | None = None,
        lowest_log_sd: Float[Tensor, " D_or_1"] | None = None,
    ) -> None:
        super().__init__()
        self.prior, self.decoder, self.likelihood = prior, decoder, likelihood
        assert (likelihood.name == "gaussian") == (log_sd is not None)
        self.log_sd = None if log_sd is None else nn.Parameter(log_sd.clone())
        self.register_buffer("offset", offset)
        self.register_buffer("gain", gain)
        self.register_buffer("lowest_log_sd", lowest_log_sd)

    def outputs(self, z: Float[Tensor, "*k n d"]) -> Float[Tensor, "*k n P"]:
        """The likelihood's parameters: the decoder's outputs, put in the data's place and unit."""
        outputs: Tensor = self.decoder(z)
        if self.gain is not None:
            outputs = outputs * self.gain
        return outputs if self.offset is None else outputs + self.offset

    def noise_log_sd(self) -> Float[Tensor, " D_or_1"] | None:
        """The Gaussian likelihood's log standard deviation, above its floor."""
        if self.log_sd is None or self.lowest_log_sd is None:
            return self.log_sd
        return torch.maximum(self.log_sd, self.lowest_log_sd)

    def log_likelihood(self, x: Float[Tensor, "n D"], z: Float[Tensor, "*k n d"]) -> Float[Tensor, "*k n"]:
        """`log p(x | z)` with all its constants, summed over the numbers of a row that are there."""
        return self.likelihood.log_prob(self.outputs(z), x, self.noise_log_sd())

    def log_joint(self, x: Float[Tensor, "n D"], z: Float[Tensor, "*k n d"]) -> Float[Tensor, "*k n"]:
        """`log p(x, z)`."""
        return self.log_likelihood(x, z) + self.prior.log_prob(z)

    @torch.no_grad()
    def fantasies(
        self, n: int, generator: torch.Generator, classes: Int[Tensor, " n"] | None = None
    ) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n D"]]:
        """n draws of (z, x) from the model: x is sampled, not the mean. `classes`: z from these parts of the prior."""
        z = self.prior.sample(n, generator) if classes is None else self.prior.sample_class(classes, generator)
        z = z.to(self.like())
        return z, self.likelihood.sample(self.outputs(z), generator, self.noise_log_sd())

    def reconstruct(self, z: Float[Tensor, "*k n d"]) -> Float[Tensor, "*k n D"]:
        """`E[x | z]`; of categories, the expected level."""
        return self.likelihood.mean(self.outputs(z))

    def narrow(self, share: float) -> None:
        """Where a thin prior stands, at that share of the way to itself; other priors stay as they are."""
        if isinstance(self.prior, Narrowing):
            self.prior.approach(share)

    def like(self) -> Tensor:
        """A tensor of the type and on the device that the model computes in."""
        for tensor in (*self.decoder.parameters(), *self.decoder.buffers(), *self.parameters()):
            if tensor.is_floating_point():
                return tensor
        return torch.zeros(())


@dataclass(frozen=True)
class LatentTask:
    """Rows (N, D) float32 with NaN for missing, the model as it begins, and labels (N,), -1 for unknown ones."""

    rows: Float[Tensor, "N D"]
    model: LatentModel
    labels: Int[Tensor, " N"] | None = None


def build_model(config: ModelConfig, x: Float[Tensor, "N D"]) -> LatentModel:
    """A model of rows like x, float32, its weights from `config.seed` alone.

    Raises InputError in one line where rows and likelihood do not fit, where the prior has other dimensions, and where
    the latent dimension exceeds the number of columns.
    """
    if x.ndim != 2 or 0 in x.shape:
        raise InputError(f"the rows have shape {tuple(x.shape)}: a table of one row and one column or more is needed")
    columns = x.shape[1]
    if config.latent < 1:
        raise InputError(f"--latent {config.latent}: one latent dimension or more is needed")
    if config.latent > columns:
        raise InputError(
            f"--latent {config.latent} is more than the {columns} columns of the data: choose {columns} or fewer"
        )
    if config.noise not in ("column", "shared"):
        raise InputError(f'there is no noise "{config.noise}": choose column or shared')
    likelihood = likelihood_for(config.likelihood, x)
    generator = torch.Generator().manual_seed(config.seed)
    prior = (
        ClusterPrior(config.clusters, config.latent, generator)
        if config.clusters
        else make_prior(config.prior, config.latent)
    )
    outputs = likelihood.outputs(columns)
    decoder: nn.Module
    if config.shape is None:
        decoder = MlpDecoder(config.latent, config.hidden, outputs, generator)
    elif math.prod(config.shape) != columns:
        raise InputError(f"images of shape {config.shape} have {math.prod(config.shape)} numbers, the rows {columns}")
    else:
        decoder = ConvDecoder(config.latent, config.shape, outputs // columns, generator)
    mean, sd = column_scales(x)
    if likelihood.name != "gaussian":
        return LatentModel(prior, decoder, likelihood, offset=likelihood.base(x))
    if config.noise == "shared":
        sd = sd.square().mean(0, keepdim=True).sqrt()
    log_sd = sd.log()
    return LatentModel(
        prior, decoder, likelihood,
        log_sd=log_sd + math.log(START_SHARE), offset=mean, gain=sd.expand(columns).clone(),
        lowest_log_sd=log_sd + math.log(LOWEST_SHARE),
    )  # fmt: skip
