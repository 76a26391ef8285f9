"""Train a score network from data: epsilon-prediction DDPM (Ho, Jain, Abbeel 2020, arXiv 2006.11239, algorithm 1)."""

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from hsivi_cli.bridges.schedule import NoiseSchedule, schedule_from_config
from hsivi_cli.engine.optimisation import (
    LearningRate,
    Precision,
    ScheduleName,
    apply_update,
    autocast,
    gradient_scaler,
    share_of,
    update_ema,
)
from hsivi_cli.engine.seeds import PhiloxStreams, Stream, generator
from hsivi_cli.kernels.samples import per_sample

if TYPE_CHECKING:
    from diffusers import UNet2DModel

PREVIEW_NFE = 20


@dataclass(frozen=True)
class DDPMConfig:
    """A resolved training run; `unet` holds the arguments of UNet2DModel, `schedule` a diffusers scheduler config."""

    unet: dict[str, Any]
    schedule: dict[str, Any]
    steps: int
    batch: int = 128
    lr: float = 1e-3
    warmup: int = 200
    lr_schedule: ScheduleName = "cosine"
    clip: float = 1.0
    ema: float = 0.999
    flip: bool = False
    precision: Precision = "fp32"
    seed: int = 0
    device: str = "cpu"
    accumulate: int = 1
    compiled: bool = False


@dataclass
class DDPMState:
    """Network, its moving average, and the optimiser."""

    step: int
    unet: "UNet2DModel"
    ema: "UNet2DModel"
    optimiser: torch.optim.Optimizer
    schedule: NoiseSchedule
    config: DDPMConfig
    scaler: torch.amp.GradScaler
    lr_scale: float = 1.0  # what the loop lowers when it rolls back


def init(target: None, config: DDPMConfig) -> DDPMState:
    """A fresh network; the data arrive with the batches, so there is no target object."""
    from diffusers import UNet2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(config.seed, Stream.INIT).initial_seed())
        unet = UNet2DModel(**config.unet).to(config.device)
    optimiser = torch.optim.Adam(unet.parameters(), config.lr)
    ema = copy.deepcopy(unet).eval().requires_grad_(False)
    if config.compiled:
        unet.compile()  # in place: the names in its state dict stay
    scaler = gradient_scaler(config.precision, config.device)
    return DDPMState(0, unet, ema, optimiser, schedule_from_config(config.schedule), config, scaler)


def step(state: DDPMState, batch: UInt8[Tensor, "n c h w"] | None, generator: torch.Generator) -> dict[str, float]:
    """One gradient step of `E |eps - eps_theta(sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps, t)|^2` (eq. 14).

    `batch` is the whole one, whatever the number of processes; each computes its share of it. The metric `skipped` is 1
    where the step was left out because its loss or gradient was not finite.
    """
    assert batch is not None
    config, schedule = state.config, state.schedule
    x0 = batch.float() / 127.5 - 1
    t = torch.randint(0, schedule.num_train_timesteps, (len(x0),), generator=generator)
    eps = torch.randn(x0.shape, generator=generator)
    if config.flip:
        mirrored = torch.rand(len(x0), generator=generator) < 0.5
        x0 = torch.where(mirrored.reshape(-1, 1, 1, 1), x0.flip(-1), x0)
    abar = schedule.abar[t]
    x_t = per_sample(abar.sqrt(), x0) * x0 + per_sample((1 - abar).sqrt(), x0) * eps
    share = share_of(len(x0), config.accumulate)
    mine = slice(share.rows.start, share.rows.stop)
    x_t, t, eps = (rows[mine].to(config.device) for rows in (x_t, t, eps))

    def loss_of(part: slice) -> tuple[Tensor, dict[str, Tensor]]:
        with autocast(config.precision, config.device):
            prediction = state.unet(x_t[part], t[part]).sample
        return (prediction.float() - eps[part]).pow(2).mean(), {}

    state.step += 1
    rate = LearningRate(state.lr_scale * config.lr, config.warmup, config.lr_schedule).at(state.step, config.steps)
    parameters = state.unet.parameters()
    update = apply_update(loss_of, share.parts, state.optimiser, parameters, rate, config.clip, state.scaler)
    if update.stepped:
        update_ema(state.ema.parameters(), state.unet.parameters(), state.step, config.ema)
    loss, skipped = update.means["loss"], float(not update.stepped)
    return {"loss": loss, "grad_norm": update.norm, "lr": rate, "skipped": skipped}


def draw_batch(images: UInt8[Tensor, "N c h w"], size: int, generator: torch.Generator) -> UInt8[Tensor, "n c h w"]:
    """A batch with replacement, from the step's own generator."""
    return images[torch.randint(0, len(images), (size,), generator=generator)]


@torch.no_grad()
def sample(state: DDPMState, noise: PhiloxStreams) -> Float[Tensor, "n c h w"]:
    """A preview from the averaged network: DDIM (eta = 0) on a quadratic grid of 20 layers."""
    from hsivi_cli.bridges.schedule import make_grid
    from hsivi_cli.methods.student import walk_chain
    from hsivi_cli.targets.network_files import image_shape
    from hsivi_cli.transitions.gaussian_layer import layer_coefficients

    layers = layer_coefficients(make_grid("quad", PREVIEW_NFE, state.schedule), 0.0, state.schedule)
    shape, device = image_shape(state.ema), state.config.device

    def eps(x: Tensor, t: Tensor) -> Tensor:
        with autocast(state.config.precision, device):
            return state.ema(x, t).sample.float()

    return walk_chain(eps, torch.zeros((), device=device), layers, lambda: noise.draw(shape, device))


def state_dict(state: DDPMState) -> dict[str, Any]:
    """Tensors and plain JSON of a run."""
    networks = {"unet": dict(state.unet.state_dict()), "ema": dict(state.ema.state_dict())}
    optimiser = {"optimiser": state.optimiser.state_dict(), "scaler": state.scaler.state_dict()}
    return {"step": state.step, **networks, **optimiser}


def load_state_dict(state: DDPMState, tree: dict[str, Any]) -> None:
    """Restore a run, in place."""
    state.step = tree["step"]
    state.unet.load_state_dict(tree["unet"])
    state.ema.load_state_dict(tree["ema"])
    state.optimiser.load_state_dict(tree["optimiser"])
    state.scaler.load_state_dict(tree.get("scaler", {}))
