"""All finished evaluations of a job as one float64 matrix: packed chunks for the bulk, rows for the newest.

A chunk is written in the transaction whose commit fills it, so it can never be newer or older than the rows. Each has
a digest; one that does not match is read from the rows instead.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from archfront.db.schema import ColumnChunk, Evaluation, MetricRow
from archfront.db.selecting import fetched

CHUNK_ROWS = 4096
FIXED = ("seq", "number", "fidelity", "done", "violation", "finished_at")
"""The columns of every matrix; the metrics follow by name. ``done`` is 1, or 0 for failed and cancelled ones."""

Matrix = npt.NDArray[np.float64]


@dataclass
class Columns:
    """Finished evaluations in the order of their ``seq``.

    Attributes:
        matrix: ``(n, len(names))``, NaN where unknown; column after column in memory, so that one is read alone.
    """

    names: list[str]
    matrix: Matrix

    def __len__(self) -> int:
        return len(self.matrix)

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def __getitem__(self, name: str) -> Matrix:
        return self.matrix[:, self.names.index(name)]

    @property
    def metrics(self) -> list[str]:
        return self.names[len(FIXED) :]

    def rows(self, chosen: npt.NDArray[Any]) -> Columns:
        """Those of a mask or of indices."""
        return Columns(self.names, self.matrix[chosen])


def pack(names: Sequence[str], matrix: Matrix) -> tuple[bytes, str]:
    """The bytes of a chunk (row-major little-endian float64) and their digest with the names."""
    data = np.ascontiguousarray(matrix, dtype="<f8").tobytes()
    return data, _digest(names, data)


def load_columns(connection: Connection, job_id: int) -> Columns:
    """Everything that a job has finished."""
    parts: list[tuple[list[str], Matrix]] = []
    last_seq = 0
    chunks = _chunks(connection, job_id)
    # Most of the time of a large job's columns, and hashing leaves Python's lock.
    with ThreadPoolExecutor() as threads:
        digests = threads.map(lambda chunk: _digest(chunk[2], chunk[3]), chunks)
    for (first, last_seq, names, data, digest), found in zip(chunks, digests, strict=True):
        if found == digest:
            parts.append((list(names), np.frombuffer(data, dtype="<f8").reshape(-1, len(names))))
        else:
            parts.append(read_rows(connection, job_id, first, last_seq))
    parts.append(read_rows(connection, job_id, last_seq + 1))
    return _joined(parts)


def _chunks(connection: Connection, job_id: int) -> Sequence[Any]:
    """first_seq, last_seq, names, data, digest of a job's chunks in order."""
    columns = (ColumnChunk.first_seq, ColumnChunk.last_seq, ColumnChunk.names, ColumnChunk.data, ColumnChunk.digest)
    query = sa.select(*columns).where(ColumnChunk.job_id == job_id).order_by(ColumnChunk.first_seq)
    return fetched(connection, query)


def read_rows(
    connection: Connection, job_id: int, first_seq: int, last_seq: int | None = None
) -> tuple[list[str], Matrix]:
    """The same matrix from the rows of ``evaluations`` and ``metrics``; slower, always true."""
    within = (Evaluation.job_id == job_id) & (Evaluation.seq >= first_seq)
    if last_seq is not None:
        within &= Evaluation.seq <= last_seq
    fixed = connection.execute(
        sa.select(
            Evaluation.seq,
            Evaluation.number,
            Evaluation.fidelity,
            Evaluation.state == "done",
            Evaluation.violation,
            Evaluation.finished_at,
        )
        .where(within)
        .order_by(Evaluation.seq)
    ).all()
    metrics = connection.execute(
        sa.select(MetricRow.number, MetricRow.name, MetricRow.value)
        .join(Evaluation, (Evaluation.job_id == MetricRow.job_id) & (Evaluation.number == MetricRow.number))
        .where(within)
    ).all()
    names = [*FIXED, *sorted({name for _, name, _ in metrics})]
    matrix = np.full((len(fixed), len(names)), np.nan)
    if fixed:
        matrix[:, : len(FIXED)] = np.array([[np.nan if v is None else v for v in row] for row in fixed], dtype=float)
    position = {row[1]: i for i, row in enumerate(fixed)}
    column = {name: i for i, name in enumerate(names)}
    for number, name, value in metrics:
        matrix[position[number], column[name]] = np.nan if value is None else value
    return names, matrix


def check_chunks(connection: Connection, job_id: int) -> list[str]:
    """What is wrong with a job's chunks, in words; empty if each equals the rows."""
    wrong = []
    for chunk in connection.execute(sa.select(ColumnChunk).where(ColumnChunk.job_id == job_id)):
        names, matrix = read_rows(connection, job_id, chunk.first_seq, chunk.last_seq)
        stored = Columns(list(chunk.names), np.frombuffer(chunk.data, dtype="<f8").reshape(-1, len(chunk.names)))
        same = set(names) <= set(stored.names) and all(
            np.array_equal(stored[name], matrix[:, i], equal_nan=True) for i, name in enumerate(names)
        )
        if not same or _digest(chunk.names, chunk.data) != chunk.digest:
            wrong.append(f"job {job_id}: the packed columns {chunk.first_seq}..{chunk.last_seq} differ from the rows")
    return wrong


def to_matrix(rows: Iterable[dict[str, Any]], names: Sequence[str]) -> Matrix:
    """Rows given as mappings, in the order of ``names``."""
    return np.array([[row.get(name, np.nan) for name in names] for row in rows], dtype=float).reshape(-1, len(names))


def _digest(names: Sequence[str], data: bytes) -> str:
    digest = hashlib.blake2b(json.dumps(list(names)).encode(), digest_size=16)
    digest.update(data)
    return digest.hexdigest()


def _joined(parts: list[tuple[list[str], Matrix]]) -> Columns:
    names = list(FIXED)
    for part_names, _ in parts:
        names += [name for name in part_names if name not in names]
    joined = np.empty((sum(len(matrix) for _, matrix in parts), len(names)), order="F")
    start = 0
    for part_names, matrix in parts:
        rows = joined[start : start + len(matrix)]
        if part_names == names:
            rows[:] = matrix
        else:
            rows[:] = np.nan
            rows[:, [names.index(name) for name in part_names]] = matrix
        start += len(matrix)
    return Columns(names, joined)
