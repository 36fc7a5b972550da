"""Each benchmark runs to its end on a tiny size and writes its figures. How fast anything is, is not tested."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def quick(script: str, tmp_path: Path, *more: str) -> dict[str, Any]:
    """Run a benchmark with ``--quick``; what it wrote."""
    file = tmp_path / "figures.json"
    command = [sys.executable, str(BENCHMARKS / script), "--quick", "--json", str(file), *more]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found: dict[str, Any] = json.loads(file.read_text())
    assert found["machine"]["packages"]["archfront"]
    return found


@pytest.mark.slow
def test_throughput(tmp_path: Path) -> None:
    rows = quick("throughput.py", tmp_path)["rows"]
    names = " ".join(row["name"] for row in rows)
    kinds = ("sqlite", "postgresql")
    words = [f"{who}, {kind}" for who in ("inline", "Optuna NSGA-II") for kind in kinds]
    assert all(word in names for word in (*words, "journal file"))
    assert all(row["per_second"] > 0 and row["ratio"] > 0 for row in rows)


@pytest.mark.slow
def test_million(tmp_path: Path) -> None:
    found = quick("million.py", tmp_path)
    fronts = {}
    for kind in ("sqlite", "postgresql"):
        result = found["archfront"][kind]
        assert len(result["windows"]) == 10
        assert all(row["rss_mb"] > 0 and row["front"] > 0 for row in result["windows"])
        assert result["resume_killed"]["dispatch_s"] > 0
        fronts[kind] = [query["members"] for query in result["queries"].values()]
    # The same search on both databases: so are its fronts, but for those of a time.
    assert fronts["sqlite"][:5] == fronts["postgresql"][:5]
    assert {(row["kind"], row["trials"]) for row in found["optuna"]} == {("sqlite", 50), ("postgresql", 50)}


@pytest.mark.slow
def test_scale(tmp_path: Path) -> None:
    png = tmp_path / "scale.png"
    found = quick("scale.py", tmp_path, "--png", str(png))
    for kind in ("sqlite", "postgresql"):
        rows = {(row["workers"], row["length_s"]): row for row in found["driver"][kind]}
        assert set(rows) == {(10, 0.2), (10, 60.0), (100, 0.2), (100, 60.0)}
        assert all(0 < row["utilisation"] <= 1 for row in rows.values())
        assert rows[100, 60.0]["inferred"]
    assert [row["workers"] for row in found["pool"]] == [10, 100]
    assert png.stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.alone
def test_latency(tmp_path: Path) -> None:
    found = quick("latency.py", tmp_path)
    assert len(found["rows"]) == 5
    assert found["profile"]["operators"] > 100
    for network in found["networks"]:
        assert 0 < network["low_ms"] <= network["predicted_ms"] <= network["high_ms"]
        assert network["measured_ms"] > 0


@pytest.mark.slow
@pytest.mark.alone
def test_fused_latency(tmp_path: Path) -> None:
    rows = quick("fused_latency.py", tmp_path)["rows"]
    assert [row["backend"] for row in rows] == ["onnx", "onnx"]
    assert rows[0]["median error"] < rows[1]["median error"]


@pytest.mark.slow
def test_policy_speed(tmp_path: Path) -> None:
    rows = quick("policy_speed.py", tmp_path)["rows"]
    assert [row["policies"] for row in rows] == ["random", "mutants of one"] * 2
    assert all(row["a second together"] > 0 and 0 < row["layers computed"] <= 1 for row in rows)


@pytest.mark.slow
def test_prediction_speed(tmp_path: Path) -> None:
    assert all(row["per_second"] > 0 for row in quick("prediction_speed.py", tmp_path)["rows"])


@pytest.mark.slow
def test_few_shot(tmp_path: Path) -> None:
    if not os.environ.get("ARCHFRONT_DATA"):
        pytest.skip("needs the public latency tables: set ARCHFRONT_DATA")
    assert quick("few_shot.py", tmp_path)


@pytest.mark.slow
def test_space_searches(tmp_path: Path) -> None:
    found = quick("space_searches.py", tmp_path)
    assert all(row["evaluations"] == 6 and row["front"] for row in found["spaces"])
    assert len(found["spaces"]) >= 10
    volumes = {row["search"]: row["hypervolume"] for row in found["einspace"]}
    assert set(volumes) == {"RE(Mix)", "random", "seeds alone"}
    assert all(0 < volume < 1 for volume in volumes.values())


@pytest.mark.slow
def test_recipes(tmp_path: Path) -> None:
    png = tmp_path / "decoder.png"
    found = quick("recipes.py", tmp_path, "decoder", "--draws", "1", "--work", str(tmp_path), "--plot", str(png))
    policies = {row["policy"] for row in found["rows"]}
    assert {"uniform", "random", "leave-one-in", "leave-one-in, random score", "search"} <= policies
    # One more search, begun from what recipes found.
    assert {"rsq", "search from the recipes"} <= policies
    assert all(row["recovered"] < 100 for row in found["rows"] if row["policy"] == "rsq")
    assert png.stat().st_size > 10_000
