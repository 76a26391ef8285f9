"""A student as a repository on the Hugging Face hub: its directory and a model card, through huggingface_hub."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from tempfile import TemporaryDirectory
from typing import Any

from hsivi_cli.errors import InputError
from hsivi_cli.methods.student import TEACHER_FID, Student, save_student
from hsivi_cli.networks.noise_prediction import PlainNetwork

CARD = "README.md"
SNIPPET = """```python
import hsivi_cli  # pip install hsivi: diffusers then knows the pipeline's class
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{repository}")
images = pipe(batch_size=16, seed=0).images  # or generator=torch.manual_seed(0)
```"""


@dataclass(frozen=True)
class Pushed:
    """Where a student was put: the repository's address, and the commit's."""

    url: str
    commit: str


def check_repository(repository: str) -> None:
    """Raise InputError for what the hub takes as no repository's name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repository)
    except HFValidationError as err:
        raise InputError(f"{repository!r} is no name of a repository on the hub: give it as me/five-steps") from err


def push_student(student: Student, repository: str, private: bool = False) -> Pushed:
    """Make the repository `owner/name` unless it exists, and upload the student as one commit.

    Raises InputError, saying what to do, without a login or a network, and for a repository that refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

    api = HfApi()
    try:
        api.whoami()  # before anything is made
        url = api.create_repo(repository, private=private or None, exist_ok=True)
        with staged(student, repository) as folder:
            message = f"HSIVI student, NFE {student.nfe}"
            done = api.upload_folder(repo_id=url.repo_id, folder_path=folder, commit_message=message)
    except LocalTokenNotFoundError as err:
        raise InputError("not logged in to the Hugging Face hub: run 'hf auth login', or set HF_TOKEN") from err
    except OfflineModeIsEnabled as err:
        raise InputError("HF_HUB_OFFLINE is set: unset it where there is a network, and push again") from err
    except HFValidationError as err:
        raise InputError(f"{repository} is no name of a repository: write OWNER/NAME ({_line(err)})") from err
    except HfHubHTTPError as err:
        code = getattr(err.response, "status_code", None)
        hint = "log in again by 'hf auth login' with a token that may write" if code in (401, 403) else "try again"
        raise InputError(f"the hub refused {repository} ({_line(err)}): {hint}") from err
    except Exception as err:  # of the connection; the library changes its HTTP client now and then
        if "connect" not in f"{type(err).__name__} {err}".lower() and "timeout" not in type(err).__name__.lower():
            raise
        raise InputError(f"the hub cannot be reached ({_line(err)}): push where there is a network") from err
    return Pushed(str(url), str(done.commit_url))


@contextmanager
def staged(student: Student, repository: str) -> Iterator[Path]:
    """A folder of exactly what is uploaded; the description's paths on this machine are cut to their last part."""
    with TemporaryDirectory(prefix="hsivi-") as name:
        folder = Path(name) / "student"
        public = replace(student, description=without_folders(student.description))
        save_student(public, folder)
        (folder / CARD).write_text(model_card(public, repository), encoding="utf-8")
        yield folder


def without_folders(value: Any) -> Any:
    """JSON in which every absolute path is its last part."""
    if isinstance(value, dict):
        return {key: without_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_folders(item) for item in value]
    return PurePath(value).name if isinstance(value, str) and PurePath(value).is_absolute() else value


def model_card(student: Student, repository: str) -> str:
    """The repository's README: metadata for the hub, how to draw, what it is, where it came from."""
    from huggingface_hub import ModelCardData

    task = "unconditional-image-generation" if not student.classes else None
    tags = ["hsivi", "few-step", "distillation"]
    metadata = ModelCardData(library_name="diffusers", pipeline_tag=task, tags=tags).to_yaml()
    said = student.description
    channels, height, width = student.shape
    facts = {
        "network evaluations an image (NFE)": student.nfe,
        "images": f"{height} x {width}, {channels} channel{'s' if channels > 1 else ''}",
        "classes": student.classes or None,
        "times of the grid": " ".join(str(t) for t in student.grid),
        "eta": student.eta,
        "teacher": said.get("teacher"),
        "teacher's sha256": said.get("teacher_sha256"),
        "student's sha256": student.sha256 or None,
        "steps trained, seed": " and ".join(str(said[name]) for name in ("step", "seed") if name in said) or None,
        "FID, as previewed in training": _fid(said.get("preview_fid")),
        "FID of the teacher": _fid(said.get(TEACHER_FID)),
        "hsivi": said.get("hsivi_version"),
    }
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items() if value is not None)
    title = f"# {repository.split('/')[-1]}: an image in {student.nfe} network evaluations"
    what = (
        "A few-step sampler distilled from a diffusion model by hierarchical semi-implicit variational inference "
        "([HSIVI](https://arxiv.org/abs/2310.17153)) with `hsivi distill`."
    )
    plain = "`unet/` alone opens with plain diffusers; `scheduler/` holds the grid and the learned noise levels."
    snippet = SNIPPET.format(repository=repository)
    if isinstance(student.unet, PlainNetwork):
        plain = "The network is of its author's own making: `--network` names the Python file that builds it."
        snippet = "```bash\nhsivi sample DIRECTORY --network FILE.py:FUNCTION\n```"
    return f"---\n{metadata}\n---\n\n{title}\n\n{what}\n\n{snippet}\n\n{plain}\n\n| | |\n|---|---|\n{rows}\n"


def _fid(fields: Any) -> str | None:
    """A recorded FID with its protocol, or None."""
    if not isinstance(fields, dict) or not isinstance(fields.get("value"), int | float):
        return None
    parts = [f"{fields['value']:.4g} on {fields.get('n')} samples"]
    parts += [f"by {fields['solver']} at NFE {fields.get('nfe')}"] if fields.get("solver") else []
    hashes = [
        f"{what} {str(fields[f'{what}_sha256'])[:12]}"
        for what in ("reference", "extractor")
        if fields.get(f"{what}_sha256")
    ]
    return ", ".join(parts + hashes)


def _line(err: Exception) -> str:
    return " ".join(str(err).split())[:160] or type(err).__name__
