"""Compiles Triton kernels for NVIDIA GPUs without one, and reads what the machine code uses.

Only in a process without TRITON_INTERPRET: the interpreter leaves nothing to compile.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver

MATRIX = ("HMMA", "IMMA", "QMMA", "HGMMA", "IGMMA", "QGMMA", "UTCHMMA", "UTCIMMA", "UTCQMMA", "UTCMMA")


class Usage(NamedTuple):
    """Of one compiled kernel: registers of a thread; bytes of stack (where spills go), local and shared memory; how
    often its machine code has each matrix instruction."""

    target: str
    threads: int
    registers: int
    stack: int
    local: int
    shared: int
    matrix: dict[str, int]


class CompileOnly(DriverBase):  # type: ignore[misc]
    """As much of a driver as ``warmup`` asks for; nothing can be launched."""

    def __init__(self, capability: int) -> None:
        super().__init__()
        self.target = GPUTarget("cuda", capability, 32)

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        # Triton keeps what it compiled by device.
        return int(self.target.arch)

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError

    def get_benchmarker(self) -> Any:
        raise NotImplementedError


def compile_for(
    capability: int, kernel: Any, arguments: tuple[torch.dtype | int | float, ...], **constants: Any
) -> Usage:
    """Compiles as a launch would, with a dtype in the place of each tensor; 80 means sm_80."""
    driver.set_active(CompileOnly(capability))
    compiled = kernel.warmup(*arguments, grid=(1,), **constants)
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder, "kernel.cubin")
        binary.write_bytes(compiled.asm["cubin"])
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(binary)]
        shown = subprocess.run(command, capture_output=True, text=True, check=True)
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", shown.stdout + shown.stderr)
    target = re.search(r"\.target (\w+)", compiled.asm["ptx"])
    assert usage, shown.stdout + shown.stderr
    assert target
    registers, stack, local = map(int, usage.groups())
    threads = 32 * compiled.metadata.num_warps
    words = re.findall(r"\b[A-Z]+MMA\b", compiled.asm["sass"])
    matrix = {name: count for name in MATRIX if (count := words.count(name))}
    return Usage(target[1], threads, registers, stack, local, compiled.metadata.shared, matrix)
