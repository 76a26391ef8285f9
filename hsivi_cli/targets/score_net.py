"""A pretrained diffusion score network as a target, from whatever form it comes in, checked before it is trusted.

A diffusers directory, nested (`unet/`, `scheduler/`) or flat (the `google/ddpm-*` layout), a hub id, a file of weights
in a layout we know (targets.checkpoints), or weights of any network beside the Python file that builds it.
"""

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn

from hsivi_cli.bridges.schedule import NoiseSchedule, schedule_from_config
from hsivi_cli.engine.run_view import refuse_unfinished
from hsivi_cli.errors import InputError
from hsivi_cli.io.files import read_json, sha256
from hsivi_cli.networks.noise_prediction import class_count, predict_eps
from hsivi_cli.targets.network_files import image_shape, load_network, weights_file

NAME_IT = "name a diffusers directory, a hub id, or a file of weights"
SCHEDULER = "scheduler_config.json"
SCHEDULER_PLACES = (f"scheduler/{SCHEDULER}", SCHEDULER)
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class ScoreNet:
    """A frozen network, and the schedule that it was trained on, which knows what it predicts.

    The score of the data noised to time t is `-eps(x, t) / s_t`. `sha256` hashes the weights and both configurations.
    `notes` say what was assumed or converted, in a line each.
    """

    unet: nn.Module
    schedule: NoiseSchedule
    path: Path
    sha256: str
    notes: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of an image."""
        return image_shape(self.unet)

    @property
    def classes(self) -> int:
        """How many classes it is conditioned on; 0: none."""
        return class_count(self.unet)

    def eps(
        self, x: Float[Tensor, "n c h w"], t: Int[Tensor, " n"] | int, labels: Int[Tensor, " n"] | None = None
    ) -> Float[Tensor, "n c h w"]:
        """Predicted noise at time `t`."""
        return predict_eps(self.unet, x, t, self.schedule, labels)


@dataclass(frozen=True)
class NetworkOptions:
    """What a user says about a network that its files do not: `--network`, `--shape` and the schedule's flags.

    `schedule` holds fields of a diffusers scheduler config, those given.
    """

    network: str | None = None
    shape: tuple[int, int, int] | None = None
    schedule: dict[str, Any] = field(default_factory=dict)


def load_score_net(path: Path, device: str = "cpu", options: NetworkOptions | None = None) -> ScoreNet:
    """Load a frozen score network. Raises InputError, in one line, for anything that cannot be one.

    Weights must be finite, and the schedule variance preserving. Only `options.network` ever runs code.
    """
    options, path = options or NetworkOptions(), Path(path)
    if not path.exists():
        path = _fetch(str(path))
    if path.is_file():
        return _from_file(path, device, options)
    home = path / "unet" if (path / "unet").is_dir() else path
    if not (home / "config.json").is_file() or (path / "hsivi.json").is_file():
        raise InputError(f"{path} is no score network: {_hint(path)}")
    own = read_json(home / "config.json")
    if home == path and "grids" in own:
        raise InputError(f"{path} is no score network: it is a run of hsivi distill: name its teacher")
    if home == path and "_class_name" not in own:
        refuse_unfinished(path)
        raise InputError(f"{path} is no score network: its config.json describes no network: {NAME_IT}")
    scheduler = next((path / place for place in SCHEDULER_PLACES if (path / place).is_file()), None)
    if scheduler is None and not options.schedule:
        missing = f"{path} has no scheduler/{SCHEDULER}: add --schedule linear (or what it was trained with)"
        raise InputError(missing)
    config, notes = read_json(scheduler) if scheduler else {}, []
    if scheduler is not None and options.schedule:
        if options.schedule.keys() - {"prediction_type"}:
            config.pop("trained_betas", None)  # they would win over what the flags say
        notes.append(f"{', '.join(options.schedule)} as the flags say, not as {scheduler} does")
    schedule = schedule_from_config(config | options.schedule, where=str(scheduler or "--schedule"))
    if options.shape is not None:
        raise InputError(f"--shape is for a file of weights: {home / 'config.json'} says the shape, leave it out")
    unet = load_network(home, options.network).to(device).eval().requires_grad_(False)
    return ScoreNet(unet, schedule, path, score_net_sha256(home, schedule), tuple(notes))


def score_net_sha256(unet_directory: Path, schedule: NoiseSchedule) -> str:
    """Hash of everything a score network computes with: weights, architecture and schedule."""
    digest = hashlib.sha256(weights_file(unet_directory).read_bytes())
    architecture = {k: v for k, v in read_json(unet_directory / "config.json").items() if not k.startswith("_")}
    digest.update(json.dumps([architecture, schedule.config], sort_keys=True).encode())
    return digest.hexdigest()


def _from_file(path: Path, device: str, options: NetworkOptions) -> ScoreNet:
    """A file of weights: of the user's own network, or in a layout that we know."""
    from hsivi_cli.targets.user_network import load_user_network

    network, suggested = options.network, dict[str, Any]()
    unet: nn.Module
    if network is not None and not network.endswith(".json"):
        if options.shape is None:
            raise InputError(f"{path} does not say how large an image is: add --shape C,H,W, as --shape 3,32,32")
        unet, found = load_user_network(path, network, options.shape)
    else:
        from hsivi_cli.targets.checkpoints.registry import convert_checkpoint

        converted = convert_checkpoint(path, read_json(Path(network)) if network else None, options.shape)
        unet, found, suggested = converted.network, converted.notes, converted.schedule
        steps = options.schedule.get("num_train_timesteps", suggested.get("num_train_timesteps"))
        if steps != suggested.get("num_train_timesteps"):
            said = suggested["num_train_timesteps"]
            raise InputError(f"--timesteps {steps}: the network in {path} counts {said}: say so in --network arch.json")
        if options.schedule.get("prediction_type", converted.prediction_type) != converted.prediction_type:
            raise InputError(f"--prediction: the network in {path} predicts {converted.prediction_type}: leave it out")
    fields = {"beta_schedule": "linear"} | suggested | options.schedule
    schedule = schedule_from_config(fields, where="--schedule")
    if not options.schedule:
        kind, steps = schedule.config["beta_schedule"], schedule.num_train_timesteps
        found = (*found, f"noise schedule assumed: {kind} betas, {steps} times (say otherwise with --schedule)")
    unet = _follow(unet, schedule).to(device).eval().requires_grad_(False)
    config: Any = unet.config
    # what begins with _ is diffusers' own, in an order that changes from process to process
    architecture = {name: value for name, value in config.items() if not name.startswith("_")}
    digest = hashlib.sha256(sha256(path).encode())
    digest.update(json.dumps([architecture, schedule.config], sort_keys=True, default=str).encode())
    return ScoreNet(unet, schedule, path, digest.hexdigest(), found)


