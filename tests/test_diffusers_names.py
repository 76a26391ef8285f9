"""`import hsivi_cli` is enough for diffusers to open a student, in either order, and imports nothing heavy itself."""

import subprocess
import sys
from types import ModuleType

import pytest

import hsivi_cli
from hsivi_cli import diffusers_names

OURS_FIRST = """
import sys
import hsivi_cli
heavy = {"torch", "diffusers", "numpy"} & set(sys.modules)
assert not heavy, heavy
from diffusers import DiffusionPipeline
"""
THEIRS_FIRST = """
from diffusers import DiffusionPipeline
import hsivi_cli
"""
OPEN = """
import diffusers
pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
assert type(pipe) is hsivi_cli.HSIVIPipeline, type(pipe)
assert type(pipe.scheduler) is hsivi_cli.HSIVIScheduler
assert len(pipe(batch_size=2, seed=0).images) == 2
assert diffusers.HSIVIPipeline is hsivi_cli.HSIVIPipeline
assert diffusers.pipelines.hsivi_cli is hsivi_cli
assert getattr(diffusers.pipelines, "hsivi_cli.networks.embedding").__name__ == "hsivi_cli.networks.embedding"
for name in ("hsivi_cli.networks.none", "hsivi_cli.__main__", "hsivi", "os"):
    assert not hasattr(diffusers.pipelines, name), name
assert not hasattr(diffusers, "HSIVINothing")
assert diffusers.DDIMPipeline.__name__ == "DDIMPipeline"
"""


@pytest.mark.parametrize("start", [OURS_FIRST, THEIRS_FIRST], ids=["ours first", "theirs first"])
def test_a_fresh_session_opens_a_student(tiny_student, start):
    script = "import sys\n" + start + OPEN
    done = subprocess.run(
        [sys.executable, "-c", script, str(tiny_student)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_module_that_answers_for_itself_is_left_alone(monkeypatch):
    module = ModuleType("diffusers")
    module.__getattr__ = answer = lambda name: name
    monkeypatch.setitem(sys.modules, "diffusers", module)
    diffusers_names.tell_diffusers()
    assert module.__getattr__ is answer


def test_without_diffusers_nothing_happens(monkeypatch):
    """What is not installed is not found, and no other module's import is touched."""
    finder = diffusers_names._Finder()
    monkeypatch.setattr(diffusers_names, "find_spec", lambda name: None)
    assert finder.find_spec("diffusers") is None
    assert finder.find_spec("json") is None


def test_unknown_names_stay_unknown():
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        hsivi_cli.Nothing  # noqa: B018
