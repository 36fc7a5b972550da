"""A real job from training to finalists, and all that is written from its ledger: report, plots, exports, gc."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import archfront
from archfront.errors import InputError
from archfront.evaluators.onnx_files import outputs
from archfront.export import export_candidate
from archfront.plots import plot_front
from archfront.report.page import write_report
from archfront.search.retention import collect
from archfront.spaces.registry import SPACES

SPEC: dict[str, Any] = {
    "name": "small",
    "space": {"name": "fbnet-tiny", "layers": 10, "width": 0.5},
    "data": {"name": "digits"},
    "evaluators": [{"name": "training", "fidelities": [1, 2]}, {"name": "costs"}],
    "objectives": [
        {"metric": "accuracy", "direction": "max"},
        {"metric": "params", "direction": "min"},
        {"metric": "macs", "direction": "min"},
    ],
    "strategy": {"name": "nsga2", "population": 4},
    "budget": {"evaluations": 12},
    "workers": {"executor": "process"},
    "finalists": {"count": 2, "epochs": 3, "backends": ["eager"], "batches": [1]},
    "halving": {"eta": 2},
}


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> archfront.Job:
    return archfront.run(SPEC, db=tmp_path_factory.mktemp("job") / "l.db")


class Sources(HTMLParser):
    """Everything that a page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [str(value) for name, value in attrs if name in ("src", "href", "srcset") and value]


def test_finalists_are_trained_and_measured(job: archfront.Job) -> None:
    assert job.state == "done"
    rows = job.ledger.benchmarks(job.id)
    front = {row["evaluation"] for row in job.front()}
    assert {row["number"] for row in rows} <= front
    for number in {row["number"] for row in rows}:
        training, latency = sorted(
            (row for row in rows if row["number"] == number), key=lambda row: row["kind"] != "training"
        )
        assert 0 < training["content"]["test_accuracy"] <= 100
        assert training["settings"] == {"epochs": 3}
        timing = latency["content"]
        assert timing["low_ms"] <= timing["median_ms"] <= timing["high_ms"]
        assert len(timing["samples_ms"]) >= 10
        assert latency["device"]
    # The search itself never reported a figure of the test part.
    assert not any("test" in name for row in job.front(fidelity="any") for name in row)


def test_a_finished_job_measures_nothing_again(job: archfront.Job) -> None:
    before = job.ledger.benchmarks(job.id)
    assert job.resume() == "budget"
    assert job.ledger.benchmarks(job.id) == before


def test_the_report_is_whole_and_self_contained(job: archfront.Job, tmp_path: Path) -> None:
    write_report(job, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    sources = Sources()
    sources.feed(re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL))
    assert sources.found == []
    for words in ("The front", "How it grew", "Finalists", "Their layers", "Spearman", "<svg", "fbnet-tiny"):
        assert words in page
    key = job.ledger.benchmarks(job.id)[0]["number"]
    assert next(row["key"] for row in job.front() if row["evaluation"] == key)[:8] in page


@pytest.mark.slow
def test_the_report_in_a_browser(job: archfront.Job, tmp_path: Path) -> None:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed")
    write_report(job, tmp_path / "report.html")
    command = [
        chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run",
        f"--user-data-dir={tmp_path}/profile", "--virtual-time-budget=8000", "--dump-dom", f"file://{tmp_path}/report.html",
    ]  # fmt: skip
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    # The script ran: each figure has drawn its axes and points.
    assert dom.count("main-svg") >= 4
    assert dom.count('class="point') >= len(job.front())


def test_plots(job: archfront.Job, tmp_path: Path) -> None:
    front = job.front()
    plot_front(front, job, tmp_path / "front.png")
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
    plot_front(front, job, tmp_path / "front.html")
    assert "Plotly.newPlot" in (tmp_path / "front.html").read_text()
    with pytest.raises(InputError, match=r"\.html or \.png"):
        plot_front(front, job, tmp_path / "front.gif")


def test_exports_hold_the_trained_model(job: archfront.Job, tmp_path: Path) -> None:
    number = next(row["number"] for row in job.ledger.benchmarks(job.id))
    assert export_candidate(job, str(number), tmp_path / "model.json")["evaluation"] == number
    document = json.loads((tmp_path / "model.json").read_text())
    export_candidate(job, str(number), tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        assert json.loads(file.metadata()["genotype"]) == document["genotype"]
    model = SPACES.build(SPEC["space"], "space").build(document["genotype"])
    model.load_state_dict(weights)
    model.eval()
    export_candidate(job, str(number), tmp_path / "model.pt2")
    images = torch.rand(5, 1, 16, 16)
    program = torch.export.load(tmp_path / "model.pt2").module()
    torch.testing.assert_close(program(images), model(images))
    written = export_candidate(job, str(number), tmp_path / "model.onnx")
    assert written["what"] == "the network in float32"
    for count in (1, 5):  # of any batch size
        found = outputs(tmp_path / "model.onnx", "onnx", [images[:count]], 1)
        torch.testing.assert_close(found, model(images[:count]).detach(), rtol=1e-3, atol=1e-4)


def test_gc_keeps_what_the_rule_says(job: archfront.Job) -> None:
    url = str(job.ledger.url)
    [would] = collect(url, "all", dry_run=True)
    folder = Path(url).parent / "archfront-files"
    before = set(folder.rglob("*.safetensors"))
    [did] = collect(url, "last")
    assert (would["files"], would["bytes"]) == (did["files"], did["bytes"])
    after = set(folder.rglob("*.safetensors"))
    assert len(before) - len(after) == did["files"] > 0
    kept = {row["key"] for row in job.front()}
    assert {path.name.split("-")[0] for path in after} >= kept
    assert collect(url, "last")[0]["files"] == 0
