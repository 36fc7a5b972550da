"""The kernels where there is nothing but torch and triton: on a GPU machine that has no other part of archfront."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import pytest

from archfront.kernels.ops import OPERATORS

ROOT = Path(__file__).parents[2]

_PROGRAM = """
import json, sys, time
import torch, triton
start = time.perf_counter()
import archfront.kernels.ops as ops
took_s = time.perf_counter() - start
registered = [name for name in ops.OPERATORS if hasattr(torch.ops.archfront, name)]
print(json.dumps({"took_s": took_s, "operators": registered, "device": torch.cuda.is_initialized(),
                  "driver": triton.runtime.driver._active is not None,
                  "others": sorted(set(sys.modules) & {"ray", "optuna", "sqlalchemy", "timm", "pydantic", "scipy"})}))
"""


def requirements(name: str) -> set[str]:
    """A distribution and all that it needs."""
    found: set[str] = set()
    waiting = [name]
    while waiting:
        now = waiting.pop()
        if now in found:
            continue
        try:
            needs = distribution(now).requires or []
        except PackageNotFoundError:
            continue
        found.add(now)
        waiting += [re.split(r"[^\w.-]", need)[0] for need in needs if "extra ==" not in need]
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the kernels say of themselves in a venv of torch, triton and what these need."""
    folder = tmp_path_factory.mktemp("alone")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = folder / "venv" / "lib" / version / "site-packages"
    here = Path(sysconfig.get_paths()["purelib"])
    for name in requirements("torch") | requirements("triton"):
        tops = {Path(file).parts[0] for file in distribution(name).files or []}
        for top in tops - {"..", "__pycache__"}:
            if (here / top).exists() and not (packages / top).exists():
                (packages / top).symlink_to(here / top)
    # As they are copied to such a machine.
    (folder / "archfront").mkdir()
    (folder / "archfront" / "__init__.py").write_bytes((ROOT / "src" / "archfront" / "__init__.py").read_bytes())
    (folder / "archfront" / "kernels").symlink_to(ROOT / "kernels")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_", "PYTHON"))}
    run = subprocess.run(
        [str(folder / "venv" / "bin" / "python"), "-c", _PROGRAM], cwd=folder, env=environment, capture_output=True,
        text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    return dict(json.loads(run.stdout))


def test_every_operator_is_registered(alone: dict[str, Any]) -> None:
    assert alone["operators"] == list(OPERATORS)
    assert len(set(OPERATORS)) == len(OPERATORS) >= 9


def test_nothing_else_is_loaded_and_no_device_touched(alone: dict[str, Any]) -> None:
    assert not alone["others"]
    assert not alone["device"]
    assert not alone["driver"]
