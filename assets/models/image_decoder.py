"""The code behind a small picture: six numbers, decoded into 8x8 pixels by a linear map and a sigmoid.

    hsivi fit-posterior image_decoder.csv --model image_decoder.py --method smc-wake --amortize

Each row of the data is one picture, `pixel1` to `pixel64` row by row; each gets its posterior. The
decoder's weights are fixed: smooth random fields drawn once from a seed. Put a trained decoder in their place.
"""

import math

import torch
from torch.distributions import Normal

from hsivi_cli import Model, Parameter

SIDE, CODE, NOISE = 8, 6, 0.1


def weights():
    """Random mixtures of low cosine frequencies, so that neighbouring pixels go together: (64, 6)."""
    place = (torch.arange(SIDE, dtype=torch.float64) + 0.5) / SIDE
    waves = torch.cos(math.pi * torch.arange(4, dtype=torch.float64)[:, None] * place)  # (4, 8)
    fields = torch.einsum("ay,bx->abyx", waves, waves).reshape(16, SIDE * SIDE)
    mixed = torch.randn(CODE, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return (0.6 * mixed @ fields).T


def model(data):
    observed = torch.tensor(data.iloc[0].to_numpy(), dtype=torch.float64)
    decoder = weights()

    def pixels(p):
        return Normal(torch.sigmoid(decoder @ p.code), NOISE)

    return Model(
        parameters=[Parameter("code", (CODE,))],
        log_prior=lambda p: Normal(0, 1).log_prob(p.code).sum(),
        log_likelihood=lambda p, y: pixels(p).log_prob(y),
        simulate=lambda p, generator: pixels(p).sample(),
        sample_prior=lambda generator: {"code": Normal(0, 1).sample((CODE,))},
        observed=observed,
    )
