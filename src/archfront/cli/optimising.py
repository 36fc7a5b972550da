"""The command for the commonest wish: optimize."""

from __future__ import annotations

import json as jsons
from pathlib import Path
from typing import Annotated, Any

import typer

from archfront.cli.benching import LOCAL_CPU, measured, named_backends, served_backends
from archfront.cli.common import EXIT_DONE, AsJson, Database, console, errors, print_json
from archfront.cli.running import follow
from archfront.client import DEFAULT_DB, Job
from archfront.db.queries import find_evaluation
from archfront.errors import InputError


def optimize(
    model: Annotated[
        str | None,
        typer.Argument(
            help="A timm name, exported weights, package.module:function, or a mapping in YAML.", show_default=False
        ),
    ] = None,
    data: Annotated[str | None, typer.Option(help="A data set's name, or a mapping.")] = None,
    weights: Annotated[str | None, typer.Option(help="A checkpoint of the model, where it is none itself.")] = None,
    max_drop: Annotated[float, typer.Option(help="Points of accuracy that may be lost.")] = 0.5,
    latency_ms: Annotated[float | None, typer.Option(help="For one sample, at most.")] = None,
    model_mb: Annotated[float | None, typer.Option(help="MiB of packed weights, at most.")] = None,
    device: Annotated[str, typer.Option(help="local-cpu (or cpu) or cuda:N.")] = LOCAL_CPU,
    backends: Annotated[
        str | None, typer.Option(help="Commas between them; those installed that run what is written, if unset.")
    ] = None,
    evaluations: Annotated[int, typer.Option(min=1, help="Policies to try.")] = 100,
    workers: Annotated[int, typer.Option(min=1, help="That try them.")] = 2,
    job: Annotated[str | None, typer.Option(help="Go on with this job, which optimize began.")] = None,
    to: Annotated[Path, typer.Option(help="Folder for the result.")] = Path("optimized"),
    db: Database = DEFAULT_DB,
    json: AsJson = False,
) -> None:
    """Make a trained network faster or smaller on this machine: search, measure, and write it as a file."""
    from archfront.db.ledger import Ledger
    from archfront.evaluators.latency.device import check_device
    from archfront.optimise import Wish, best, optimising_job, write_files
    from archfront.report.page import write_report
    from archfront.search.driver import submit

    wish = Wish(max_drop=max_drop, latency_ms=latency_ms, model_mb=model_mb)
    shown = errors if json else console

    def say(line: str) -> None:
        shown.print(line, highlight=False, markup=False, soft_wrap=True)

    if job is None:
        for field, given in (("MODEL", model), ("--data", data)):
            if given is None:
                raise InputError(field, None, "is missing", "Give it, or --job of an optimize that was interrupted.")
        assert model is not None
        assert data is not None
        place = check_device(LOCAL_CPU if device == "cpu" else device)
        spec, plugins = optimising_job(
            model, data, wish, weights=weights, evaluations=evaluations, workers=workers,
            backends=named_backends(backends) or _backends(place), device=place,
        )  # fmt: skip
        ledger = Ledger.open(db)
        found = Job(ledger, submit(ledger, spec, plugins))
        to.mkdir(parents=True, exist_ok=True)
        for plugin in plugins:
            (to / plugin.name).write_text(plugin.source)
        found.plugins = [to / plugin.name for plugin in plugins]
    else:
        found = Job(db, job)
        found.plugins = [to / "factory.py"] if (to / "factory.py").exists() else []
        if found.state == "cancelled":
            raise InputError("--job", job, "was cancelled for good", "Start anew.")
    if found.state != "done":
        say(f"If this is interrupted, go on with: archfront optimize --job {found.id} --to {to} --db {db}")
        follow(found, db, shown, accept=True)
    # The job may have been measured at other batch sizes too, by bench.
    rows = [row for row in measured(found) if row["batch"] == 1]
    with found.ledger.engine.connect() as connection:
        sizes = {
            number: float(find_evaluation(connection, found.id, str(number))["metrics"]["model_mb"])
            for number in {row["evaluation"] for row in rows}
        }
    choice = best(rows, sizes, wish)
    to.mkdir(parents=True, exist_ok=True)
    report = to / "report.html"
    write_report(found, report)
    result: dict[str, Any] = {"job": found.id, "report": str(report)}
    if choice is None:
        result |= {"found": False, "tried": rows}
        words = "Nothing better was found within the limits"
        say(f"{words}: {_nearest(rows)} Allow more with --max-drop, or see {report}.")
    else:
        files_written = write_files(found, choice, to)
        facts = {key: value for key, value in choice.row.items() if key != "error"}
        result |= {
            "found": True,
            "speedup": choice.speedup,
            "model_mb": choice.model_mb,
            **facts,
            "files": files_written,
        }
        base = choice.row["baseline"]
        say(
            f"{choice.speedup:.2f} times as fast: {choice.row['median_ms']:.3f} ms by {choice.row['backend']}, against "
            f"{base['median_ms']:.3f} ms of the network itself by {base['backend']}, its fastest in float32. "
            f"{choice.row['test_accuracy_drop']:.2f} ± {choice.row['test_accuracy_drop_std']:.2f} points lost on test "
            f"data ({choice.row['test_accuracy']:.2f} % right), {choice.row['file_bytes'] / 1e6:.2f} MB. "
            f"Written to {files_written['model']}; report: {report}."
        )
    (to / "result.json").write_text(jsons.dumps(result, indent=2))
    if json:
        print_json(result)
    raise typer.Exit(EXIT_DONE)


def _nearest(rows: list[dict[str, Any]]) -> str:
    """What came nearest, in words."""
    whole = [row for row in rows if not row["error"] and row.get("baseline") and "accuracy_drop" in row]
    if not whole:
        return "no finalist could be measured."
    row = min(whole, key=lambda row: row["median_ms"])
    return (
        f"the fastest finalist ({row['backend']}) takes {row['median_ms']:.3f} ms where the network itself takes "
        f"{row['baseline']['median_ms']:.3f}, and loses {row['accuracy_drop']:.2f} points on validation data."
    )


def _backends(device: str) -> list[Any]:
    """Those of a device whose result can be written as it was measured, and what the network itself is fastest on."""
    served = served_backends(policies=True, device=device)
    # Files of torch's own are a fallback where ONNX Runtime is not installed.
    torch_files = {"pt2e", "torch-int8-dynamic"} if "onnx-int8" in served else set()
    return [name for name in served if name not in torch_files]
