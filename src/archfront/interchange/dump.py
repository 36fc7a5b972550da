"""Everything that the ledger has of a job as CSV or Parquet files, one for each table, written as it is read.

``evaluations`` is the wide one: a row for each evaluation with a column for each metric. The other files are the
ledger's own tables. JSON is kept as text; times are seconds since 1970, UTC.
"""

from __future__ import annotations

import csv
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from archfront.client import Job
from archfront.db.schema import Base, Benchmark, Device, Evaluation
from archfront.db.schema import Job as JobRow
from archfront.db.walking import FIELDS, WALK_ROWS, metric_names, snapshot, walk
from archfront.interchange.registry import Written, new_folder

Row = Sequence[Any]
Fields = dict[str, type]
"""Column names with ``int``, ``float``, ``bool`` or ``str``; each may be None in a row."""

_LEFT_OUT = {"evaluations", "leases", "column_chunks"}
"""The wide table; who is at work; the packed copy of what the others hold."""


class Sink(ABC):
    """One table being written."""

    @abstractmethod
    def write(self, rows: Sequence[Row]) -> None:
        """Append rows; called any number of times."""

    @abstractmethod
    def close(self) -> None:
        """Called once, at the end."""


class CsvSink(Sink):
    """RFC 4180 with a line of names; an absent value is an empty field."""

    def __init__(self, stem: Path, fields: Fields) -> None:
        self._file: TextIO = open(stem.with_suffix(".csv"), "w", newline="", encoding="utf-8")  # noqa: SIM115
        self._writer = csv.writer(self._file)
        self._writer.writerow(fields)

    def write(self, rows: Sequence[Row]) -> None:
        self._writer.writerows(rows)

    def close(self) -> None:
        self._file.close()


class ParquetSink(Sink):
    """Parquet, a row group of some ten thousand rows at a time."""

    def __init__(self, stem: Path, fields: Fields) -> None:
        import pyarrow as pa
        from pyarrow import parquet

        kinds = {int: pa.int64(), float: pa.float64(), bool: pa.bool_(), str: pa.string()}
        self._schema = pa.schema([(name, kinds[kind]) for name, kind in fields.items()])
        self._table = pa.Table
        self._writer = parquet.ParquetWriter(stem.with_suffix(".parquet"), self._schema)
        self._rows: list[Row] = []

    def write(self, rows: Sequence[Row]) -> None:
        self._rows += rows
        if len(self._rows) >= 16 * WALK_ROWS:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        columns = [list(column) for column in zip(*self._rows, strict=True)] or [[] for _ in self._schema]
        self._writer.write_table(self._table.from_arrays(_arrays(columns, self._schema), schema=self._schema))
        self._rows = []


def export_csv(job: Job, to: str) -> Written:
    """One CSV file for each table, in a new folder."""
    return _export(job, to, CsvSink)


def export_parquet(job: Job, to: str) -> Written:
    """The same in Parquet."""
    return _export(job, to, ParquetSink)


def _export(job: Job, to: str, sink: type[CsvSink] | type[ParquetSink]) -> Written:
    counted: dict[str, int] = {}
    with new_folder(to) as folder, snapshot(job.ledger.engine) as connection:
        for name, fields, chunks in _tables(connection, job.id):
            counted[name] = 0
            table = sink(folder / name, fields)
            try:
                for rows in chunks:
                    table.write(rows)
                    counted[name] += len(rows)
            finally:
                table.close()
    others = ", ".join(f"{name} ({rows:,})" for name, rows in counted.items() if name != "evaluations")
    return Written(what=f"{counted['evaluations']:,} evaluations, and {others}", to=to)


def _tables(connection: Connection, job_id: int) -> Iterator[tuple[str, Fields, Iterator[Sequence[Row]]]]:
    yield _evaluations(connection, job_id)
    yield _own("job", connection, sa.select(JobRow).where(JobRow.id == job_id))
    for table in Base.metadata.sorted_tables:
        if "job_id" in table.columns and table.name not in _LEFT_OUT:
            query = sa.select(table).where(table.columns["job_id"] == job_id).order_by(*table.primary_key.columns)
            yield _own(table.name, connection, query)
    used = sa.select(Benchmark.device).where(Benchmark.job_id == job_id)
    yield _own("devices", connection, sa.select(Device).where(Device.digest.in_(used)))


def _evaluations(connection: Connection, job_id: int) -> tuple[str, Fields, Iterator[Sequence[Row]]]:
    columns = Evaluation.__table__.columns
    fields: Fields = {name: _kind(columns[name].type) for name in FIELDS} | {"key": str, "genotype": str}
    fields["on_front"] = bool
    metrics = metric_names(connection, job_id)
    for name, deviates in metrics:
        fields[_free(name, fields)] = float
        if deviates:
            fields[_free(f"{name}_std", fields)] = float

    def rows() -> Iterator[Sequence[Row]]:
        for chunk in walk(connection, job_id):
            made = []
            for walked in chunk:
                row = [*walked.row.values(), walked.key, json.dumps(walked.genotype), walked.on_front]
                for name, deviates in metrics:
                    metric = walked.metrics.get(name)
                    row.append(None if metric is None or math.isnan(metric.value) else metric.value)
                    if deviates:
                        row.append(None if metric is None else metric.std)
                made.append(row)
            yield made

    return "evaluations", fields, rows()


def _own(name: str, connection: Connection, query: sa.Select[Any]) -> tuple[str, Fields, Iterator[Sequence[Row]]]:
    """A table of the ledger as it is, JSON as text."""
    columns = list(query.selected_columns)
    documents = [isinstance(column.type, sa.JSON) for column in columns]

    def rows() -> Iterator[Sequence[Row]]:
        for chunk in connection.execute(query.execution_options(yield_per=WALK_ROWS)).partitions():
            yield [
                [json.dumps(v) if is_json and v is not None else v for v, is_json in zip(row, documents, strict=True)]
                for row in chunk
            ]

    return name, {str(column.key): _kind(column.type) for column in columns}, rows()


def _kind(column: Any) -> type:
    for of, kind in ((sa.Boolean, bool), (sa.Integer, int), (sa.Float, float)):
        if isinstance(column, of):
            return kind
    return str


def _free(name: str, taken: Fields) -> str:
    """A metric's name, or another one where the table has such a column already."""
    while name in taken:
        name = f"metric_{name}"
    return name


def _arrays(columns: Sequence[Sequence[Any]], schema: Any) -> list[Any]:
    import pyarrow as pa

    return [pa.array(column, type=field.type) for column, field in zip(columns, schema, strict=True)]
