"""From a trained network to a faster file, and candidates measured on every backend."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from commands import Command
from tests.support.small_models import data_of, trained

MODULE = '''
import torch
from torch import nn


def build():
    """A convolution of the eight by eight digits, whose weights are drawn from a seed."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


not_a_function = 3
'''


def rows_of(archfront: Command, *words: str) -> list[dict[str, Any]]:
    code, out, err = archfront("bench", "last", *words, "--json")
    assert code == 0, err
    found: list[dict[str, Any]] = json.loads(out)
    return found


def test_candidates_on_every_backend_against_the_network_itself(archfront: Command, tmp_path: Path) -> None:
    model = trained("vit")
    job = {
        "name": "bits", "space": {"name": "bits", "model": model, "weights": [4, 8], "activations": "follow"},
        "data": {"name": "digits"}, "evaluators": [{"name": "compression", "calibration": 64}],
        "objectives": [{"metric": "accuracy", "direction": "max"}, {"metric": "model_mb", "direction": "min"}],
        "strategy": {"name": "random"}, "budget": {"evaluations": 3},
        "workers": {"executor": "inline", "count": 1},
    }  # fmt: skip
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(job))
    code, _, err = archfront("run", str(file))
    assert code == 0, err

    rows = rows_of(archfront, "0", "2", "--backends", "eager,onnx,onnx-int8")
    assert {(row["evaluation"], row["backend"]) for row in rows} == {
        (number, backend) for number in (0, 2) for backend in ("eager", "onnx", "onnx-int8")
    }
    for row in rows:
        assert row["error"] is None
        assert row["low_ms"] <= row["median_ms"] <= row["high_ms"]
        assert row["baseline"]["backend"] in ("eager", "onnx")
        assert ("test_accuracy_drop" in row) == (row["backend"] != "eager")
    # Once measured it is not measured again; another backend is.
    again = rows_of(archfront, "0", "2", "--backends", "eager,onnx,onnx-int8")
    assert again == rows

    code, _, err = archfront("bench", "last", "0", "--backends", "onnx-int9")
    assert code == 2
    assert "onnx-int8" in err
    code, _, err = archfront("bench", "last", "77", "--backends", "onnx")
    assert code == 2
    assert "77" in err
    code, _, err = archfront("report", "last", "--to", str(tmp_path / "report.html"))
    assert code == 0, err
    page = (tmp_path / "report.html").read_text()
    assert "As files" in page
    assert "onnx-int8" in page


def test_backends_of_policies_are_refused_elsewhere(archfront: Command, tmp_path: Path) -> None:
    job = {
        "name": "no-policies", "space": {"name": "fbnet-tiny", "resolution": 8, "layers": 3},
        "data": {"name": "digits"}, "evaluators": [{"name": "costs"}],
        "objectives": [{"metric": "params", "direction": "min"}], "strategy": {"name": "random"},
        "budget": {"evaluations": 2}, "finalists": {"count": 1, "backends": ["eager", "openvino-int8"]},
    }  # fmt: skip
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(job))
    code, _, err = archfront("validate", str(file))
    assert code == 2
    assert "finalists.backends.1" in err


def test_a_networks_own_function_becomes_a_file(
    archfront: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    code, out, err = archfront(
        "optimize", "mine:build", "--data", "digits", "--max-drop", "30", "--backends", "onnx,onnx-int8",
        "--evaluations", "4", "--workers", "1",
        "--to", "made", "--json",
    )  # fmt: skip
    assert code == 0, err
    result = json.loads(out)
    assert (tmp_path / "made" / "report.html").stat().st_size > 1000
    # How fast tiny networks are is a matter of chance; what is said of them is not.
    if result["found"]:
        assert result["speedup"] > 1
        model = tmp_path / "made" / "model.onnx"
        assert result["files"]["model"] == "made/model.onnx"
        assert result["file_bytes"] == model.stat().st_size
        assert right_by_onnx_runtime_alone(model, tmp_path) == pytest.approx(result["test_accuracy"], abs=0.6)
        assert json.loads((tmp_path / "made" / "policy.json").read_text())["space"]["model"]["build"] == "mine:build"
    else:
        assert result["tried"]

    for wrong, words in (
        ("mine:nothing", "cannot be imported"),
        ("mine:not_a_function", "is no function"),
        ("resnet18", "fresh weights"),
    ):
        code, _, err = archfront("optimize", wrong, "--data", "digits")
        assert code == 2
        assert words in err
    code, _, err = archfront("optimize", "mine:build", "--data", "digits", "--max-drop", "-1")
    assert code == 2
    assert "--max-drop" in err


def right_by_onnx_runtime_alone(model: Path, folder: Path) -> float:
    """Percent right of the test part, in a process that has neither torch nor us."""
    data = data_of("vit")
    images, labels = data.part("test")
    np.savez(folder / "test.npz", images=data.normalised(images).numpy(), labels=labels.numpy())
    program = (
        "import sys, numpy, onnxruntime\n"
        f"test = numpy.load({str(folder / 'test.npz')!r})\n"
        f"session = onnxruntime.InferenceSession({str(model)!r}, providers=['CPUExecutionProvider'])\n"
        "found = session.run(None, {session.get_inputs()[0].name: test['images']})[0]\n"
        "assert not {'torch', 'archfront'} & set(sys.modules)\n"
        "print(100 * (found.argmax(-1) == test['labels']).mean())\n"
    )
    return float(subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout)
