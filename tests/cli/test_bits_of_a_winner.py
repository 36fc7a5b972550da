"""From a search to the compression of what it found, as docs/policies.md says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tests.support.command_line import command
from tests.support.small_models import DATA, RESNET, bits, digits

import archfront
from archfront.evaluators.compression.compressible import Compressible
from archfront.evaluators.compression.recovery.rounding import Gptq
from archfront.evaluators.onnx_files import outputs
from archfront.search.job import JobSpec

ROOT = Path(__file__).parents[2]
SPACE: dict[str, Any] = {"name": "fbnet-tiny", "layers": 3, "resolution": 8}
FOUND: dict[str, Any] = {
    "name": "found",
    "space": SPACE,
    "data": {"name": "digits"},
    "evaluators": [{"name": "training", "fidelities": [4]}, {"name": "costs"}],
    "objectives": [{"metric": "accuracy", "direction": "max"}, {"metric": "params", "direction": "min"}],
    "strategy": {"name": "random"},
    "budget": {"evaluations": 3},
    "workers": {"executor": "inline"},
}


def test_a_winner_is_compressed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    db, weights = str(tmp_path / "l.db"), tmp_path / "winner.safetensors"
    winner = max(archfront.run(FOUND, db=db).front().to_pandas().to_dict("records"), key=lambda row: row["accuracy"])
    assert command(monkeypatch, "export", "last", str(winner["evaluation"]), "--to", str(weights), "--db", db) == 0
    [documented] = [
        yaml.safe_load(block)
        for block in re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "policies.md").read_text(), flags=re.DOTALL)
        if "winner" in block
    ]
    JobSpec.model_validate(documented)
    model = {**documented["space"]["model"], "weights": str(weights)}
    job = {
        **documented,
        "space": {**documented["space"], "model": model, "keep": {}},
        "budget": {"evaluations": 24},
        "strategy": {"name": "nsga2", "population": 12},
        "workers": {"executor": "inline"},
    }
    file = tmp_path / "bits.yaml"
    file.write_text(yaml.safe_dump(job))
    capsys.readouterr()
    assert command(monkeypatch, "run", str(file), "--db", db, "--json") == 0
    assert json.loads(capsys.readouterr().out)["evaluations"]["done"] == 24
    found = archfront.Job(db).front().to_pandas()
    assert found["size_bytes"].max() < 4 * winner["params"]
    assert found["accuracy"].max() > winner["accuracy"] - 5
    smaller = tmp_path / "smaller.safetensors"
    assert command(monkeypatch, "export", "last", str(found["evaluation"][0]), "--to", str(smaller), "--db", db) == 0
    assert len(load_file(smaller)["0.0.weight"].flatten(1)[0].unique()) < 9 * 16
    weights.unlink()
    assert command(monkeypatch, "run", str(file), "--db", db) == 2
    assert "model.weights" in capsys.readouterr().err


def test_what_is_exported_was_recovered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    space = bits("resnet", weights=[3, 8])
    spec = {
        "name": "recovered",
        "space": {"name": "bits", **space.config},
        "data": DATA,
        "evaluators": [{"name": "compression", "calibration": 64, "recovery": [{"name": "gptq"}]}],
        "objectives": [{"metric": "accuracy", "direction": "max"}],
        "strategy": {"name": "random"},
        "seeds": [[3] * len(space.columns)],
        "budget": {"evaluations": 1},
        "workers": {"executor": "inline"},
    }
    db, file = str(tmp_path / "l.db"), tmp_path / "low.safetensors"
    archfront.run(spec, db=db)
    for to in (file, tmp_path / "low.pt2", tmp_path / "low.onnx"):
        assert command(monkeypatch, "export", "last", "0", "--to", str(to), "--db", db) == 0
    data = digits(RESNET)
    expected = Compressible(space, data, 64, recovery=[Gptq()]).prepared(space.variant([3] * len(space.columns)))
    stored = load_file(file)
    assert torch.equal(stored["conv1.weight"], expected.get_submodule("conv1").weight)
    assert not torch.equal(stored["conv1.weight"], space.build([3] * len(space.columns)).get_submodule("conv1").weight)
    images = data.normalised(data.part("validation")[0][:7])
    with torch.no_grad():
        given = torch.export.load(tmp_path / "low.pt2").module()(images)
        assert torch.allclose(given, expected(images), atol=1e-4)
        assert torch.allclose(outputs(tmp_path / "low.onnx", "onnx", [images], 1), expected(images), atol=1e-3)
