"""A job as TensorBoard event files: one run for each fidelity, its metrics in the order of their commits.

A scalar's step is the evaluation's place among the job's commits (``seq``), its time that of the commit. TensorBoard
keeps values as float32: the exact ones are in the ledger and in the CSV and Parquet exports.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from archfront.client import Job
from archfront.db.columns import load_columns
from archfront.db.queries import front_history, job_objectives
from archfront.db.schema import FrontMember
from archfront.db.walking import snapshot, walk
from archfront.interchange.registry import Written, new_folder
from archfront.report.facts import hypervolume_history

if TYPE_CHECKING:
    from tensorboardX.event_file_writer import EventsWriter

_MOST_STAYS = 2000
"""A front with a longer history gets its size drawn, not its hypervolume, whose cost grows with the square of it."""


def export_events(job: Job, to: str) -> Written:
    """Write ``metrics/NAME``, ``front/size`` and ``front/hypervolume`` to a new folder.

    The hypervolume is the report's: relative to the box of all feasible values at that fidelity.

    Raises:
        InputError: the folder is taken.
    """
    count = 0
    with new_folder(to) as folder, snapshot(job.ledger.engine) as connection, ExitStack() as stack:
        histories = _histories(connection, job)
        single = len(histories) < 2
        runs: dict[int, EventsWriter] = {}
        sizes: Counter[int] = Counter()
        for chunk in walk(connection, job.id, by="seq"):
            for walked in chunk:
                fidelity, seq = int(walked.row["fidelity"]), int(walked.row["seq"])
                if fidelity not in runs:
                    runs[fidelity] = _run(folder if single else folder / f"fidelity-{fidelity}")
                    stack.callback(runs[fidelity].close)
                values = {f"metrics/{n}": m.value for n, m in walked.metrics.items() if m.value == m.value}
                _write(runs[fidelity], seq, walked.row["finished_at"], values)
                count += len(values)
                change, volumes = histories.get(fidelity, (Counter(), {}))
                if seq in change:
                    sizes[fidelity] += change[seq]
                    front = {"front/size": float(sizes[fidelity])}
                    if seq in volumes:
                        front["front/hypervolume"] = volumes[seq]
                    _write(runs[fidelity], seq, walked.row["finished_at"], front)
    return Written(what=f"{count:,} values in {max(len(runs), 1)} runs", to=to)


def _histories(connection: Connection, job: Job) -> dict[int, tuple[Counter[int], Mapping[int, float]]]:
    """For each fidelity with a front: by how much it grows at a seq, and its hypervolume from then on."""
    levels = connection.execute(sa.select(FrontMember.fidelity).where(FrontMember.job_id == job.id).distinct())
    found: dict[int, tuple[Counter[int], Mapping[int, float]]] = {}
    columns = None
    for level in sorted(levels.scalars()):
        stays = front_history(connection, job.id, level)
        change: Counter[int] = Counter()
        for _, entered, left in stays:
            change[entered] += 1
            if left is not None:
                change[left] -= 1
        volumes: Iterable[tuple[int, float]] = ()
        if len(stays) <= _MOST_STAYS:
            columns = load_columns(connection, job.id) if columns is None else columns
            volumes = hypervolume_history(columns, stays, job_objectives(job.spec), level)
        found[level] = (change, dict(volumes))
    return found


def _run(folder: Path) -> EventsWriter:
    # Without the queue and the thread of its SummaryWriter, which hold at most ten events.
    from tensorboardX.event_file_writer import EventsWriter

    folder.mkdir(exist_ok=True)
    return EventsWriter(str(folder / "events"))


def _write(run: EventsWriter, step: int, moment: float, values: Mapping[str, float]) -> None:
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.proto.summary_pb2 import Summary

    if values:
        scalars = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        run.write_event(Event(wall_time=moment, step=step, summary=Summary(value=scalars)))
