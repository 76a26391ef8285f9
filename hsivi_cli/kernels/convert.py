"""Swap fused operations into a diffusers UNet and back; the parameters stay where they are, and so does the state dict.

Of a `UNet2DModel`, every `ResnetBlock2D` with SiLU (both its norms, and the time embedding between them), the output
norm with its SiLU, and every upsampling with the convolution behind it are swapped. An attention's norm has no SiLU
behind it and stays.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from hsivi_cli.kernels.agreement import agrees
from hsivi_cli.kernels.choice import Kernels, triton_can_run
from hsivi_cli.kernels.group_norm_silu import group_norm_silu
from hsivi_cli.kernels.upsampling import summed_kernel, upsample_convolve

if TYPE_CHECKING:
    from diffusers import UNet2DModel


class FusedResnetBlock2D(ResnetBlock2D):
    """diffusers' residual block with GroupNorm, SiLU and the time embedding in one pass each; made by `fuse`."""

    kernels: Kernels

    def forward(self, input_tensor: Tensor, temb: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As the block's own, for the configurations that `fusible` lets through."""
        hidden = _norm_silu(self.norm1, input_tensor, self.kernels)
        resample = self.upsample or self.downsample
        if resample is not None:
            input_tensor, hidden = resample(input_tensor), resample(hidden)
        hidden = self.conv1(hidden)
        embedding = self.time_emb_proj(temb if self.skip_time_act else nn.functional.silu(temb))
        if self.time_embedding_norm == "scale_shift":
            scale, shift = embedding.chunk(2, 1)
            hidden = _norm_silu(self.norm2, hidden, self.kernels, scale=scale, shift=shift)
        else:
            hidden = _norm_silu(self.norm2, hidden, self.kernels, temb=embedding)
        hidden = self.conv2(self.dropout(hidden))
        if self.conv_shortcut is not None:
            input_tensor = self.conv_shortcut(input_tensor)
        out: Tensor = input_tensor + hidden
        return out if self.output_scale_factor == 1 else out / self.output_scale_factor


class FusedGroupNormSiLU(nn.GroupNorm):
    """A GroupNorm that does the SiLU behind it as well; made by `fuse`."""

    kernels: Kernels

    def forward(self, input: Tensor) -> Tensor:
        """`silu(group_norm(input))`."""
        return _norm_silu(self, input, self.kernels)


class FusedUpsample2D(Upsample2D):
    """diffusers' upsampling and its convolution as one transposed convolution, on a CPU; made by `fuse`.

    On a GPU it is diffusers' own: whether cuDNN gains by it was not measured.
    """

    kernel: Tensor | None  # of weights that do not change for a while; else it is made anew in each call

    def forward(self, hidden_states: Tensor, output_size: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        """As the module's own, for those that `upsamples` lets through."""
        if hidden_states.device.type != "cpu" or output_size is not None:
            return super().forward(hidden_states, output_size, *args, **kwargs)
        convolution = convolution_of(self)
        kernel = summed_kernel(convolution.weight) if self.kernel is None else self.kernel
        return upsample_convolve(hidden_states, kernel, convolution.bias)


class FusedIdentity(nn.Identity):
    """Where the SiLU was that the norm before it now does."""


def _norm_silu(norm: nn.GroupNorm, x: Tensor, kernels: Kernels, **extras: Tensor) -> Tensor:
    return group_norm_silu(x, norm.weight, norm.bias, norm.num_groups, norm.eps, **extras, kernels=kernels)


def fusible(block: nn.Module) -> bool:
    """Whether `fuse` knows this block; anything it does not know stays as it is."""
    return (
        type(block) is ResnetBlock2D
        and isinstance(block.nonlinearity, nn.SiLU)
        and block.time_emb_proj is not None
        and block.time_embedding_norm in ("default", "scale_shift")
        and all(type(norm) is nn.GroupNorm and norm.affine for norm in (block.norm1, block.norm2))
    )


def upsamples(module: nn.Module) -> bool:
    """Whether `fuse` knows this upsampling: to twice the size, by a 3 x 3 convolution without anything special."""
    if type(module) is not Upsample2D or not (module.interpolate and module.use_conv) or module.use_conv_transpose:
        return False
    convolution = convolution_of(module)
    plain = (convolution.kernel_size, convolution.stride, convolution.dilation) == ((3, 3), (1, 1), (1, 1))
    zeros = convolution.padding == (1, 1) and convolution.padding_mode == "zeros"
    return module.norm is None and type(convolution) is nn.Conv2d and plain and zeros and convolution.groups == 1


def convolution_of(upsample: Upsample2D) -> nn.Conv2d:
    """The convolution behind an upsampling, whatever diffusers calls it there."""
    convolution: nn.Conv2d = upsample.conv if upsample.name == "conv" else upsample.Conv2d_0
    return convolution


def fuse(unet: "UNet2DModel", kernels: Kernels = "auto") -> int:
    """Swap fused modules in, in place; returns how many norms are fused now. `unfuse` undoes it.

    `kernels` is decided anew in each call: `auto` and `triton` run Triton where the activation lies on a GPU that it
    can use, `auto` once they have agreed with torch there; elsewhere, and with `torch`, the modules compute what they
    did before.
    """
    like = next(unet.parameters())
    if kernels == "auto" and triton_can_run(like) and not agrees(like.device):
        kernels = "torch"
    fused = 0
    for module in unet.modules():
        if isinstance(module, FusedResnetBlock2D) or fusible(module):
            module.__class__ = FusedResnetBlock2D
            module.kernels = kernels
            fused += 2
        elif upsamples(module):
            module.__class__ = FusedUpsample2D
            module.kernel = None
    norm: nn.Module | None = getattr(unet, "conv_norm_out", None)  # a user's own network has none
    if norm is not None and type(norm) is nn.GroupNorm and norm.affine and type(unet.conv_act) is nn.SiLU:
        norm.__class__ = FusedGroupNormSiLU
        unet.conv_act = FusedIdentity()
    if isinstance(norm, FusedGroupNormSiLU):
        norm.kernels = kernels
        fused += 1
    return fused


def unfuse(unet: "UNet2DModel") -> None:
    """Give every module its own class back, in place."""
    for module in unet.modules():
        if isinstance(module, FusedResnetBlock2D):
            module.__class__ = ResnetBlock2D
            del module.kernels
        elif isinstance(module, FusedUpsample2D):
            module.__class__ = Upsample2D
            del module.kernel
    norm: nn.Module | None = getattr(unet, "conv_norm_out", None)
    if isinstance(norm, FusedGroupNormSiLU):
        del norm.kernels
        setattr(norm, "__class__", nn.GroupNorm)  # noqa: B010
        unet.conv_act = nn.SiLU()


@contextmanager
def fused(unet: "UNet2DModel", kernels: Kernels = "auto") -> Iterator["UNet2DModel"]:
    """The UNet with fused modules, and its own again afterwards; with "torch" nothing is swapped.

    The weights must not change meanwhile.
    """
    if kernels == "torch":
        yield unet
        return
    fuse(unet, kernels)
    for module in unet.modules():
        if isinstance(module, FusedUpsample2D) and next(module.parameters()).device.type == "cpu":
            module.kernel = summed_kernel(convolution_of(module).weight.detach())
    try:
        yield unet
    finally:
        unfuse(unet)
