"""A student's chain as a diffusers scheduler: its grid, eta and noise levels, for diffusers' pipelines and plain loops.

    scheduler = HSIVIScheduler.from_pretrained("run/nfe5", subfolder="scheduler")
    scheduler.set_timesteps()
    for t in scheduler.timesteps:
        x = scheduler.step(unet(x, t).sample, t, x, generator=generator).prev_sample

The step is `transitions.gaussian_layer` (arXiv 2310.17153). With log_gamma = 0, on any network, it is DDIM's (arXiv
2010.02502, eq. 12) with this eta on this grid, except that the last step adds no noise.
"""

import base64
from typing import Any

import numpy as np
import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from diffusers.utils.torch_utils import randn_tensor
from jaxtyping import Float, Int
from torch import Tensor

from hsivi_cli.bridges.schedule import PREDICTION_TYPES, make_grid, schedule_from_config
from hsivi_cli.errors import InputError
from hsivi_cli.kernels.samples import per_sample
from hsivi_cli.networks.noise_prediction import to_eps
from hsivi_cli.transitions.gaussian_layer import (
    LayerCoefficients,
    layer_coefficients,
    layer_mean,
    layer_std,
)

ENCODING = "float32"  # the field of an encoded map, and its little-endian type


class HSIVIScheduler(SchedulerMixin, ConfigMixin):
    """One learned Gaussian layer a step.

    `grid` lists the times t_0 < ... < t_K of a chain of K layers, and then only K steps are possible; or it is "quad"
    or "uniform" (bridges.schedule.make_grid) for any number of steps. `log_gamma` scales a layer's own noise: a number,
    a map (C, H, W), or a map a layer (K, C, H, W), as a tensor or as the config keeps it. Raises ValueError for a
    schedule or chain that cannot be.
    """

    __module__ = "hsivi_cli"  # where diffusers' model_index.json says that it lives
    _compatibles = [kind.name for kind in KarrasDiffusionSchedulers]  # noqa: RUF012 (diffusers' own pattern)
    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: list[float] | None = None,
        prediction_type: str = "epsilon",
        grid: str | list[int] = "quad",
        eta: float = 0.2,
        log_gamma: float | dict[str, Any] | Tensor = 0.0,
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
    ) -> None:
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"prediction_type {prediction_type!r} is not one of {', '.join(PREDICTION_TYPES)}")
        if not 0 <= eta <= 1:
            raise ValueError(f"eta {eta} is not between 0 and 1")
        fields: dict[str, Any] = {"num_train_timesteps": num_train_timesteps}
        fields |= {"beta_start": beta_start, "beta_end": beta_end}
        fields |= {"beta_schedule": beta_schedule, "trained_betas": trained_betas}
        fields |= {"prediction_type": prediction_type}
        try:
            self.schedule = schedule_from_config(fields, where="HSIVIScheduler")
            if not isinstance(grid, str):
                make_grid(grid, len(grid) - 1, self.schedule)
        except InputError as err:
            raise ValueError(str(err)) from err
        self.log_gamma = decode_map(log_gamma)
        self.register_to_config(log_gamma=encode_map(self.log_gamma))
        self.layers: LayerCoefficients | None = None
        self.num_inference_steps: int | None = None
        self.timesteps = torch.empty(0, dtype=torch.int64)
        if not isinstance(grid, str):
            self.set_timesteps()

    @property
    def alphas_cumprod(self) -> Float[Tensor, " T"]:
        """`abar`, the share of signal variance left at each time, float64."""
        return self.schedule.abar

    @property
    def nfe(self) -> int | None:
        """Steps of a chain whose grid is given; None where any number will do."""
        return None if isinstance(self.config["grid"], str) else len(self.config["grid"]) - 1

    def set_timesteps(self, num_inference_steps: int | None = None, device: str | torch.device | None = None) -> None:
        """Set the times t_K > ... > t_1 at which the network is asked; without a number, all that a given grid has."""
        steps = num_inference_steps or self.nfe
        if steps is None:
            raise ValueError(
                "not distilled, so without a grid of its own: give num_inference_steps, or hsivi distill it"
            )
        if steps != (self.nfe or steps):
            raise ValueError(f"{steps} steps: this is a chain of {self.nfe}, and takes no other number")
        try:
            grid = make_grid(self.config["grid"], steps, self.schedule)
        except InputError as err:
            raise ValueError(f"{steps} steps do not fit {len(self.schedule.abar)} times ({err})") from err
        if self.log_gamma.ndim == 4 and len(self.log_gamma) != steps:
            raise ValueError(f"log_gamma has {len(self.log_gamma)} layers, the grid {steps}")
        self.layers = layer_coefficients(grid, self.config["eta"], self.schedule)
        self.num_inference_steps = steps
        self.timesteps = self.layers.times[1:].flip(0).to(device)

    def scale_model_input(self, sample: Tensor, timestep: int | Tensor | None = None) -> Tensor:
        """The network's input: the sample itself."""
        return sample

    def step(
        self,
        model_output: Float[Tensor, "n c_out h w"],
        timestep: int | Tensor,
        sample: Float[Tensor, "n c h w"],
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: Float[Tensor, "n c h w"] | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """From x_k to x_{k-1}, `timestep` being t_k; computed in float32 (float64 for such samples).

        `variance_noise` is the layer's noise itself, instead of a generator of it; the last layer adds none.
        """
        if self.layers is None:
            raise ValueError("call set_timesteps before step")
        times = self.layers.times.tolist()
        if int(timestep) not in times[1:]:
            raise ValueError(f"timestep {int(timestep)} is not one of {times[:0:-1]}: walk scheduler.timesteps")
        layer = times.index(int(timestep))
        x = sample if sample.dtype == torch.float64 else sample.float()
        abar, kind = self.layers.abar[layer], self.config["prediction_type"]
        eps = to_eps(model_output.to(x.dtype), x, abar.to(x.device), kind)
        origin = (x - float(self.layers.noise_scale[layer]) * eps) / float(abar.sqrt())
        k = torch.full((len(x),), layer)
        mean = layer_mean(x, eps, k, self.layers)
        if self.config["clip_sample"]:  # as DDIMScheduler: x_0 is clamped, its direction stays
            limit = self.config["clip_sample_range"]
            clipped = origin.clamp(-limit, limit)
            mean = mean + float(self.layers.abar[layer - 1].sqrt()) * (clipped - origin)
            origin = clipped
        if layer > 1:
            if variance_noise is None:
                variance_noise = randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)
            mean = mean + layer_std(self.log_gamma.to(x.device), k, self.layers, x) * variance_noise
        outputs = mean.to(sample.dtype), origin.to(sample.dtype)
        return DDIMSchedulerOutput(*outputs) if return_dict else outputs

    def add_noise(
        self,
        original_samples: Float[Tensor, " n *shape"],
        noise: Float[Tensor, " n *shape"],
        timesteps: Int[Tensor, " n"],
    ) -> Float[Tensor, " n *shape"]:
        """Samples noised to `timesteps`, as diffusers' schedulers do."""
        abar = self.schedule.abar[timesteps.cpu()]
        signal, scale = (per_sample(share.sqrt(), original_samples) for share in (abar, 1 - abar))
        return signal * original_samples + scale * noise

    def __len__(self) -> int:
        return self.schedule.num_train_timesteps

    def __repr__(self) -> str:
        shown = {name: value for name, value in self.config.items() if not name.startswith("_")}
        if isinstance(shown["log_gamma"], dict):
            shown["log_gamma"] = f"map {tuple(self.log_gamma.shape)}, mean {float(self.log_gamma.mean()):.3f}"
        return f"HSIVIScheduler({', '.join(f'{name}={value!r}' for name, value in shown.items())})"


