"""``bench --device``: what is refused, and rows of one device beside those of another."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import Command

from archfront.cli.benching import measured, served_backends
from archfront.client import Job
from archfront.evaluators.latency.measurement import failed
from archfront.search.finalists import run_finalists
from archfront.search.job import FLOAT_BACKENDS, GPU_BACKENDS, Finalists, parse_spec
from archfront.search.resolve import resolve

JOB: dict[str, Any] = {
    "name": "devices", "space": {"name": "fbnet-tiny", "resolution": 8, "layers": 3},
    "data": {"name": "digits"}, "evaluators": [{"name": "costs"}],
    "objectives": [{"metric": "params", "direction": "min"}], "strategy": {"name": "random"},
    "budget": {"evaluations": 2}, "workers": {"executor": "inline"},
}  # fmt: skip


@pytest.fixture
def done(archfront: Command, tmp_path: Path) -> Command:
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(JOB))
    code, _, err = archfront("run", str(file))
    assert code == 0, err
    return archfront


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--device", "cuda:7"), ("--device", "cuda:7", "0 CUDA devices", "local-cpu")),
        (("--device", "tpu"), ("--device", "tpu", "not a known device", "local-cpu")),
        (("--backends", "eager,triton"), ("--backends", "triton", "needs a GPU", "--device cuda:0")),
    ],
)
def test_what_is_not_there_is_named_with_the_remedy(
    done: Command, words: tuple[str, ...], named: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, _, err = done("bench", "last", "0", *words)
    assert code == 2
    flat = " ".join(err.split())
    assert all(word in flat for word in named), err


def test_backends_of_processors_are_refused_on_a_gpu(done: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    code, _, err = done("bench", "last", "0", "--device", "cuda:0", "--backends", "onnx")
    assert code == 2
    assert "onnx" in err
    assert "does not run on cuda:0" in " ".join(err.split())


def test_the_processor_is_measured_by_default(done: Command) -> None:
    code, out, err = done("bench", "last", "0", "--backends", "eager", "--json")
    assert code == 0, err
    [row] = json.loads(out)
    assert row["error"] is None
    assert "device" not in row


def test_backends_that_serve_depend_on_the_device() -> None:
    on_gpu = served_backends(policies=True, device="cuda:0")
    assert on_gpu == ["eager", "compile", *GPU_BACKENDS]
    assert not {"triton", "triton-graph"} & set(served_backends(policies=False, device="cuda:0"))
    assert not set(GPU_BACKENDS) & set(served_backends(policies=True))
    # The network itself runs in both precisions, every way that there is.
    ways = {"eager", "compile", "cuda-graph", "half", "half-compile", "half-graph"}
    assert {name for name in on_gpu if name in FLOAT_BACKENDS} == ways


class Anywhere:
    """Measures nothing, and keeps what it was asked for."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []

    def rest(self) -> None: ...

    def call(self, _name: str, _method: str, request: Mapping[str, Any], _limit_s: float) -> Any:
        self.requests.append(dict(request))
        timing = {**vars(failed("")), "error": None, "median_ms": 1.0, "low_ms": 0.9, "high_ms": 1.1}
        return [timing | {"layers": [{"path": "fc"}]} for _ in request["items"]], {"device": {"digest": "d" * 8}}


@pytest.mark.parametrize(("asked", "of_latency"), [("cuda:0", None), (None, "cuda:0")])
def test_rows_of_one_device_do_not_stand_for_those_of_another(
    done: Command, asked: str | None, of_latency: str | None
) -> None:
    job = Job(reference="last")
    spec = dict(job.spec)
    if of_latency:
        spec["evaluators"] = [*spec["evaluators"], {"name": "latency", "device": of_latency}]
    anywhere: Any = Anywhere()
    run = job.ledger.begin_run(job.id, {})

    def bench(device: str | None) -> None:
        plan = Finalists(count=1, backends=["eager"], batches=[1], device=device)
        run_finalists(
            job.ledger, job.id, run, resolve(parse_spec(spec)), anywhere, plan=plan, candidates=["0"],
            announce=lambda _: None, stop=lambda: False,
        )  # fmt: skip

    for device, devices in (
        ("local-cpu", ["local-cpu"]),
        (asked, ["local-cpu", "cuda:0"]),
        (asked, ["local-cpu", "cuda:0"]),
        ("local-cpu", ["local-cpu", "cuda:0"]),
        ("cuda:1", ["local-cpu", "cuda:0", "cuda:1"]),
    ):
        bench(device)
        assert [request["device"] for request in anywhere.requests] == devices
    settings = [row["settings"] for row in job.ledger.benchmarks(job.id)]
    # As all rows once were.
    assert settings[0] == {"backend": "eager", "batch": 1, "threads": 1}
    assert settings[1] == {"backend": "eager", "batch": 1, "threads": 1, "device": "cuda:0"}
    assert [row.get("device") for row in measured(job)] == [None]
    [row] = measured(job, "cuda:0")
    assert (row["device"], row["layers"]) == ("cuda:0", [{"path": "fc"}])
