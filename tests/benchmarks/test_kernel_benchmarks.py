"""The benchmarks of the kernels run to their end without a GPU, on torch and triton alone. How fast is not tested."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks" / "kernels"
OPERATORS = {
    "int8_linear",
    "weight_only_linear",
    "dequantise_weight",
    "pattern_attention",
    "token_match + token_merge",
    "token_gather",
    "block_sparse_linear",
    "shared_pattern_linear",
    "depthwise_scale_shift",
    "evonorm_s0",
    "evonorm_b0",
    "quantise_rows",
    "layer_norm_quantise",
    "gelu_quantise",
}
FIELDS = {
    "operator", "shape", "dtype", "variant", "ours", "backend", "config", "median_us", "p20_us", "p80_us", "n", "calls",
    "sets", "cache", "method", "floor_us", "efficiency", "ceiling", "named", "speedup", "noise", "error", "max_error",
    "failure", "facts",
}  # fmt: skip
# Of results in bf16, and of attention; ToMe's algorithm in bf16 picks other tokens than in float64.
ERROR = 1e-2
CHOOSING = "ToMe's algorithm"
NOT_ON_CPU = ("torch.compile", "_weight_int4pack_mm", "cuDNN SDPA", "torch 2:4", "torch BSR")


def run(*options: str) -> subprocess.CompletedProcess[str]:
    """With the path alone in the environment, as on a machine that has no more of archfront than that."""
    command = [sys.executable, str(FOLDER / "run.py"), *options]
    environment = {"PYTHONPATH": str(ROOT / "src")}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """What a quick run wrote and what it printed."""
    file = tmp_path_factory.mktemp("kernels") / "figures.json"
    done = run("--quick", "--device", "cpu", "--minutes", "5", "--json", str(file))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(file.read_text()), done.stdout


def test_every_operator_has_rows_with_all_fields(quick: tuple[dict[str, Any], str]) -> None:
    rows = quick[0]["rows"]
    assert {row["operator"] for row in rows} == OPERATORS
    assert not quick[0]["not_reached"]
    for row in rows:
        assert set(row) == FIELDS
        assert row["floor_us"] > 0
        assert row["ceiling"] > 0
        if row["median_us"] is not None:
            # Of equal samples interpolation may round one below the other.
            assert 0 < row["p20_us"] <= row["median_us"] * (1 + 1e-9) <= row["p80_us"] * (1 + 1e-8)
            assert row["efficiency"] == pytest.approx(row["floor_us"] / row["median_us"])
            assert (row["method"], row["n"]) == ("perf_counter", 3)


def test_ours_are_measured_and_right(quick: tuple[dict[str, Any], str]) -> None:
    ours = [row for row in quick[0]["rows"] if row["ours"]]
    assert {row["operator"] for row in ours} == OPERATORS
    for row in ours:
        assert row["failure"] is None, row
        assert row["backend"] == "eager twin"
        assert row["error"] <= ERROR, row


def test_baselines_are_measured_or_say_why_not(quick: tuple[dict[str, Any], str]) -> None:
    for row in quick[0]["rows"]:
        if row["ours"]:
            continue
        served = not any(name in row["variant"] or name == row["backend"] for name in NOT_ON_CPU)
        assert (row["median_us"] is not None) == served, row
        assert (row["failure"] is None) == served, row
        if served and CHOOSING not in row["variant"]:
            assert row["error"] <= ERROR, row


def test_the_run_names_machine_ceilings_and_goals(quick: tuple[dict[str, Any], str]) -> None:
    found, printed = quick
    assert {"gpu", "driver", "torch", "triton", "commit", "sources", "cpu"} <= set(found["machine"])
    assert set(found["ceilings"]["peaks"]) == {"bf16", "int8", "float32"}
    assert len(found["goals"]) == 11
    assert {goal["state"] for goal in found["goals"]} <= {"met", "not met", "not measured"}
    for operator in OPERATORS:
        assert f"{operator}; times" in printed
    assert printed.index("Measured ceilings") < printed.index("int8_linear; times") < printed.index("Goals")


def test_no_time_is_said_and_not_hidden(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    done = run("--quick", "--device", "cpu", "--minutes", "0", "--only", "token", "--json", str(file))
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(file.read_text())
    assert found["rows"] == []
    assert len(found["not_reached"]) == 2
    assert "Not reached, 2 cases" in done.stdout


def test_all_checks_pass_on_the_twins(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    done = run("--correctness", "--no-timing", "--device", "cpu", "--json", str(file))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    lines = json.loads(file.read_text())["correctness"]
    assert {line["state"] for line in lines} == {"passed"}
    assert len({line["operator"] for line in lines}) == 16


def test_tuning_is_refused_without_a_gpu() -> None:
    done = run("--tune", "--device", "cpu")
    assert done.returncode != 0
    assert "needs a GPU" in done.stderr


def test_nothing_but_torch_and_triton_is_imported() -> None:
    own = {file.stem for file in FOLDER.glob("*.py")}
    for file in FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                modules = [node.module or ""]
            for module in modules:
                top = module.split(".")[0]
                known = top in sys.stdlib_module_names or top in {*own, "torch", "triton"}
                assert known or module.startswith("archfront.kernels"), f"{file.name}: {module}"
    assert not own & set(sys.stdlib_module_names)
