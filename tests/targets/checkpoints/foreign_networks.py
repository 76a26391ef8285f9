"""Small networks in the layouts of other projects, written from their formulas as plain functions.

Each function computes on `Weights`, which invents a weight where it is first asked for: one run writes a state dict in
that layout, with norms and last layers random as well, and every later run is an independent forward pass through it.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d, conv_transpose2d, group_norm, interpolate, linear, pad, silu


class Weights:
    """Named tensors; `tensors` is the state dict."""

    def __init__(self, seed: int) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.generator = torch.Generator().manual_seed(seed)

    def get(self, name: str, *shape: int) -> Tensor:
        if name not in self.tensors:
            noise = torch.randn(shape, generator=self.generator)
            fan = math.prod(shape[1:]) if len(shape) > 1 else 25
            self.tensors[name] = noise / math.sqrt(fan)
        assert self.tensors[name].shape == shape, name
        return self.tensors[name]

    def norm(self, name: str, x: Tensor, groups: int = 32, eps: float = 1e-5) -> Tensor:
        channels = x.shape[1]
        if f"{name}.weight" not in self.tensors:
            self.get(f"{name}.weight", channels).add_(1)
        return group_norm(x, groups, self.get(f"{name}.weight", channels), self.get(f"{name}.bias", channels), eps)

    def conv(self, name: str, x: Tensor, out: int, side: int = 3, **options: int) -> Tensor:
        weight = self.get(f"{name}.weight", out, x.shape[1], side, side)
        return conv2d(x, weight, self.get(f"{name}.bias", out), **({"padding": side // 2} | options))

    def line(self, name: str, x: Tensor, out: int, bias: bool = True) -> Tensor:
        return linear(x, self.get(f"{name}.weight", out, x.shape[-1]), self.get(f"{name}.bias", out) if bias else None)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(n, heads, width, pixels) each; written out, with loops over nothing but einsum's letters."""
    scores = torch.einsum("nhcq,nhck->nhqk", q, k) / math.sqrt(q.shape[2])
    return torch.einsum("nhqk,nhck->nhcq", scores.softmax(-1), v)


def ddpm_torch(w: Weights, x: Tensor, t: Tensor, channels, attends, blocks, out, convolves=True) -> Tensor:
    """Ho et al.'s UNet with the names of tqch/ddpm-torch."""

    def block(name: str, x: Tensor, width: int) -> Tensor:
        hidden = w.conv(f"{name}.conv1", silu(w.norm(f"{name}.norm1", x, eps=1e-6)), width)
        hidden = hidden + w.line(f"{name}.fc", silu(embedding), width)[:, :, None, None]
        hidden = w.conv(f"{name}.conv2", silu(w.norm(f"{name}.norm2", hidden, eps=1e-6)), width)
        return hidden + (x if x.shape[1] == width else w.conv(f"{name}.skip", x, width, 1))

    def attention(name: str, x: Tensor) -> Tensor:
        c = x.shape[1]
        rows = w.conv(f"{name}.project_in", w.norm(f"{name}.norm", x, eps=1e-6), 3 * c, 1).flatten(2)
        q, k, v = (rows[:, None, i * c : (i + 1) * c] for i in range(3))
        return x + w.conv(f"{name}.project_out", softmax_attention(q, k, v).reshape(x.shape), c, 1)

    def step(name: str, x: Tensor, level: int) -> Tensor:
        if not attends[level]:
            return block(name, x, channels[level])
        return attention(f"{name}.1", block(f"{name}.0", x, channels[level]))

    half, last = channels[0] // 2, len(channels) - 1
    angles = t[:, None] * 10000 ** (-torch.arange(half) / (half - 1))
    embedding = w.line("embed.0", torch.cat([angles.sin(), angles.cos()], 1), 4 * channels[0])
    embedding = w.line("embed.2", silu(embedding), 4 * channels[0])
    skips = [w.conv("in_conv", x, channels[0])]
    for level in range(last + 1):
        for i in range(blocks):
            skips.append(step(f"downsamples.level_{level}.{i}", skips[-1], level))
        if level < last:
            name = f"downsamples.level_{level}.{blocks}.1"
            wide = pad(skips[-1], (0, 1, 0, 1))
            small = w.conv(name, wide, channels[level], stride=2, padding=0) if convolves else avg_pool2d(skips[-1], 2)
            skips.append(small)
    x = block("middle.2", attention("middle.1", block("middle.0", skips[-1], channels[last])), channels[last])
    for level in reversed(range(last + 1)):
        for i in range(blocks + 1):
            x = step(f"upsamples.level_{level}.{i}", torch.cat([x, skips.pop()], 1), level)
        if level:
            x = interpolate(x, scale_factor=2.0)
            x = w.conv(f"upsamples.level_{level}.{blocks + 1}.1", x, channels[level]) if convolves else x
    return w.conv("out_conv.2", silu(w.norm("out_conv.0", x, eps=1e-6)), out)


