"""Memory that is kept: page faults of large blocks end, and whoever configured the allocator is left alone."""

import os
import platform
import subprocess
import sys

import pytest

from hsivi_cli.engine import allocator

SCRIPT = """
import resource, sys, torch
from hsivi_cli.engine import allocator
if "return" in sys.argv:
    allocator.KEPT = 2**17
assert allocator.keep_freed_memory()
def use():
    blocks = [torch.empty(2**21).fill_(1.0) for _ in range(4)]  # 8 MiB each
for _ in range(10):
    use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(*argv):
    environment = {k: v for k, v in os.environ.items() if k not in allocator.SAID} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, *argv]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library keeps memory by rules of its own")
def test_freed_blocks_are_used_again_without_page_faults():
    assert faults() < 100
    assert faults("return") > 4 * 2**11 * 5  # the negative control: four blocks of 2048 pages, ten times


def test_what_the_environment_says_stands(monkeypatch):
    for name in allocator.SAID:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(allocator.sys, "platform", "win32")
    assert not allocator.keep_freed_memory()
    monkeypatch.setattr(allocator.sys, "platform", "linux")
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: pytest.fail("the user's setting was changed"))
    assert not allocator.keep_freed_memory()
