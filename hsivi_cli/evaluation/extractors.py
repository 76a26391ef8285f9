"""Feature extractors for image metrics: our digit classifier, Inception v3, or a TorchScript file.

All are torch-fidelity's kind: importing this module registers `hsivi-digits` and `hsivi-torchscript` with it. Nothing
is downloaded, and no pickle is opened with more than tensors allowed.
"""

import io
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch_fidelity import FeatureExtractorBase, register_feature_extractor
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY
from torch_fidelity.utils import create_feature_extractor

from hsivi_cli.errors import InputError
from hsivi_cli.io.files import asset, sha256
from hsivi_cli.networks.digit_features import SIZE, DigitClassifier, scale_pixels

DIGITS = "hsivi-digits"
TORCHSCRIPT = "hsivi-torchscript"
INCEPTION = "inception-v3-compat"
CHOICES = ("inception", "digits")
DIGIT_WEIGHTS = "digit_features/digit_features.safetensors"
INCEPTION_VARIABLE = "HSIVI_INCEPTION_WEIGHTS"
# torch-fidelity's file, whose name carries the first eight digits
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


@dataclass(frozen=True)
class Extractor:
    """A network with what the protocol says about it.

    `module` takes uint8 NCHW and returns `(features (n, d),)` or `(features, logits (n, k))`. `channels` is what the
    network wants: grey images are repeated for 3, None takes what there is.
    """

    name: str
    module: FeatureExtractorBase
    sha256: str
    channels: int | None
    resize: str


class FeatureExtractorDigits(FeatureExtractorBase):
    """The shipped digit classifier as a torch-fidelity extractor: layers `64` (penultimate) and `logits`.

    Input uint8 NCHW; sizes other than 28x28 are resized bilinearly with antialiasing, RGB is averaged to grey.
    """

    def __init__(
        self, name: str, features_list: list[str], feature_extractor_weights_path: str | Path | None = None, **_: Any
    ) -> None:
        super().__init__(name, features_list)
        self.classifier = load_digit_classifier(Path(feature_extractor_weights_path or asset(DIGIT_WEIGHTS)))

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        """Layers on offer."""
        return ("64", "logits")

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        """Logits for the inception score, the penultimate layer for everything else."""
        return "logits" if metric == "isc" else "64"

    @staticmethod
    def can_be_compiled() -> bool:
        """Whether torch.compile is safe."""
        return True

    @staticmethod
    def get_dummy_input_for_compile() -> UInt8[Tensor, "1 1 28 28"]:
        """An input for tracing."""
        return torch.zeros(1, 1, SIZE, SIZE, dtype=torch.uint8)

    def forward(self, input: UInt8[Tensor, "n c h w"]) -> tuple[Float[Tensor, "n d"], ...]:
        """The requested layers, in order."""
        result = self.classifier(scale_pixels(input))
        layers = {"64": result.features, "logits": result.logits}
        return tuple(layers[name] for name in self.features_list)


class FeatureExtractorTorchScript(FeatureExtractorBase):
    """A TorchScript file as a torch-fidelity extractor: uint8 NCHW in, features or `(features, logits)` out."""

    def __init__(
        self, name: str, features_list: list[str], feature_extractor_weights_path: str | Path = "", **_: Any
    ) -> None:
        super().__init__(name, features_list)
        self.script = _load_torchscript(Path(feature_extractor_weights_path))

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        """Layers on offer; a file without logits has only the first."""
        return ("features", "logits")

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        """Logits for the inception score, features for everything else."""
        return "logits" if metric == "isc" else "features"

    @staticmethod
    def can_be_compiled() -> bool:
        """Whether torch.compile is safe: not for a script."""
        return False

    def forward(self, input: UInt8[Tensor, "n c h w"]) -> tuple[Float[Tensor, "n d"], ...]:
        """The requested layers, in order; without logits where the file has none."""
        output = self.script(input)
        layers = dict(zip(("features", "logits"), output if isinstance(output, tuple) else (output,), strict=False))
        return tuple(layers[name] for name in self.features_list if name in layers)