def openai(
    w: Weights,
    x: Tensor,
    t: Tensor,
    y: Tensor | None = None,
    *,
    width: int,
    channels,
    attends,
    blocks: int,
    out: int,
    heads,
    classes: int = 0,
    scale_shift: bool = False,
    resample: str = "conv",
    new_order: bool = False,
) -> Tensor:
    """The UNet of OpenAI's two repositories; `heads` by level, `t` as the network sees it."""

    def block(name: str, x: Tensor, wide: int, size: str = "") -> Tensor:
        hidden = silu(w.norm(f"{name}.in_layers.0", x))
        if size:
            change = (lambda z: avg_pool2d(z, 2)) if size == "down" else (lambda z: interpolate(z, scale_factor=2.0))
            hidden, x = change(hidden), change(x)
        hidden = w.conv(f"{name}.in_layers.2", hidden, wide)
        rows = w.line(f"{name}.emb_layers.1", silu(embedding), wide * (2 if scale_shift else 1))[:, :, None, None]
        if scale_shift:
            hidden = w.norm(f"{name}.out_layers.0", hidden) * (1 + rows[:, :wide]) + rows[:, wide:]
        else:
            hidden = w.norm(f"{name}.out_layers.0", hidden + rows)
        hidden = w.conv(f"{name}.out_layers.3", silu(hidden), wide)
        return hidden + (x if x.shape[1] == wide else w.conv(f"{name}.skip_connection", x, wide, 1))

    def attention(name: str, x: Tensor, count: int) -> Tensor:
        n, c = x.shape[:2]
        flat = w.norm(f"{name}.norm", x).flatten(2)
        weight, bias = w.get(f"{name}.qkv.weight", 3 * c, c, 1), w.get(f"{name}.qkv.bias", 3 * c)
        rows = torch.einsum("rc,ncp->nrp", weight[..., 0], flat) + bias[:, None]
        each = c // count
        if new_order:  # which of the three, head, channel
            q, k, v = (rows[:, i * c : (i + 1) * c].reshape(n, count, each, -1) for i in range(3))
        else:  # head, which of the three, channel
            first = torch.arange(count)[:, None] * 3 * each + torch.arange(each)
            q, k, v = (rows[:, first + i * each] for i in range(3))
        mixed = softmax_attention(q, k, v).reshape(n, c, -1)
        weight, bias = w.get(f"{name}.proj_out.weight", c, c, 1), w.get(f"{name}.proj_out.bias", c)
        return x + (torch.einsum("rc,ncp->nrp", weight[..., 0], mixed) + bias[:, None]).reshape(x.shape)

    def resize(name: str, x: Tensor, size: str) -> Tensor:
        if resample == "resnet":
            return block(name, x, x.shape[1], size)
        if size == "down":
            return w.conv(f"{name}.op", x, x.shape[1], stride=2) if resample == "conv" else avg_pool2d(x, 2)
        x = interpolate(x, scale_factor=2.0)
        return w.conv(f"{name}.conv", x, x.shape[1]) if resample == "conv" else x

    half, last = width // 2, len(channels) - 1
    angles = t[:, None] * 10000 ** (-torch.arange(half) / half)
    embedding = w.line("time_embed.0", torch.cat([angles.cos(), angles.sin()], 1), 4 * width)
    embedding = w.line("time_embed.2", silu(embedding), 4 * width)
    if classes:
        embedding = embedding + w.get("label_emb.weight", classes, 4 * width)[y]
    skips = [w.conv("input_blocks.0.0", x, channels[0])]
    for level in range(last + 1):
        for _ in range(blocks):
            name = f"input_blocks.{len(skips)}"
            x = block(f"{name}.0", skips[-1], channels[level])
            skips.append(attention(f"{name}.1", x, heads[level]) if attends[level] else x)
        if level < last:
            skips.append(resize(f"input_blocks.{len(skips)}.0", skips[-1], "down"))
    x = attention("middle_block.1", block("middle_block.0", skips[-1], channels[last]), heads[last])
    x, place = block("middle_block.2", x, channels[last]), 0
    for level in reversed(range(last + 1)):
        for i in range(blocks + 1):
            name, child = f"output_blocks.{place}", 1
            x = block(f"{name}.0", torch.cat([x, skips.pop()], 1), channels[level])
            if attends[level]:
                x, child = attention(f"{name}.1", x, heads[level]), 2
            if level and i == blocks:
                x = resize(f"{name}.{child}", x, "up")
            place += 1
    return w.conv("out.2", silu(w.norm("out.0", x)), out)


