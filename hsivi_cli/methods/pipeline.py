"""A student as a diffusers pipeline.

    pipe = HSIVIPipeline.from_pretrained("run/nfe5")
    pipe(batch_size=16, seed=0).images              # those of `hsivi sample run --nfe 5 -n 16 --seed 0`
    pipe(batch_size=16, generator=torch.manual_seed(0)).images

After `import hsivi_cli`, `diffusers.DiffusionPipeline.from_pretrained` opens a student too.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin, SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from jaxtyping import Float, Int
from safetensors.torch import save_file
from torch import Tensor, nn

from hsivi_cli.bridges.schedule import schedule_from_config
from hsivi_cli.engine.seeds import PhiloxStreams
from hsivi_cli.errors import InputError
from hsivi_cli.io.files import SUMS, check_sums, write_json
from hsivi_cli.methods.scheduler import HSIVIScheduler
from hsivi_cli.methods.student import (
    DESCRIPTION,
    LOG_GAMMA,
    Student,
    chain_fields,
    chain_sha256,
    find_students,
    load_student,
)
from hsivi_cli.networks.noise_prediction import class_count, sample_labels
from hsivi_cli.targets.network_files import image_shape

if TYPE_CHECKING:
    from PIL.Image import Image

OUTPUT_TYPES = ("pil", "np", "pt")


class HSIVIPipeline(DiffusionPipeline):
    """Images in as many network evaluations as the scheduler's grid has layers.

    `unet` is any network called as `unet(x, t)` or `unet(x, t, class_labels=...)` that has a `config` with the image's
    shape; only diffusers' models can be saved. A scheduler of another kind is replaced by an HSIVIScheduler of the same
    noise schedule, with which any such network can be sampled; raises ValueError where that is not one defined by betas
    (flow matching, EDM) or leaves no signal at its end.
    """

    __module__ = "hsivi_cli"
    model_cpu_offload_seq = "unet"

    def __init__(self, unet: nn.Module, scheduler: SchedulerMixin) -> None:
        super().__init__()
        if not isinstance(scheduler, HSIVIScheduler):
            _check_betas(scheduler)
            scheduler = HSIVIScheduler.from_config(scheduler.config)
        self.register_modules(unet=unet, scheduler=scheduler)

    @classmethod
    def from_student(cls, student: Student) -> "HSIVIPipeline":
        """The pipeline of a student in memory; it shares the network."""
        return cls(student.unet, scheduler_of(student))

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, network: str | None = None, **kwargs: Any
    ) -> "HSIVIPipeline":
        """As DiffusionPipeline's; also a student directory without model_index.json, and a file of `hsivi export`.

        `network` is the `FILE:FUNCTION` that builds the network of a student of a network of your own; it is run.
        Raises InputError if a local directory has SHA256SUMS, and a file is not what it says.
        """
        path = Path(pretrained_model_name_or_path)
        if path.suffix == ".safetensors" or ((path / DESCRIPTION).is_file() and not (path / cls.config_name).is_file()):
            pipeline = cls.from_student(load_student(path, network=network))
            dtype = kwargs.get("torch_dtype") or kwargs.get("dtype")
            return pipeline.to(dtype) if isinstance(dtype, torch.dtype) else pipeline
        if path.is_dir() and not (path / cls.config_name).is_file() and (students := find_students(path)):
            raise InputError(f"{path} is a run of students: name one of them, as {students[min(students)]}")
        for directory in (path, path / "unet"):  # of a student, and of what hsivi train writes
            check_sums(directory)
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """As DiffusionPipeline's; with a grid, also a student for `hsivi sample`, without its history."""
        super().save_pretrained(save_directory, **kwargs)
        scheduler = self.scheduler
        if scheduler.nfe is None:
            return
        fields = chain_fields(scheduler.config["grid"], scheduler.config["eta"], scheduler.schedule)
        write_json(Path(save_directory) / DESCRIPTION, fields | {"chain_sha256": chain_sha256(fields)})
        (Path(save_directory) / SUMS).unlink(missing_ok=True)  # of a student that was here before
        save_file({"log_gamma": scheduler.log_gamma}, Path(save_directory) / LOG_GAMMA)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int | None = None,
        class_labels: int | Sequence[int] | Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        seed: int | None = None,
        first: int = 0,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw `batch_size` images.

        Args:
            generator: a torch.Generator, or one a sample.
            num_inference_steps: as many as the chain has layers; only a scheduler without a grid of its own needs it.
            class_labels: a class for all or one a sample, for a class-conditional network. Default: j modulo the number
                of classes for sample j.
            output_type: "pil", "np" (N, H, W, C) or "pt" (N, C, H, W), the last two float32 in [0, 1].
            return_dict: False gives a tuple with the images.
            seed: instead of a generator: the images `first` .. `first + batch_size - 1` of `hsivi sample --seed`, each
                with its own noise stream, the same on every device and in any batch.

        Raises ValueError for arguments that do not go together.
        """
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type {output_type!r} is not one of {', '.join(OUTPUT_TYPES)}")
        if batch_size < 1:
            raise ValueError(f"batch_size {batch_size}: ask for one image or more")
        if seed is not None and not (isinstance(seed, int) and 0 <= seed < 2**63):
            raise ValueError(f"seed {seed!r}: give a whole number from 0 to 2^63 - 1")
        if seed is not None and generator is not None:
            raise ValueError("seed and generator both name the noise: give one of them")
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"{len(generator)} generators for a batch of {batch_size}: give one a sample")
        weight, shape = next(self.unet.parameters()), image_shape(self.unet)
        device = self._execution_device if isinstance(self.unet, ModelMixin) else weight.device
        streams = None if seed is None else PhiloxStreams(seed, range(first, first + batch_size))

        def draw() -> Float[Tensor, "n c h w"]:
            if streams is not None:
                return streams.draw(shape, device)
            return randn_tensor((batch_size, *shape), generator=generator, device=device, dtype=torch.float32)

        labels = self._labels(class_labels, batch_size, first, device)
        conditions = {} if labels is None else {"class_labels": labels}
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        x = draw()
        for t in self.progress_bar(self.scheduler.timesteps):
            output = self.unet(x.to(weight.dtype), t, **conditions)
            output = getattr(output, "sample", output)
            noise = None if t == self.scheduler.timesteps[-1] else draw()
            x = self.scheduler.step(output, t, x, variance_noise=noise).prev_sample
        self.maybe_free_model_hooks()
        images = convert(x, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _labels(
        self, class_labels: int | Sequence[int] | Tensor | None, batch_size: int, first: int, device: torch.device
    ) -> Int[Tensor, " n"] | None:
        classes = class_count(self.unet)
        if class_labels is None:
            return sample_labels(classes, range(first, first + batch_size), device=device)
        if not classes:
            raise ValueError("class_labels: this network is not conditioned on classes")
        labels = torch.as_tensor(class_labels, dtype=torch.int64).reshape(-1)
        if len(labels) not in (1, batch_size) or bool(((labels < 0) | (labels >= classes)).any()):
            raise ValueError(f"class_labels {labels.tolist()}: give one, or one a sample, from 0 to {classes - 1}")
        return labels.expand(batch_size).to(device)


def _check_betas(scheduler: SchedulerMixin) -> None:
    """Raise ValueError unless a scheduler is one of the schedules we have; `from_config` drops what would tell."""
    kind = type(scheduler).__name__
    try:
        schedule_from_config({**scheduler.config, "_class_name": kind}, where=kind)
    except InputError as err:
        raise ValueError(str(err)) from err


def scheduler_of(student: Student) -> HSIVIScheduler:
    """The scheduler that walks a student's chain."""
    fields = {"grid": list(student.grid), "eta": student.eta, "log_gamma": student.log_gamma.detach().cpu()}
    return HSIVIScheduler(**student.schedule.config, **fields)


def convert(x: Float[Tensor, "n c h w"], output_type: str) -> "list[Image] | Float[np.ndarray, 'n h w c'] | Tensor":
    """Images in about [-1, 1] as what `output_type` names; "pil" quantises as `hsivi sample` does."""
    if output_type != "pil":
        scaled = (x.float() / 2 + 0.5).clamp(0, 1)
        return scaled if output_type == "pt" else scaled.permute(0, 2, 3, 1).cpu().numpy()
    from PIL.Image import fromarray

    from hsivi_cli.methods.sampling import to_uint8

    pixels = to_uint8(x)
    if pixels.shape[-1] not in (1, 3):
        raise ValueError(f"images of {pixels.shape[-1]} channels are no pictures: choose output_type 'np' or 'pt'")
    return [fromarray(image[..., 0] if image.shape[-1] == 1 else image) for image in pixels]
