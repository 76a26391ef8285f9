"""HSIVI distillation of a score network, without data (Yu et al. 2023, arXiv 2310.17153, HSIVI-SM).

The chain `x_{k-1} = A_k x_k + B_k phi(x_k, t_k) + c1_k exp(log_gamma) z` walks the bridge `p_k` = data noised to time
t_k, whose score is `-eps*(x, t_k) / s_k`. Each layer's marginal is matched to its bridge through a critic f that
learns the noise prediction of the student's own marginal; the layers are trained jointly, with no gradient through a
layer's input.

Diffused matching (objectives `diffused-fisher` and `diffused-kl`): if the marginal at t_{k-1} is right, so is its
diffusion at every later time, and conversely. Comparing at a random later time t' replaces the layer's small noise by
`gamma' = std / s'` near 1, so that the critic's regression target `zeta / gamma'` is not drowned in its own variance.
At t' = t_{k-1} it is the paper's objective `sm` again.

One step is one rollout of the student, `critic_steps` critic updates and one student update. Between two student
updates the student does not change, so the rollout's states and predictions serve every critic update: a fresh `zeta`
gives a fresh, exactly on-policy layer output without another student forward.

Several processes share the chains of a rollout and the rows of a batch. What is drawn for a row does not depend on who
computes it, and gradients are means over the whole batch, so the course is that of one process up to rounding.
"""

import copy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hsivi_cli.engine import processes
from hsivi_cli.engine.optimisation import (
    LearningRate,
    Precision,
    ScheduleName,
    Share,
    apply_update,
    autocast,
    gradient_scaler,
    share_of,
    update_ema,
)
from hsivi_cli.engine.seeds import PhiloxStreams, StepDraws
from hsivi_cli.errors import InputError
from hsivi_cli.kernels.choice import Kernels
from hsivi_cli.kernels.comparison import compare
from hsivi_cli.kernels.convert import fuse
from hsivi_cli.kernels.philox import Draw
from hsivi_cli.kernels.student_loss import Loss
from hsivi_cli.methods.student import Student, chain_states, sample_student
from hsivi_cli.networks.noise_prediction import PlainNetwork, predict_eps
from hsivi_cli.objectives.matching import Comparison, critic_loss, student_losses
from hsivi_cli.targets.score_net import ScoreNet
from hsivi_cli.targets.user_network import check_trainable
from hsivi_cli.transitions.gaussian_layer import (
    LayerCoefficients,
    comparison_rows,
    diffusion_times,
    layer_coefficients,
)

Objective = Literal["sm", "diffused-fisher", "diffused-kl"]
LogGammaShape = Literal["map", "layer", "scalar"]

T_MAX_SHARE = 0.9  # comparisons reach up to 0.9 T, where almost no signal is left to compare


