"""The house's rules: arrows only downwards, nothing below cli/ prints, help is fast."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "hsivi_cli"
FLOORS = [
    {"io", "kernels", "bridges"},
    {"engine", "evaluation", "networks", "transitions", "objectives"},
    {"methods", "targets"},
    {"cli"},
]
FLOOR = {folder: height for height, floor in enumerate(FLOORS) for folder in floor}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE)


def imported(tree):
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "hsivi_cli" and len(parts) > 1 and parts[1] in FLOOR:
                yield parts[1]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_arrows_point_downwards_and_nobody_below_prints(path):
    folder = path.relative_to(PACKAGE).parts[0]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    upwards = [other for other in imported(tree) if FLOOR[other] > FLOOR[folder]]
    assert not upwards, f"{path} imports from {upwards}"
    if folder != "cli":
        calls = [n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
        assert not {"print", "exit", "input"} & set(calls)
        uses = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert not {"sys.exit", "sys.stdout", "sys.stderr", "os._exit", "argparse.ArgumentParser"} & uses
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


def test_help_is_fast_and_imports_nothing_heavy():
    script = (
        "import sys; from hsivi_cli.cli.app import main; code = main(['--help']); "
        "heavy = {'torch', 'diffusers', 'numpy', 'matplotlib', 'torch_fidelity'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    seconds = []
    for _ in range(3):
        before = os.times()
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
        after = os.times()  # CPU seconds of the child: the same on a busy machine
        seconds.append(after.children_user + after.children_system - before.children_user - before.children_system)
        assert done.returncode == 0, done.stderr
        for command in (
            "train",
            "distill",
            "sample",
            "evaluate",
            "fit-posterior",
            "inspect",
            "export",
            "push",
            "bench",
            "env",
            "watch",
            "config",
        ):
            assert command in done.stdout
    assert min(seconds) < 0.5, seconds
