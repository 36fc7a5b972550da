"""Every operator and every setting that is shipped compiles for GPUs of three generations, on a machine without one."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from archfront.kernels.ops import MODULES

HERE = Path(__file__).parent
# What a block may have: CUDA programming guide, technical specifications per compute capability.
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
REGISTERS = 65536


def _name(module: ModuleType) -> str:
    return module.__name__.split(".")[-1]


def compiled(*arguments: str, cache: Path, path: str = "") -> list[dict[str, Any]]:
    """Rows of ``compile_operators.py``, in a process of its own: what the interpreter runs cannot be compiled."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    kept |= {"TRITON_CACHE_DIR": str(cache)} | ({"PYTHONPATH": path} if path else {})
    command = [sys.executable, str(HERE / "compile_operators.py"), *arguments]
    run = subprocess.run(command, capture_output=True, text=True, env=kept, cwd=HERE.parents[1], timeout=3600)
    assert run.returncode == 0, run.stderr[-2000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def assert_fit(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        assert row["spills"] or row["stack"] == row["local"] == 0, row
        assert row["shared"] <= SHARED[row["capability"]], row
        assert row["registers"] * row["threads"] <= REGISTERS, row
        assert bool(row["matrix"]) or not row["must_have_matrix"], row


def test_a_kernel_of_each_kind_compiles(tmp_path: Path) -> None:
    rows = compiled(cache=tmp_path)
    assert {row["module"] for row in rows} == set(map(_name, MODULES))
    assert {row["capability"] for row in rows} == set(SHARED)
    assert_fit(rows)


@pytest.mark.slow
@pytest.mark.kernels
def test_settings_from_all_over_compile(tmp_path: Path) -> None:
    """A sample of what the last test compiles, in a tenth of its time."""
    assert_fit(compiled("--some", cache=tmp_path))


@pytest.mark.slow
def test_it_compiles_on_the_triton_that_gpu_machines_have(tmp_path: Path) -> None:
    """3.6, beside the pinned one."""
    folder = tmp_path / "older"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), "triton==3.6.0"]
    subprocess.run(install, check=True, capture_output=True)
    assert_fit(compiled(cache=tmp_path / "cache", path=str(folder)))


@pytest.mark.slow
@pytest.mark.kernels
@pytest.mark.parametrize("module", MODULES, ids=_name)
def test_all_that_is_ever_tried_compiles(module: ModuleType, tmp_path: Path) -> None:
    rows = compiled("--everything", *module.OPERATORS, cache=tmp_path)
    assert len(rows) == sum(case.since <= capability for case in module.compile_cases() for capability in SHARED)
    assert_fit(rows)
