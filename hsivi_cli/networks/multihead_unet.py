"""diffusers' UNet with as many attention heads as each level wants, and time steps of another length.

`UNet2DModel` has one head width for all levels, and feeds the time step to its sinusoids as it is. OpenAI's UNets have
one *number* of heads (so that the width differs by level), and count 4000 steps in quarters.
"""

from collections.abc import Sequence
from typing import Any

from diffusers import UNet2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import Tensor, nn


class MultiheadUNet(UNet2DModel):
    """A `UNet2DModel`, called and saved as one, with its arguments and the same names of weights.

    `attention_head_dim` lists the width of a head for each level; being a list, it makes plain
    `UNet2DModel.from_pretrained` fail instead of computing something else. `up_attention_head_dim` is the list for the
    way up where that differs. `timestep_scale` multiplies the time step; `timestep_channels` is the width of the
    sinusoids where it is not that of the first level.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] | None = None,
        in_channels: int = 3,
        out_channels: int = 3,
        center_input_sample: bool = False,
        time_embedding_type: str = "positional",
        time_embedding_dim: int | None = None,
        freq_shift: int = 0,
        flip_sin_to_cos: bool = True,
        down_block_types: tuple[str, ...] = ("DownBlock2D",),
        mid_block_type: str | None = "UNetMidBlock2D",
        up_block_types: tuple[str, ...] = ("UpBlock2D",),
        block_out_channels: tuple[int, ...] = (32,),
        layers_per_block: int = 2,
        mid_block_scale_factor: float = 1,
        downsample_padding: int = 1,
        downsample_type: str = "conv",
        upsample_type: str = "conv",
        dropout: float = 0.0,
        act_fn: str = "silu",
        attention_head_dim: Sequence[int] = (8,),
        norm_num_groups: int = 32,
        attn_norm_num_groups: int | None = None,
        norm_eps: float = 1e-5,
        resnet_time_scale_shift: str = "default",
        add_attention: bool = True,
        class_embed_type: str | None = None,
        num_class_embeds: int | None = None,
        num_train_timesteps: int | None = None,
        up_attention_head_dim: Sequence[int] | None = None,
        timestep_scale: float = 1.0,
        timestep_channels: int | None = None,
    ) -> None:
        if time_embedding_type != "positional":
            raise ValueError(f"time_embedding_type {time_embedding_type!r} must be 'positional'")
        if timestep_channels is not None:
            time_embedding_dim = 4 * timestep_channels
        own: dict[str, Any] = {
            "attention_head_dim": list(attention_head_dim),
            "up_attention_head_dim": None if up_attention_head_dim is None else list(up_attention_head_dim),
        }
        super().__init__(
            sample_size=sample_size,
            in_channels=in_channels,
            out_channels=out_channels,
            center_input_sample=center_input_sample,
            time_embedding_type=time_embedding_type,
            time_embedding_dim=time_embedding_dim,
            freq_shift=freq_shift,
            flip_sin_to_cos=flip_sin_to_cos,
            down_block_types=tuple(down_block_types),
            mid_block_type=mid_block_type,
            up_block_types=tuple(up_block_types),
            block_out_channels=tuple(block_out_channels),
            layers_per_block=layers_per_block,
            mid_block_scale_factor=mid_block_scale_factor,
            downsample_padding=downsample_padding,
            downsample_type=downsample_type,
            upsample_type=upsample_type,
            dropout=dropout,
            act_fn=act_fn,
            attention_head_dim=None,  # one head as wide as its level; split below
            norm_num_groups=norm_num_groups,
            attn_norm_num_groups=attn_norm_num_groups,
            norm_eps=norm_eps,
            resnet_time_scale_shift=resnet_time_scale_shift,
            add_attention=add_attention,
            class_embed_type=class_embed_type,
            num_class_embeds=num_class_embeds,
            num_train_timesteps=num_train_timesteps,
        )
        self.register_to_config(**own)  # the constructor above wrote its own over it
        down, up = own["attention_head_dim"], own["up_attention_head_dim"] or own["attention_head_dim"]
        if not len(down) == len(up) == len(block_out_channels):
            raise ValueError("attention_head_dim needs one width for each of block_out_channels")
        for block, width in zip([*self.down_blocks, self.mid_block], [*down, down[-1]], strict=True):
            _split_heads(block, width)
        for block, width in zip(self.up_blocks, reversed(up), strict=True):
            _split_heads(block, width)
        channels = timestep_channels or block_out_channels[0]
        self.time_proj = ScaledTimesteps(channels, flip_sin_to_cos, freq_shift)
        self.time_proj.factor = timestep_scale
        if timestep_channels is not None:
            self.time_embedding = TimestepEmbedding(channels, 4 * channels, act_fn)


class ScaledTimesteps(Timesteps):
    """Sinusoids of `factor` times the step, rounded to float32 as in the networks that rescale."""

    factor: float = 1.0

    def forward(self, timesteps: Tensor) -> Tensor:
        """(n, channels) sinusoids of (n,) steps."""
        out: Tensor = super().forward(timesteps.float() * self.factor if self.factor != 1 else timesteps)
        return out


def _split_heads(block: nn.Module | None, width: int) -> None:
    for module in block.modules() if block is not None else ():
        if isinstance(module, Attention):
            if width < 1 or module.inner_dim % width:
                raise ValueError(f"attention_head_dim {width} does not divide {module.inner_dim} channels")
            module.heads = module.sliceable_head_dim = module.inner_dim // width
            module.scale = width**-0.5