def _follow(unet: nn.Module, schedule: NoiseSchedule) -> nn.Module:
    """A network that keeps the schedule in itself, as EDM's must, with this one; others as they are."""
    config: Any = unet.config
    if "schedule" not in config:
        return unet
    made = type(unet)(**{k: v for k, v in config.items() if k[0] != "_"} | {"schedule": schedule.config})
    made.load_state_dict(unet.state_dict())
    return made


def _hint(path: Path) -> str:
    if (path / "hsivi.json").is_file():
        return "it is a student: name its teacher"
    return f"it holds no unet/ and no config.json (an unfinished run of hsivi train, or of hsivi distill?): {NAME_IT}"


def _fetch(name: str) -> Path:
    """The local snapshot of a repository on the Hugging Face hub, weights as safetensors where it has them."""
    if not HUB_ID.fullmatch(name):
        raise InputError(f"{name} does not exist: {NAME_IT}")
    import os

    from huggingface_hub import snapshot_download

    if not os.environ.get("HF_DEBUG"):
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        path = Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
        if not list(path.rglob("*.safetensors")):  # older than that format
            path = Path(snapshot_download(name, allow_patterns=["*.json", "*.bin"]))
        return path
    except Exception as err:  # offline, unknown, gated: the library has a class for each
        raise InputError(
            f"{name} is no directory here, and cannot be fetched from the hub ({type(err).__name__}): "
            f"fetch it where there is a network, by 'hf download {name} --local-dir DIR', and name DIR"
        ) from err
