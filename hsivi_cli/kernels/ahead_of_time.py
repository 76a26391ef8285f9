"""Compiling kernels for GPUs that are not there, and reading what the assembler says about them."""

import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hsivi_cli.kernels.runtime import triton

WARP = 32


@dataclass(frozen=True)
class Resources:
    """What `ptxas -v` reports for a kernel: registers a thread, and bytes a thread spilled or kept on the stack."""

    capability: int
    registers: int
    spill_stores: int
    spill_loads: int
    stack: int


def compile_for(
    kernel: Any,
    signature: dict[str, str],
    constants: dict[str, Any],
    capability: int,
    warps: int = 4,
    divisible: Sequence[str] = (),
) -> Resources:
    """Compile a kernel for compute capability 80 or 90, without a GPU, and report its resources.

    `signature` gives Triton's type of every run-time argument (`"*fp32"`, `"i32"`), `constants` the `tl.constexpr`s.
    A launch tells the compiler which pointers and integers are multiples of 16; here all pointers are, and `divisible`.
    """
    from triton.backends.compiler import GPUTarget

    types = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    aligned = [i for i, name in enumerate(kernel.arg_names) if types[name].startswith("*") or name in divisible]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = triton.compiler.ASTSource(kernel, types, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, WARP), options={"num_warps": warps})
    return assemble(compiled.asm["ptx"], capability)


def assemble(ptx: str, capability: int) -> Resources:
    """Run Triton's own ptxas on a kernel's PTX and read its report."""
    import triton.backends.nvidia

    ptxas = Path(triton.backends.nvidia.__file__).parent / "bin" / "ptxas"
    suffix = "a" if capability >= 90 else ""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(ptx)
        command = [str(ptxas), "-v", f"--gpu-name=sm_{capability}{suffix}", str(file), "-o", str(file) + ".cubin"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    report = done.stdout + done.stderr

    def number(pattern: str) -> int:
        found = re.findall(pattern, report)
        return max(map(int, found), default=0)

    return Resources(
        capability,
        number(r"Used (\d+) registers"),
        number(r"(\d+) bytes spill stores"),
        number(r"(\d+) bytes spill loads"),
        number(r"(\d+) bytes stack frame"),
    )