@dataclass(frozen=True)
class DistillConfig:
    """A resolved distillation run. `rollout` counts the chains a rollout draws; 0 means 2 batch / K, at least 8."""

    grid: tuple[int, ...]
    steps: int
    objective: Objective = "diffused-kl"
    eta: float = 0.2
    batch: int = 128
    rollout: int = 0
    rollout_cache: bool = True
    critic_steps: int = 5
    lr_student: float = 1e-4
    lr_critic: float = 3e-4
    warmup: int = 20
    lr_schedule: ScheduleName = "cosine"
    clip: float = 1.0
    ema: float = 0.995
    log_gamma: LogGammaShape = "map"
    precision: Precision = "fp32"
    seed: int = 0
    device: str = "cpu"
    kernels: Kernels = "torch"
    accumulate: int = 1
    compiled: bool = False

    @property
    def chains(self) -> int:
        """Chains of one rollout; each gives K layer inputs."""
        return self.rollout or max(2 * self.batch // (len(self.grid) - 1), 8)

    @property
    def rollout_chains(self) -> int:
        """Chains that a rollout really draws: without the cache, each gives one layer input."""
        return self.chains if self.rollout_cache else self.batch


@dataclass
class DistillState:
    """Student (network and log_gamma), critic, frozen teacher, moving averages and optimisers."""

    step: int
    student: nn.Module
    log_gamma: nn.Parameter
    critic: nn.Module
    teacher: ScoreNet
    ema_student: nn.Module
    ema_log_gamma: Tensor
    student_optimiser: torch.optim.Optimizer
    critic_optimiser: torch.optim.Optimizer
    layers: LayerCoefficients
    config: DistillConfig
    student_scaler: torch.amp.GradScaler
    critic_scaler: torch.amp.GradScaler
    lr_scale: float = 1.0  # what the loop lowers when it rolls back


@dataclass(frozen=True)
class Rollout:
    """Layer inputs of a rollout: `x` = x_k, `eps` = phi(x_k, t_k) without gradient, `k` the layer.

    `labels` are the classes of the chains, where the networks are conditioned on classes.
    """

    x: Float[Tensor, "m c h w"]
    eps: Float[Tensor, "m c h w"]
    k: Int[Tensor, " m"]
    labels: Int[Tensor, " m"] | None = None

    def labels_of(self, inputs: Int[Tensor, " n"]) -> Int[Tensor, " n"] | None:
        """The classes of some inputs."""
        return None if self.labels is None else self.labels[inputs]


def check_donor(teacher: ScoreNet, donor: Student) -> None:
    """Raise InputError unless a student can start from `donor`: the teacher's architecture and schedule."""
    ours, theirs = teacher.unet.state_dict(), donor.unet.state_dict()
    if {name: w.shape for name, w in ours.items()} != {name: w.shape for name, w in theirs.items()}:
        raise InputError(
            f"--init-from {donor.path} has another architecture than the teacher: choose one of its students"
        )
    if donor.schedule.config != teacher.schedule.config:
        raise InputError(
            f"--init-from {donor.path} has another noise schedule than the teacher: choose one of its students"
        )


def check_teacher(teacher: ScoreNet) -> None:
    """Raise InputError unless copies of the teacher can be trained; a user's own network may not be of that kind."""
    if isinstance(teacher.unet, PlainNetwork):
        check_trainable(teacher.unet)


def init(target: ScoreNet, config: DistillConfig, warm_start: Student | None = None) -> DistillState:
    """Student and critic start as copies of the teacher; the student may start from another student instead.

    With `config.kernels` other than "torch" all three networks get fused modules, the teacher in place;
    `config.compiled` compiles them in place too, which leaves the names in their state dicts as they are.
    """
    if config.kernels != "torch":
        fuse(target.unet, config.kernels)
    student = copy.deepcopy(target.unet)
    if warm_start is not None:
        student.load_state_dict(warm_start.unet.state_dict())
    student = student.to(config.device).eval().requires_grad_(True)  # eval: no dropout, as the teacher
    critic = copy.deepcopy(target.unet).to(config.device).eval().requires_grad_(True)
    shapes = {"map": target.shape, "layer": (len(config.grid) - 1, *target.shape), "scalar": ()}
    log_gamma = nn.Parameter(torch.zeros(shapes[config.log_gamma], device=config.device))
    if warm_start is not None and config.log_gamma != "layer" and warm_start.log_gamma.shape == log_gamma.shape:
        log_gamma.data.copy_(warm_start.log_gamma)
    ema_student = copy.deepcopy(student).eval().requires_grad_(False)
    if config.compiled:
        for network in (student, critic, target.unet):
            network.compile()
    return DistillState(
        step=0,
        student=student,
        log_gamma=log_gamma,
        critic=critic,
        teacher=target,
        ema_student=ema_student,
        ema_log_gamma=log_gamma.detach().clone(),
        student_optimiser=torch.optim.Adam([*student.parameters(), log_gamma], config.lr_student, amsgrad=True),
        critic_optimiser=torch.optim.Adam(critic.parameters(), config.lr_critic, amsgrad=True),
        layers=layer_coefficients(config.grid, config.eta, target.schedule),
        config=config,
        student_scaler=gradient_scaler(config.precision, config.device),
        critic_scaler=gradient_scaler(config.precision, config.device),
    )


def step(state: DistillState, batch: Tensor | None, generator: torch.Generator) -> dict[str, float]:
    """One rollout, `critic_steps` critic updates, one student update; the method needs no data, so `batch` is None.

    The metric `skipped` counts the updates that were left out because their loss or gradient was not finite.
    """
    config, skipped = state.config, 0.0
    state.step += 1
    draws = StepDraws(config.seed, state.step, generator, config.device)
    share = share_of(config.batch, config.accumulate)
    rollout = roll_out_together(state, draws)
    for update in range(config.critic_steps):
        if update and not config.rollout_cache:
            rollout = roll_out_together(state, draws)
        critic_metrics = critic_step(state, rollout, draws, share)
        skipped += critic_metrics["skipped"]
    student_metrics = student_step(state, rollout, draws, share)
    return critic_metrics | student_metrics | {"skipped": skipped + student_metrics["skipped"]}


def roll_out_together(state: DistillState, draws: StepDraws) -> Rollout:
    """The whole rollout, in every process, of which each computes its share of the chains."""
    shares = [processes.share(state.config.rollout_chains, of=rank) for rank in range(processes.count())]
    mine = shares[processes.rank()]
    rollout = roll_out(state, draws, mine or range(1))  # with more processes than chains, one that is not used
    if len(shares) == 1:
        return rollout

    def whole(rows: Tensor) -> Tensor:
        by_chain = rows.unflatten(0, (-1, len(mine) or 1)).transpose(0, 1)[: len(mine)]
        return processes.gather(by_chain, [len(share) for share in shares]).transpose(0, 1).flatten(0, 1)

    x, eps = whole(torch.stack([rollout.x, rollout.eps], 1)).unbind(1)
    return Rollout(x, eps, whole(rollout.k), None if rollout.labels is None else whole(rollout.labels))


@torch.no_grad()
def roll_out(state: DistillState, draws: StepDraws, chains: range) -> Rollout:
    """Layer inputs of the current student, from `x_K ~ N(0, I)`; without the cache, one input a chain.

    `chains` are the ones to compute here, of the `config.rollout_chains` of all processes; the layers' inputs lie
    layer by layer, K first.
    """
    config, shape = state.config, state.teacher.shape
    labels = None
    if state.teacher.classes:  # of all chains, so that every process draws the same
        drawn = torch.randint(0, state.teacher.classes, (config.rollout_chains,), generator=draws.generator)
        labels = drawn[list(chains)].to(config.device)
    x, eps, k = chain_states(
        lambda x, t: _eps(state, state.student, x, t, labels),
        state.log_gamma,
        state.layers,
        lambda: draws.take(chains).normals(shape, kernels=config.kernels),
    )
    labels = None if labels is None else labels.repeat(state.layers.nfe)
    if not config.rollout_cache:
        layer = torch.randint(0, state.layers.nfe, (config.rollout_chains,), generator=draws.generator)
        rows = layer[list(chains)] * len(chains) + torch.arange(len(chains))
        x, eps, k = x[rows.to(x.device)], eps[rows.to(x.device)], k[rows]
        labels = None if labels is None else labels[rows.to(x.device)]
    return Rollout(x, eps, k, labels)


def critic_step(state: DistillState, rollout: Rollout, draws: StepDraws, share: Share) -> dict[str, float]:
    """Regress the critic on the noise of the student's diffused outputs; nothing reaches the student.

    `share` is what to compute here, of the `config.batch` rows of all processes; `rollout` is the whole rollout.
    """
    config = state.config
    inputs, k, zeta, t = _draw_comparison(state, rollout, draws, share.rows)

    def loss_of(part: slice) -> tuple[Tensor, dict[str, Tensor]]:
        rows = inputs[part]
        with torch.no_grad():
            at = _compare(state, rollout.x[rows], rollout.eps[rows], k[part], t[part], zeta.part(part))
        critic_eps = _eps(state, state.critic, at.y, at.t, rollout.labels_of(rows))
        return critic_loss(critic_eps, at, config.kernels), {}

    schedule = LearningRate(state.lr_scale * config.lr_critic, config.warmup, config.lr_schedule)
    rate = schedule.at(state.step, config.steps)
    optimiser, parameters = state.critic_optimiser, state.critic.parameters()
    update = apply_update(loss_of, share.parts, optimiser, parameters, rate, config.clip, state.critic_scaler)
    skipped = float(not update.stepped)
    return {"critic_loss": update.means["loss"], "critic_grad_norm": update.norm, "skipped": skipped}


def student_step(state: DistillState, rollout: Rollout, draws: StepDraws, share: Share) -> dict[str, float]:
    """Move the student along the objective's gradient; critic and teacher are left as they are.

    `share` and `rollout` as in `critic_step`.
    """
    config = state.config
    inputs, k, zeta, t = _draw_comparison(state, rollout, draws, share.rows)

    def loss_of(part: slice) -> tuple[Tensor, dict[str, Tensor]]:
        x, labels = rollout.x[inputs[part]], rollout.labels_of(inputs[part])
        eps = _eps(state, state.student, x, state.layers.times[k[part]], labels)
        at = _compare(state, x, eps, k[part], t[part], zeta.part(part))
        with torch.set_grad_enabled(config.objective != "diffused-kl"):
            critic_eps = _eps(state, state.critic, at.y, at.t, labels)
            teacher_eps = _eps(state, state.teacher.unet, at.y, at.t, labels)
        losses = student_losses(kind, critic_eps, teacher_eps, at, config.kernels)
        return losses.loss, {"fisher": losses.fisher, "critic_gap": losses.gap}

    kind: Loss = "reverse-kl" if config.objective == "diffused-kl" else "fisher"
    schedule = LearningRate(state.lr_scale * config.lr_student, config.warmup, config.lr_schedule)
    rate = schedule.at(state.step, config.steps)
    optimiser, parameters = state.student_optimiser, [*state.student.parameters(), state.log_gamma]
    state.critic.requires_grad_(False)
    update = apply_update(loss_of, share.parts, optimiser, parameters, rate, config.clip, state.student_scaler)
    state.critic.requires_grad_(True)
    if update.stepped:
        update_ema(state.ema_student.parameters(), state.student.parameters(), state.step, config.ema)
        update_ema([state.ema_log_gamma], [state.log_gamma], state.step, config.ema)
    return {
        "student_loss": update.means["loss"],
        "student_grad_norm": update.norm,
        "fisher": update.means["fisher"],
        "critic_gap": update.means["critic_gap"],
        "log_gamma": state.log_gamma.mean().item(),
        "lr_student": rate,
        "skipped": float(not update.stepped),
    }


def _draw_comparison(
    state: DistillState, rollout: Rollout, draws: StepDraws, rows: range
) -> tuple[Tensor, Int[Tensor, " n"], Draw, Int[Tensor, " n"]]:
    """Inputs out of the rollout for these rows of the batch, their layers, the noise `zeta` and comparison times."""
    config, device = state.config, state.config.device
    mine = list(rows)
    inputs = torch.randint(0, len(rollout.k), (config.batch,), generator=draws.generator)[mine]
    u = torch.rand(config.batch, generator=draws.generator)[mine]
    zeta = draws.take(rows)
    k = rollout.k[inputs]
    t = state.layers.times[k - 1]
    if config.objective != "sm":
        t = diffusion_times(k, u, state.layers, T_MAX_SHARE * state.teacher.schedule.num_train_timesteps)
    return inputs.to(device), k, zeta, t


def _compare(state: DistillState, x: Tensor, eps: Tensor, k: Tensor, t: Tensor, zeta: Draw) -> Comparison:
    rows = comparison_rows(k, t, state.layers, state.teacher.schedule)
    y = compare(x, eps, state.log_gamma, rows, zeta, state.config.kernels)
    return Comparison(y, t, state.log_gamma, rows, zeta)


def _eps(state: DistillState, network: nn.Module, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
    with autocast(state.config.precision, state.config.device):
        return predict_eps(network, x, t, state.teacher.schedule, labels)


def averaged_student(state: DistillState, description: dict[str, Any] | None = None) -> Student:
    """The student that a run hands out: the moving averages."""
    config, schedule = state.config, state.teacher.schedule
    return Student(state.ema_student, state.ema_log_gamma, config.grid, config.eta, schedule, description or {})


def sample(state: DistillState, noise: PhiloxStreams) -> Float[Tensor, "n c h w"]:
    """Draw from the averaged student."""
    return sample_student(averaged_student(state), noise, state.config.precision)


def state_dict(state: DistillState) -> dict[str, Any]:
    """Tensors and plain JSON of a run; the teacher is not part of it."""
    return {
        "step": state.step,
        "student": dict(state.student.state_dict()),
        "log_gamma": state.log_gamma.data,
        "critic": dict(state.critic.state_dict()),
        "ema_student": dict(state.ema_student.state_dict()),
        "ema_log_gamma": state.ema_log_gamma,
        "student_optimiser": state.student_optimiser.state_dict(),
        "critic_optimiser": state.critic_optimiser.state_dict(),
        "student_scaler": state.student_scaler.state_dict(),
        "critic_scaler": state.critic_scaler.state_dict(),
    }


def load_state_dict(state: DistillState, tree: dict[str, Any]) -> None:
    """Restore a run, in place."""
    state.step = tree["step"]
    state.student.load_state_dict(tree["student"])
    state.critic.load_state_dict(tree["critic"])
    state.ema_student.load_state_dict(tree["ema_student"])
    state.log_gamma.data.copy_(tree["log_gamma"])
    state.ema_log_gamma.copy_(tree["ema_log_gamma"])
    state.student_optimiser.load_state_dict(tree["student_optimiser"])
    state.critic_optimiser.load_state_dict(tree["critic_optimiser"])
    state.student_scaler.load_state_dict(tree.get("student_scaler", {}))
    state.critic_scaler.load_state_dict(tree.get("critic_scaler", {}))