def edm(
    w: Weights,
    x: Tensor,
    noise: Tensor,
    labels: Tensor | None = None,
    *,
    model_type: str = "SongUNet",
    model_channels: int,
    channel_mult,
    num_blocks: int,
    attn_resolutions,
    label_dim: int = 0,
    embedding_type: str = "positional",
    channel_mult_noise: int = 1,
    encoder_type: str = "standard",
    decoder_type: str = "standard",
    resample_filter=(1, 1),
    **_: object,
) -> Tensor:
    """EDM's raw network F(x, ln(sigma) / 4, one-hot labels)."""
    song, colours, side = model_type == "SongUNet", x.shape[1], x.shape[2]
    taps = torch.tensor(resample_filter, dtype=torch.float32) if song else torch.ones(2)
    taps = torch.outer(taps, taps) / taps.sum() ** 2
    border = (len(taps) - 1) // 2
    eps = 1e-6 if song else 1e-5

    def norm(name: str, x: Tensor) -> Tensor:
        return w.norm(name, x, min(32, x.shape[1] // 4), eps)

    def resize(x: Tensor, size: str, padding: int = border) -> Tensor:
        kernel = taps.repeat(x.shape[1], 1, 1, 1)
        if size == "down":
            return conv2d(x, kernel, stride=2, padding=padding, groups=x.shape[1])
        return conv_transpose2d(x, 4 * kernel, stride=2, padding=padding, groups=x.shape[1])

    def block(name: str, x: Tensor, out: int, size: str = "", attention: bool = False) -> Tensor:
        w.tensors.update({f"{name}.conv0.resample_filter": taps[None, None]} if size else {})
        hidden = silu(norm(f"{name}.norm0", x))
        hidden, skip = (resize(hidden, size), resize(x, size)) if size else (hidden, x)
        hidden = w.conv(f"{name}.conv0", hidden, out)
        rows = w.line(f"{name}.affine", embedding, out * (1 if song else 2))[:, :, None, None]
        if song:
            hidden = norm(f"{name}.norm1", hidden + rows)
        else:
            hidden = norm(f"{name}.norm1", hidden) * (1 + rows[:, :out]) + rows[:, out:]
        hidden = w.conv(f"{name}.conv1", silu(hidden), out)
        if x.shape[1] != out or (song and size):
            skip = w.conv(f"{name}.skip", skip, out, 1)
        x = (hidden + skip) * (math.sqrt(0.5) if song else 1)
        heads = 1 if song else out // 64
        if not (attention and heads):
            return x
        n, each = len(x), out // heads
        rows = w.conv(f"{name}.qkv", norm(f"{name}.norm2", x), 3 * out, 1).flatten(2)
        first = torch.arange(heads)[:, None] * 3 * each + 3 * torch.arange(each)
        q, k, v = (rows[:, first + i] for i in range(3))
        mixed = softmax_attention(q, k, v).reshape(n, out, *x.shape[2:])
        return (x + w.conv(f"{name}.proj", mixed, out, 1)) * (math.sqrt(0.5) if song else 1)

    wide = model_channels * (channel_mult_noise if song else 1)
    if embedding_type == "fourier":
        angles = 2 * math.pi * noise[:, None] * w.get("map_noise.freqs", wide // 2)
    else:
        angles = noise[:, None] * 10000 ** (-torch.arange(wide // 2) / (wide // 2 - (1 if song else 0)))
    waves = torch.cat([angles.sin(), angles.cos()] if song else [angles.cos(), angles.sin()], 1)
    if label_dim and song:
        waves = waves + w.line("map_label", labels * math.sqrt(label_dim), wide)
    embedding = w.line("map_layer1", silu(w.line("map_layer0", waves, 4 * model_channels)), 4 * model_channels)
    if label_dim and not song:
        embedding = embedding + w.line("map_label", labels, 4 * model_channels, bias=False)
    embedding = silu(embedding)
    channels = [model_channels * multiple for multiple in channel_mult]
    image, skips, last = x, [], len(channels) - 1
    for level, out in enumerate(channels):
        here = f"enc.{side >> level}x{side >> level}"
        if not level:
            skips.append(w.conv(f"{here}_conv", x, model_channels if song else channels[0]))
        else:
            x = block(f"{here}_down", skips[-1], skips[-1].shape[1], "down")
            if encoder_type == "skip":
                image = resize(image, "down")
                x = x + w.conv(f"{here}_aux_skip", image, x.shape[1], 1)
            if encoder_type == "residual":
                weight = w.get(f"{here}_aux_residual.weight", x.shape[1], image.shape[1], 3, 3)
                image = resize(conv2d(image, weight, padding=1 + border), "down", 0)
                bias = w.get(f"{here}_aux_residual.bias", x.shape[1])[:, None, None]
                x = image = (x + image + bias) / math.sqrt(2)
            skips.append(x)
        for i in range(num_blocks):
            skips.append(block(f"{here}_block{i}", skips[-1], out, attention=side >> level in attn_resolutions))
    x, total = skips[-1], None
    for level in reversed(range(last + 1)):
        here, out = f"dec.{side >> level}x{side >> level}", channels[level]
        if level == last:
            x = block(f"{here}_in1", block(f"{here}_in0", x, x.shape[1], attention=True), x.shape[1])
        else:
            x = block(f"{here}_up", x, x.shape[1], "up")
        for i in range(num_blocks + 1):
            attention = side >> level in attn_resolutions and (not song or i == num_blocks)
            x = block(f"{here}_block{i}", torch.cat([x, skips.pop()], 1), out, attention=attention)
        if song and (decoder_type == "skip" or not level):
            detail = w.conv(f"{here}_aux_conv", silu(norm(f"{here}_aux_norm", x)), colours)
            total = detail if total is None else resize(total, "up") + detail
    return total if song else w.conv("out_conv", silu(norm("out_norm", x)), colours)
