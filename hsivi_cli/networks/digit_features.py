"""A small convolutional classifier of 28x28 grey digits; its penultimate layer gives features for Frechet distances."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

SIZE = 28
FEATURES = 64
CLASSES = 10


@dataclass(frozen=True)
class DigitFeatures:
    """Penultimate activations `(n, 64)` and class logits `(n, 10)`."""

    features: Float[Tensor, "n 64"]
    logits: Float[Tensor, "n 10"]


class DigitClassifier(nn.Module):
    """Three convolutions, a 64-d feature layer and ten logits; 80 thousand parameters.

    The features are smooth (SiLU, no dropout) because a Frechet distance fits Gaussians to them, and `scale` brings
    their mean square to one, where the cubic kernel `(x.y / d + 1)^3` of KID tells samples apart best.
    """

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(1, 24, 5, stride=2, padding=2, bias=False),
            nn.BatchNorm2d(24),
            nn.SiLU(),
            nn.Conv2d(24, 48, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(48),
            nn.SiLU(),
            nn.Conv2d(48, 64, 3, padding=1, bias=False),
            nn.BatchNorm2d(64),
            nn.SiLU(),
            nn.AvgPool2d(2),
            nn.Flatten(),
        )
        self.features = nn.Linear(64 * 9, FEATURES)
        self.logits = nn.Linear(FEATURES, CLASSES)
        self.register_buffer("scale", torch.ones(()))

    def forward(self, pixels: Float[Tensor, "n 1 28 28"]) -> DigitFeatures:
        """Features and logits of images scaled to [-1, 1]."""
        features = nn.functional.silu(self.features(self.trunk(pixels)))
        return DigitFeatures(features * self.scale, self.logits(features))


def scale_pixels(images: UInt8[Tensor, "n c h w"]) -> Float[Tensor, "n 1 28 28"]:
    """Scale uint8 images to [-1, 1]; RGB is averaged to grey, other sizes are resized bilinearly with antialiasing."""
    pixels = images.to(torch.float32).mean(1, keepdim=True) / 127.5 - 1
    if pixels.shape[-2:] != (SIZE, SIZE):
        pixels = nn.functional.interpolate(pixels, (SIZE, SIZE), mode="bilinear", antialias=True, align_corners=False)
    return pixels
