"""The command that profiles a device."""

import json
from pathlib import Path

import pytest
import yaml
from commands import Command
from jobs import synthetic_job

from archfront.evaluators.latency import profile as profile_module
from archfront.evaluators.latency.measurement import Settings
from archfront.spaces.fbnet import FBNetTiny


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    quick = Settings(rounds=2, sample_ms=0.1, warmup_ms=0.5, warmup_limit_ms=5)
    monkeypatch.setattr(profile_module, "OPERATOR_SETTINGS", quick)


def test_a_space_and_a_model_are_profiled_once(archfront: Command, tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    space = {"name": "fbnet-tiny", "resolution": 8, "layers": 3}
    job = synthetic_job()
    job |= {"space": space, "evaluators": [{"name": "costs"}], "objectives": [{"metric": "params", "direction": "min"}]}
    file.write_text(yaml.safe_dump(job))
    code, out, err = archfront("profile", "--space", str(file), "--samples", "5", "--json")
    assert code == 0, err
    first = json.loads(out)
    assert first["traced"] == len(FBNetTiny(resolution=8, layers=3).block_catalogue()) + 1
    assert first["operators"] == first["needed"] > 10
    assert first["failed"] == []
    assert "operators" in err
    # What is known is not measured again, so the version stays.
    code, out, err = archfront("profile", "--space", str(file), "--samples", "5", "--json")
    assert json.loads(out)["digest"] == first["digest"]
    assert "0 of 0 operators" in err
    code, out, _ = archfront("profile", "--models", "timm:lcnet_035")
    assert code == 0
    assert "1 traced modules need" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "--space"),
        (("--models", "timm:resnet999"), "resnet"),
        (("--models", "timm:resnet18", "--device", "cuda:7"), "cuda:7"),
        (("--models", "timm:resnet18", "--device", "tpu"), "local-cpu"),
        (("--space", "nowhere.yaml"), "nowhere.yaml"),
    ],
)
def test_bad_input_is_named(archfront: Command, arguments: tuple[str, ...], words: str) -> None:
    code, _, err = archfront("profile", *arguments)
    assert code == 2
    assert words in err
