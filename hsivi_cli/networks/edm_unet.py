"""EDM's denoisers (Karras et al., arXiv 2206.00364) as networks that predict noise on a discrete schedule.

EDM denoises x = x0 + sigma n; the noised data of a variance-preserving schedule is x / sqrt(1 + sigma^2), with
abar_t = 1 / (1 + sigma_t^2). The denoiser is D(x; sigma) = c_skip x + c_out F(c_in x; ln(sigma) / 4), so that the noise
is (x - D) / sigma = (sigma c_in x - sigma_data F) / sqrt(sigma^2 + sigma_data^2), which cancels nothing at small sigma.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from hsivi_cli.bridges.schedule import schedule_from_config
from hsivi_cli.networks.edm_layers import EDMBlock, FilteredConvolution, Resample, group_norm, sinusoids

HEAD_CHANNELS = 64
SONG, DHARIWAL = "SongUNet", "DhariwalUNet"


@dataclass(frozen=True)
class Layer:
    """One layer of the plan; `kind` is block, conv, down, skip, residual, up, norm or out."""

    name: str
    kind: str
    in_channels: int
    out_channels: int
    resample: str = ""
    heads: int = 0


class EDMUNet(ModelMixin, ConfigMixin):
    """An EDM network, called and saved like a `UNet2DModel`: noised data and a time step in, predicted noise out.

    `model_type` is "SongUNet" (DDPM++ and NCSN++) or "DhariwalUNet" (ADM); the other fields are EDM's, where
    `sample_size`, `in_channels` and `num_class_embeds` are its img_resolution, img_channels and label_dim. `schedule`
    holds the diffusers fields of the noise schedule whose steps the network is asked at; default 1000 linear ones.
    """

    @register_to_config
    def __init__(
        self,
        model_type: str = SONG,
        sample_size: int = 32,
        in_channels: int = 3,
        out_channels: int | None = None,
        num_class_embeds: int | None = None,
        sigma_data: float = 0.5,
        model_channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 2, 2),
        channel_mult_emb: int = 4,
        num_blocks: int = 4,
        attn_resolutions: Sequence[int] = (16,),
        dropout: float = 0.0,
        label_dropout: float = 0.0,
        embedding_type: str = "positional",
        channel_mult_noise: int = 1,
        encoder_type: str = "standard",
        decoder_type: str = "standard",
        resample_filter: Sequence[int] = (1, 1),
        schedule: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if model_type not in (SONG, DHARIWAL):
            raise ValueError(f"model_type {model_type!r} is neither {SONG} nor {DHARIWAL}")
        if out_channels not in (None, in_channels):
            raise ValueError(f"out_channels {out_channels} must be in_channels {in_channels}, or left out")
        self.register_to_config(out_channels=in_channels)  # said, for those who read the configuration
        self.song = model_type == SONG
        embedding = model_channels * channel_mult_emb
        noise = model_channels * (channel_mult_noise if self.song else 1)
        self.endpoint, self.noise_channels = self.song, noise
        self.map_noise = nn.Module()
        if self.song and embedding_type == "fourier":
            self.map_noise.register_buffer("freqs", torch.randn(noise // 2) * 16)
        self.map_layer0 = nn.Linear(noise, embedding)
        self.map_layer1 = nn.Linear(embedding, embedding)
        self.map_label = None
        if num_class_embeds:
            self.map_label = nn.Linear(num_class_embeds, noise if self.song else embedding, bias=self.song)
        taps = tuple(resample_filter)
        settings: dict[str, Any] = {"embedding": embedding, "dropout": dropout, "taps": taps if self.song else (1, 1)}
        if self.song:
            settings |= {"adaptive": False, "project": True, "skip_scale": math.sqrt(0.5), "eps": 1e-6}
        else:
            settings |= {"adaptive": True, "project": False, "skip_scale": 1.0, "eps": 1e-5}
        plan = list(_plan(self.song, dict(self.config)))
        self.enc = nn.ModuleDict({layer.name: _build(layer, settings) for way, layer in plan if way == "enc"})
        self.dec = nn.ModuleDict({layer.name: _build(layer, settings) for way, layer in plan if way == "dec"})
        self.kinds = {layer.name: layer.kind for _, layer in plan}
        if not self.song:
            self.out_norm = group_norm(model_channels * channel_mult[0], 1e-5)
            self.out_conv = nn.Conv2d(model_channels * channel_mult[0], in_channels, 3, padding=1)
        with torch.device("cpu"):  # also where the network is built without memory
            abar = schedule_from_config(schedule or {}, where="the schedule of an EDMUNet").abar
            sigma = ((1 - abar) / abar).sqrt().float()
            # as integers, which .half() and .bfloat16() leave alone: a rounded sigma is another time
            self.register_buffer("sigma_bits", sigma.view(torch.int32), persistent=False)

    @property
    def sigma(self) -> Float[Tensor, " T"]:
        """EDM's noise level at each time step of the schedule."""
        bits: Tensor = self.get_buffer("sigma_bits")
        return bits.view(torch.float32)

    def forward(
        self,
        sample: Float[Tensor, "n c h w"],
        timestep: Int[Tensor, " n"] | int,
        class_labels: Int[Tensor, " n"] | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[Tensor]:
        """Predicted noise of variance-preserving `sample` at `timestep`, in the dtype of `sample`.

        Raises ValueError where class labels are missing (unless the network was trained without them at times) or given
        to a network without classes.
        """
        steps = torch.as_tensor(timestep, device=sample.device).long().expand(sample.shape[0])
        sigma = self.sigma[steps].to(torch.promote_types(sample.dtype, torch.float32))[:, None, None, None]
        data = float(self.config["sigma_data"])
        width = (sigma**2 + data**2).sqrt()
        x = sample.to(sigma.dtype) * (1 + sigma**2).sqrt() / width  # c_in of EDM's x
        raw = self.denoise(
            x.to(self.dtype), (sigma.flatten().log() / 4).to(self.dtype), self._labels(sample, class_labels)
        )
        eps = ((sigma * x - data * raw.to(sigma.dtype)) / width).to(sample.dtype)
        return UNet2DOutput(sample=eps) if return_dict else (eps,)

    def _labels(self, sample: Tensor, labels: Tensor | None) -> Float[Tensor, "n classes"] | None:
        if self.map_label is None:
            if labels is not None:
                raise ValueError("class_labels given to an EDMUNet without classes")
            return None
        classes = self.map_label.in_features
        if labels is None:
            if not self.config["label_dropout"]:
                raise ValueError("class_labels should be provided when doing class conditioning")
            return torch.zeros(sample.shape[0], classes, dtype=self.dtype, device=sample.device)
        return functional.one_hot(labels.long(), classes).to(self.dtype)

    def denoise(
        self, x: Float[Tensor, "n c h w"], noise: Float[Tensor, " n"], labels: Float[Tensor, "n classes"] | None = None
    ) -> Float[Tensor, "n c h w"]:
        """EDM's raw network F; `noise` is ln(sigma) / 4."""
        embedding = self._embedding(noise, labels)
        x, skips = self._encode(x, embedding)
        return self._decode(x, skips, embedding)

    def _embedding(self, noise: Tensor, labels: Tensor | None) -> Tensor:
        if "freqs" in dict(self.map_noise.named_buffers()):
            angles = noise[:, None] * (2 * math.pi * self.map_noise.get_buffer("freqs"))
            waves = torch.cat([angles.cos(), angles.sin()], 1)
        else:
            waves = sinusoids(noise, self.noise_channels, self.endpoint)
        if self.song:  # sines first
            waves = torch.cat(waves.chunk(2, 1)[::-1], 1)
            if labels is not None and self.map_label is not None:
                waves = waves + self.map_label(labels * math.sqrt(labels.shape[1]))
            return functional.silu(self.map_layer1(functional.silu(self.map_layer0(waves))))
        embedding = self.map_layer1(functional.silu(self.map_layer0(waves)))
        if labels is not None and self.map_label is not None:
            embedding = embedding + self.map_label(labels)
        return functional.silu(embedding)

    def _encode(self, x: Tensor, embedding: Tensor) -> tuple[Tensor, list[Tensor]]:
        skips: list[Tensor] = []
        image = x  # the input on its own way down
        for name, layer in self.enc.items():
            match self.kinds[name]:
                case "down":
                    image = layer(image)
                case "skip":
                    x = skips[-1] = x + layer(image)
                case "residual":
                    x = skips[-1] = image = (x + layer(image)) * math.sqrt(0.5)
                case kind:
                    x = layer(x, embedding) if kind == "block" else layer(x)
                    skips.append(x)
        return x, skips

    def _decode(self, x: Tensor, skips: list[Tensor], embedding: Tensor) -> Tensor:
        image: Tensor | None = None  # the output on its own way up
        normed = x
        for name, layer in self.dec.items():
            match self.kinds[name]:
                case "up":
                    image = layer(image)
                case "norm":
                    normed = layer(x)
                case "out":
                    detail = layer(functional.silu(normed))
                    image = detail if image is None else image + detail
                case _:
                    x = layer(x if layer.in_channels == x.shape[1] else torch.cat([x, skips.pop()], 1), embedding)
        if image is None:
            image = self.out_conv(functional.silu(self.out_norm(x)))
        return image


def _plan(song: bool, config: dict[str, Any]) -> Iterator[tuple[str, Layer]]:
    """(enc or dec, layer) in the order of computation, under the names that EDM's state dicts have."""
    width, colours, blocks = config["model_channels"], config["in_channels"], config["num_blocks"]
    channels = [width * multiple for multiple in config["channel_mult"]]
    sides = [config["sample_size"] >> level for level in range(len(channels))]
    attends = [side in config["attn_resolutions"] for side in sides]

    def heads(attention: bool, out: int) -> int:
        return 0 if not attention else 1 if song else out // HEAD_CHANNELS

    current = width if song else channels[0]
    yield "enc", Layer(f"{sides[0]}x{sides[0]}_conv", "conv", colours, current)
    skips, image = [current], colours
    for level, out in enumerate(channels):
        name = f"{sides[level]}x{sides[level]}"
        if level:
            yield "enc", Layer(f"{name}_down", "block", current, current, "down")
            skips.append(current)
            if song and config["encoder_type"] == "skip":
                yield "enc", Layer(f"{name}_aux_down", "down", image, image)
                yield "enc", Layer(f"{name}_aux_skip", "skip", image, current)
            if song and config["encoder_type"] == "residual":
                yield "enc", Layer(f"{name}_aux_residual", "residual", image, current)
                image = current
        for block in range(blocks):
            yield "enc", Layer(f"{name}_block{block}", "block", current, out, heads=heads(attends[level], out))
            current = out
            skips.append(out)
    for level in reversed(range(len(channels))):
        name, out = f"{sides[level]}x{sides[level]}", channels[level]
        if level == len(channels) - 1:
            yield "dec", Layer(f"{name}_in0", "block", current, current, heads=heads(True, current))
            yield "dec", Layer(f"{name}_in1", "block", current, current)
        else:
            yield "dec", Layer(f"{name}_up", "block", current, current, "up")
        for block in range(blocks + 1):
            attention = attends[level] and (not song or block == blocks)
            yield "dec", Layer(f"{name}_block{block}", "block", current + skips.pop(), out, heads=heads(attention, out))
            current = out
        if song and (config["decoder_type"] == "skip" or level == 0):
            if config["decoder_type"] == "skip" and level < len(channels) - 1:
                yield "dec", Layer(f"{name}_aux_up", "up", colours, colours)
            yield "dec", Layer(f"{name}_aux_norm", "norm", current, current)
            yield "dec", Layer(f"{name}_aux_conv", "out", current, colours)


def _build(layer: Layer, settings: dict[str, Any]) -> nn.Module:
    taps, ends = settings["taps"], (layer.in_channels, layer.out_channels)
    match layer.kind:
        case "block":
            return EDMBlock(
                layer.in_channels, layer.out_channels, resample=layer.resample, heads=layer.heads, **settings
            )
        case "conv" | "out":
            return nn.Conv2d(*ends, 3, padding=1)
        case "skip":
            return nn.Conv2d(*ends, 1)
        case "residual":
            return FilteredConvolution(*ends, taps)
        case "norm":
            return group_norm(layer.out_channels, settings["eps"])
        case _:
            return Resample(taps, up=layer.kind == "up")