def encode_map(log_gamma: Float[Tensor, "..."]) -> float | dict[str, Any]:
    """A number, or the plain JSON that a scheduler's config keeps a map as: its shape, and base64 of its values."""
    if log_gamma.ndim == 0:
        return float(log_gamma)
    values = log_gamma.detach().cpu().float().numpy().astype("<f4")
    return {"shape": list(values.shape), ENCODING: base64.b64encode(values.tobytes()).decode("ascii")}


def decode_map(log_gamma: float | dict[str, Any] | Tensor) -> Float[Tensor, "..."]:
    """The tensor, float32; raises ValueError for anything that `encode_map` does not write."""
    try:
        if isinstance(log_gamma, dict):
            shape = [int(side) for side in log_gamma["shape"]]
            values = np.frombuffer(base64.b64decode(log_gamma[ENCODING], validate=True), "<f4").reshape(shape)
            decoded = torch.from_numpy(values.astype(np.float32))
        else:
            decoded = torch.as_tensor(log_gamma).detach().float()
    except (KeyError, TypeError, ValueError, RuntimeError) as err:
        raise ValueError(f"log_gamma is no number, and no map as HSIVIScheduler saves one ({err!r})") from err
    if decoded.ndim not in (0, 3, 4) or not bool(decoded.isfinite().all()):
        raise ValueError(f"log_gamma of shape {tuple(decoded.shape)} is no (C, H, W) or (K, C, H, W), or not finite")
    return decoded
