"""Putting the report's page together."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import markupsafe
import yaml
from jinja2 import Environment, PackageLoader, select_autoescape
from plotly.offline import get_plotlyjs
from scipy import stats

from archfront import __version__
from archfront.cli.common import duration, moment, number
from archfront.client import Job
from archfront.errors import InputError
from archfront.export import space_of
from archfront.plots import front_figure
from archfront.report.drawing import draw
from archfront.report.facts import Facts, Finalist, gather, measured_front
from archfront.report.figures import (
    correlation_figure,
    deployment_figure,
    fronts_figure,
    history_figure,
    latency_figure,
)
from archfront.report.layers import layer_table


def write_report(job: Job, to: Path) -> None:
    """Write one HTML file that needs nothing else: no script, style or font from outside.

    Raises:
        InputError: the folder does not exist, or the job has nothing to show yet.
    """
    if not to.absolute().parent.is_dir():
        raise InputError("--to", str(to), "lies in a folder that does not exist", "Make the folder first.")
    facts = gather(job)
    if not len(facts.front):
        raise InputError("JOB", job.id, "has no feasible evaluation yet", "Let it run a while first.")
    environment = Environment(
        loader=PackageLoader("archfront.report", "."), autoescape=select_autoescape(), trim_blocks=True
    )
    environment.filters |= {"number": number, "moment": moment}
    page = environment.get_template("page.html").render(**_content(facts))
    to.write_text(page, encoding="utf-8")


def _content(facts: Facts) -> dict[str, Any]:
    job = facts.job
    status = job.status(tracebacks=0)
    space = space_of(job)
    backends = list(dict.fromkeys(s["backend"] for f in facts.finalists for s, _ in f.timings))
    deployed = [(f, s, c) for f in facts.finalists for s, c in f.newest() if "file_bytes" in c]
    batches = sorted({s["batch"] for f in facts.finalists for s, _ in f.timings})
    return {
        "version": __version__,
        "plotly": markupsafe.Markup(get_plotlyjs()),
        "job": job,
        "status": status,
        "elapsed": duration(status["finished_at"] - status["created_at"]) if status["finished_at"] else None,
        "facts": facts,
        "tiles": _tiles(facts, status),
        "front": _html(front_figure(facts.front, job)),
        "history": _html(history_figure(facts)) if len(facts.history) > 1 else None,
        "correlations": [(c, _html(correlation_figure(c))) for c in facts.correlations],
        "latency": _latency(facts, job),
        "columns": [(backend, batch) for backend in backends for batch in batches],
        "trained": any(f.training for f in facts.finalists),
        "deployed": deployed,
        "deployed_figure": _html(deployment_figure(deployed)) if deployed else None,
        "layers": [(f, table) for f in facts.finalists if (table := layer_table(job, space, f)) is not None],
        "drawings": [(f, draw(space.describe(f.row["genotype"]))) for f in facts.finalists],
        "spec": yaml.safe_dump(job.spec, sort_keys=False, width=110),
        "code": job.ledger.last_code(job.id),
        "environment": _environment(facts.finalists),
    }


def _tiles(facts: Facts, status: dict[str, Any]) -> list[tuple[str, str]]:
    tiles = [
        (str(status["evaluations"]["done"]), "evaluations"),
        (str(facts.candidates), "distinct candidates"),
        (str(len(facts.front)), "on the front"),
    ]
    for name, direction in facts.front.objectives:
        best = (max if direction == "max" else min)(row[name] for row in facts.front)
        tiles.append((number(best), f"best {name}"))
    tested = [f.training["test_accuracy"] for f in facts.finalists if f.training.get("test_accuracy") is not None]
    if tested:
        best = max(
            (f for f in facts.finalists if f.training.get("accuracy") is not None), key=lambda f: f.training["accuracy"]
        )
        tiles.append((f"{best.training['test_accuracy']:.2f} %", "test accuracy of the finalist best on validation"))
    return tiles


def _latency(facts: Facts, job: Job) -> dict[str, Any] | None:
    """How far prediction and measurement differ at the batch size that was predicted, and both fronts."""
    finalists = facts.finalists
    spec = next((e for e in job.spec["evaluators"] if e["name"] == "latency"), None)
    if spec is None:
        return None
    batch, backend = spec.get("batch", 1), spec.get("backend", "eager")
    pairs = [
        (f.predicted_ms, timing["median_ms"])
        for f in finalists
        if f.predicted_ms is not None and (timing := f.measured(backend, batch)) is not None
    ]
    if not pairs:
        return None
    objectives = facts.front.objectives
    stay = measured_front(finalists, objectives, batch, backend)
    other = next((name for name, _ in objectives if name != "latency_ms"), None)
    ranks = stats.spearmanr([p for p, _ in pairs], [m for _, m in pairs])[0] if len(pairs) > 2 else None
    errors = [100 * (predicted / measured - 1) for predicted, measured in pairs]
    return {
        "figure": _html(latency_figure(finalists, batch, backend)),
        "median": statistics.median(abs(e) for e in errors),
        "largest": max(errors, key=abs),
        "batch": batch,
        "backend": backend,
        "ranks": ranks,
        "count": len(pairs),
        "stay": stay,
        "fronts": _html(fronts_figure(finalists, other, stay, batch, backend)) if stay and other else None,
    }


def _environment(finalists: list[Finalist]) -> dict[str, Any]:
    contents = [content for f in finalists for _, content in f.timings if content.get("environment")]
    return dict(contents[-1]["environment"]) if contents else {}


def _html(figure: Any) -> markupsafe.Markup:
    return markupsafe.Markup(figure.to_html(full_html=False, include_plotlyjs=False, config={"displayModeBar": False}))