for _name, _class in ((DIGITS, FeatureExtractorDigits), (TORCHSCRIPT, FeatureExtractorTorchScript)):
    if _name not in FEATURE_EXTRACTORS_REGISTRY:
        register_feature_extractor(_name, _class)


def load_extractor(choice: str, weights: Path | None = None, device: str = "cpu") -> Extractor:
    """Load `digits`, `inception` (from `weights` or HSIVI_INCEPTION_WEIGHTS), or a TorchScript file.

    A TorchScript file runs its code: load only files you trust.
    Raises InputError for an unknown choice, and for weights that are missing, damaged or not the known ones.
    """
    if weights is not None and choice != "inception":
        raise InputError(f"--weights goes with --features inception only, not with {choice}")
    if choice == "digits":
        path = asset(DIGIT_WEIGHTS)
        resize = f"bilinear, antialias, to {SIZE}x{SIZE} where needed; RGB averaged to grey"
        return Extractor("digits", _create(DIGITS, ["64", "logits"], path, device), sha256(path), None, resize)
    if choice == "inception":
        resize = "bilinear to 299x299 as TensorFlow 1 does it; grey repeated to RGB"
        return Extractor("inception", _inception(weights, device), INCEPTION_SHA256, 3, resize)
    path = Path(choice)
    if path.suffix not in (".pt", ".ts", ".pth"):
        raise InputError(f"--features {choice} is unknown: use {', '.join(CHOICES)} or a TorchScript file (.pt, .ts)")
    if not path.is_file():
        raise InputError(f"--features {choice}: the file does not exist")
    module = _create(TORCHSCRIPT, ["features", "logits"], path, device)
    return Extractor(
        f"torchscript {path.name}", module, sha256(path), None, "none: the script sees the images as they are"
    )


def load_digit_classifier(path: Path) -> DigitClassifier:
    """Load the digit classifier's weights; raises InputError if the file is missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    model = DigitClassifier()
    try:
        model.load_state_dict(load_file(path))
    except (SafetensorError, OSError, RuntimeError) as err:
        raise InputError(f"{path} holds no weights of the digit classifier: reinstall hsivi") from err
    return model.eval().requires_grad_(False)


def _create(name: str, layers: list[str], weights: Path | io.BytesIO, device: str) -> FeatureExtractorBase:
    extractor = create_feature_extractor(
        name, layers, cuda=False, verbose=False, feature_extractor_weights_path=weights
    )
    return extractor.to(device)


def _inception(weights: Path | None, device: str) -> FeatureExtractorBase:
    named = weights or os.environ.get(INCEPTION_VARIABLE)
    if not named:
        raise InputError(
            f"--features inception wants torch-fidelity's {INCEPTION_FILE}, and nothing is downloaded: give its path "
            f"with --weights or {INCEPTION_VARIABLE}, or use --features digits"
        )
    path = Path(named)
    if not path.is_file():
        raise InputError(f"{path} does not exist: --weights names torch-fidelity's {INCEPTION_FILE}")
    found = sha256(path)
    if found != INCEPTION_SHA256:
        raise InputError(f"{path} is not torch-fidelity's {INCEPTION_FILE}: its sha256 begins with {found[:8]}")
    return _create(INCEPTION, ["2048", "logits_unbiased"], _tensors_only(path), device)


def _tensors_only(path: Path) -> io.BytesIO:
    """The state dict, read with tensors only and written again to memory.

    torch-fidelity unpickles what it is given without restriction, so it is given our own bytes, never the file.
    """
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as err:  # torch raises pickle, zip, runtime and end-of-file errors here
        raise InputError(f"{path} is damaged or holds more than tensors: fetch {INCEPTION_FILE} again") from err
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    buffer.seek(0)
    return buffer


def _load_torchscript(path: Path) -> torch.jit.ScriptModule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return torch.jit.load(str(path), map_location="cpu").eval()
        except (RuntimeError, ValueError, OSError) as err:
            raise InputError(f"{path} is no TorchScript file: write it with torch.jit.save") from err
