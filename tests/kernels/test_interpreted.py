"""Triton's kernels without a GPU: in its interpreter, which has to be chosen before Triton is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hsivi_cli.kernels.runtime import triton

FILES = sorted((Path(__file__).parent / "interpreted").glob("interpreted_*.py"))


@pytest.mark.skipif(triton is None, reason="Triton cannot be imported here (it is published for Linux only)")
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem.removeprefix("interpreted_"))
def test_kernels_in_the_interpreter(file):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(file)]
    done = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
