"""The command that measures finalists: bench."""

from __future__ import annotations

from typing import Annotated, Any, get_args

import typer

from archfront.cli.common import EXIT_DONE, AsJson, Database, JobReference, PluginFiles, console, print_json
from archfront.client import DEFAULT_DB, Job
from archfront.errors import InputError, suggestion

LOCAL_CPU = "local-cpu"
"""As in ``evaluators.latency.device``, which loads torch."""
_ON_GPUS = ("eager", "compile")


def bench(
    job: JobReference = "last",
    candidates: Annotated[
        list[str] | None,
        typer.Argument(metavar="[CANDIDATE]...", help="Evaluation numbers, or beginnings of keys.", show_default=False),
    ] = None,
    finalists: Annotated[
        int, typer.Option(min=1, help="How many members of the front, spread over it, where no candidate is named.")
    ] = 3,
    backends: Annotated[
        str | None, typer.Option(help="Commas between them; all that serve here and are installed if unset.")
    ] = None,
    batches: Annotated[str, typer.Option(help="Batch sizes, commas between them.")] = "1",
    where: Annotated[str | None, typer.Option(help="What finalists must hold, e.g. accuracy_drop <= 0.5.")] = None,
    device: Annotated[
        str | None, typer.Option(help="local-cpu or cuda:N; that of the job's latency, or local-cpu, if unset.")
    ] = None,
    db: Database = DEFAULT_DB,
    plugin: PluginFiles = None,
    json: AsJson = False,
) -> None:
    """Measure candidates of a finished job on this machine, on every backend, against the network uncompressed."""
    from archfront.search.job import Finalists

    found = Job(db, job, plugins=plugin or [])
    found.refuse_recorded()
    if found.state != "done":
        raise InputError("JOB", job, f"is {found.state}", "Let it come to its end first: archfront resume.")
    place = _device(found, device)
    plan = Finalists(
        count=finalists,
        backends=_backends(found, backends, place),
        batches=_numbers("--batches", batches),
        where=where,
        device=place,
    )
    found.resume(
        bench=plan,
        candidates=candidates or [],
        accept_changes=lambda _: True,
        announce=lambda line: None if json else console.print(line, highlight=False, markup=False, soft_wrap=True),
    )
    rows = measured(found, place)
    if json:
        print_json(rows)
    else:
        _show(rows)
    raise typer.Exit(EXIT_DONE)


def measured(job: Job, device: str = LOCAL_CPU) -> list[dict[str, Any]]:
    """The newest figure of each candidate, backend, batch and number of threads on a device: ``evaluation``,
    ``backend``, ``batch``, ``threads``, ``median_ms``, ``low_ms``, ``high_ms``, ``error``, the ``baseline`` and what is
    known of the file, or of the ``layers`` that run on kernels."""
    newest: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in job.ledger.benchmarks(job.id):
        if row["kind"] == "latency" and row["settings"].get("device", LOCAL_CPU) == device:
            kept = {k: v for k, v in row["content"].items() if k not in ("samples_ms", "environment", "notes", "calls")}
            settings = row["settings"]
            newest[row["number"], *settings.values()] = {"evaluation": row["number"], **settings, **kept}
    return sorted(newest.values(), key=lambda row: (row["batch"], row["evaluation"], row["median_ms"] or 0.0))


def _show(rows: list[dict[str, Any]]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("evaluation", "backend"):
        table.add_column(column)
    for column in ("batch", "ms", "times as fast", "points lost: validation", "test", "file MB"):
        table.add_column(column, justify="right")
    for row in rows:
        base = row.get("baseline")
        table.add_row(
            str(row["evaluation"]), row["backend"], str(row["batch"]),
            "failed" if row["error"] else f"{row['median_ms']:.3f}",
            "" if row["error"] or not base else f"{base['median_ms'] / row['median_ms']:.2f}",
            f"{row['accuracy_drop']:.2f}" if "accuracy_drop" in row else "",
            f"{row['test_accuracy_drop']:.2f}" if "test_accuracy_drop" in row else "",
            f"{row['file_bytes'] / 1e6:.2f}" if "file_bytes" in row else "",
        )  # fmt: skip
    console.print(table)
    bases = {
        (row["batch"], row["baseline"]["backend"], row["baseline"]["median_ms"]) for row in rows if "baseline" in row
    }
    for batch, backend, median in sorted(bases):
        console.print(
            f"batch {batch}: the network itself takes {median:.3f} ms on its fastest backend, {backend}",
            highlight=False,
        )


def _device(job: Job, given: str | None) -> str:
    """In full: the one that is asked for, or that of the job's latency.

    Raises:
        InputError: it is not there.
    """
    if given is not None:
        from archfront.evaluators.latency.device import check_device

        return check_device(given)
    return next((e["device"] for e in job.spec["evaluators"] if e["name"] == "latency" and "device" in e), LOCAL_CPU)


def _backends(job: Job, given: str | None, device: str) -> list[Any]:
    """Those that are named, or all that serve.

    Raises:
        InputError: an unknown one, or one that does not run on the device.
    """
    from archfront.export import space_of
    from archfront.search.job import GPU_BACKENDS
    from archfront.spaces.policies.policy_chain import has_policies

    named = named_backends(given)
    for name in named:
        if device == LOCAL_CPU and name in GPU_BACKENDS:
            raise InputError("--backends", name, "needs a GPU", "Give --device cuda:0, or other backends.")
        if device != LOCAL_CPU and name not in _ON_GPUS and name not in GPU_BACKENDS:
            known = ", ".join((*_ON_GPUS, *GPU_BACKENDS))
            raise InputError("--backends", name, f"does not run on {device}", f"Known there: {known}.")
    return named or served_backends(policies=has_policies(space_of(job)), device=device)


def named_backends(given: str | None) -> list[Any]:
    """Backends that an option names; none if it is unset.

    Raises:
        InputError: an unknown one.
    """
    from archfront.search.job import Backend

    names = [] if given is None else [name.strip() for name in given.split(",")]
    for name in names:
        if name not in get_args(Backend):
            raise InputError("--backends", name, "is unknown", suggestion(name, get_args(Backend)))
    return names


def served_backends(*, policies: bool, device: str = LOCAL_CPU) -> list[Any]:
    """Backends of a device that are installed, and serve policies or other candidates."""
    from archfront.search.job import GPU_BACKENDS, Backend

    if device != LOCAL_CPU:
        return [name for name in (*_ON_GPUS, *GPU_BACKENDS) if policies or not name.startswith("triton")]
    return [name for name in get_args(Backend) if name not in GPU_BACKENDS and _serves(name, policies)]


def _serves(backend: str, policies: bool) -> bool:
    """Whether a backend is installed, and serves such candidates."""
    from importlib.util import find_spec
    from platform import machine

    if backend == "pt2e":  # torchao's quantiser and Inductor's fused operators are x86's
        return policies and machine() in ("x86_64", "AMD64") and find_spec("torchao") is not None
    if backend == "torch-int8-dynamic":
        return policies
    if backend.startswith("openvino"):
        return policies and all(find_spec(name) is not None for name in ("openvino", "onnxscript"))
    if backend.startswith("onnx"):
        return (policies or backend == "onnx") and all(find_spec(n) is not None for n in ("onnxruntime", "onnxscript"))
    return True


def _numbers(option: str, text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and 0 < int(part) < 2**20 for part in parts):
        raise InputError(option, text, "is no list of batch sizes", "Write e.g. 1,8.")
    return [int(part) for part in parts]
