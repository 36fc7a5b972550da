"""Exact accounts of a job that was disturbed: what was committed stays, nothing twice, the budget to the evaluation."""

import json
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError

from archfront.db.connection import open_engine
from archfront.db.dominance import nondominated

_SEEN = """SELECT e.number, e.seq, e.state, string_agg(m.name || '=' || m.value::text, ' ' ORDER BY m.name)
FROM evaluations e LEFT JOIN metrics m ON m.job_id = e.job_id AND m.number = e.number
WHERE e.job_id = :job AND e.seq > :seq GROUP BY e.job_id, e.number, e.seq, e.state"""
_LOOK_S = 0.25


class Witness:
    """Notes from outside what the ledger says is committed, all the time: whoever was told so must find it later."""

    def __init__(self, url: str) -> None:
        self._engine = open_engine(url, create=False)
        self._seen: dict[int, dict[int, tuple[Any, ...]]] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def follow(self, job: int) -> None:
        self._seen.setdefault(job, {})

    def close(self) -> None:
        self._over.set()
        self._thread.join()
        self._engine.dispose()

    def lost(self, job: int) -> list[tuple[Any, ...]]:
        """What was seen committed and is not there as it was."""
        now = {row[0]: row for row in self._rows(job, 0)}
        return [row for number, row in self._seen[job].items() if now.get(number) != row]

    def count(self, job: int) -> int:
        """How many evaluations of a job are committed; -1 if the database does not answer."""
        found = self._ask("SELECT count(*) FROM evaluations WHERE job_id = :job AND seq IS NOT NULL", job)
        return -1 if found is None else int(found)

    def state(self, job: int) -> str | None:
        """Of a job; None if the database does not answer."""
        found = self._ask("SELECT state FROM jobs WHERE id = :job", job)
        return None if found is None else str(found)

    def _ask(self, query: str, job: int) -> Any:
        try:
            with self._engine.connect() as connection:
                return connection.execute(sa.text(query), {"job": job}).scalar_one()
        except SQLAlchemyError:
            return None

    def _watch(self) -> None:
        while not self._over.wait(_LOOK_S):
            for job, seen in list(self._seen.items()):
                last = max((row[1] for row in seen.values()), default=0)
                try:
                    rows = self._rows(job, last)
                except SQLAlchemyError:
                    continue
                seen.update({row[0]: row for row in rows})

    def _rows(self, job: int, seq: int) -> list[tuple[Any, ...]]:
        with self._engine.connect() as connection:
            return [tuple(row) for row in connection.execute(sa.text(_SEEN), {"job": job, "seq": seq})]


@dataclass(kw_only=True)
class Account:
    """What became of a job.

    Attributes:
        lost: committed results that are not there any more.
        twice: committed more than once, or numbers that are missing or too many.
        beyond: evaluations that were begun more often than the ledger's attempts explain.
        failed: evaluations that ended without a result.
        longest_pause_s: between two commits.
    """

    job: int
    budget: int
    lost: int
    twice: int
    beyond: int
    failed: int
    longest_pause_s: float
    total_s: float


def account(url: str, job: int, budget: int, witness: Witness, log: Path) -> Account:
    """The account of a finished job; asserts what must hold whatever happened."""
    engine = open_engine(url, create=False)
    with engine.connect() as connection:

        def rows(query: str) -> list[Any]:
            return list(connection.execute(sa.text(query), {"job": job}))

        evaluations = rows(
            "SELECT number, seq, state, attempts, candidate_id, fidelity, repeat, violation, finished_at "
            "FROM evaluations WHERE job_id = :job ORDER BY number"
        )
        metrics = rows("SELECT number, name, value FROM metrics WHERE job_id = :job")
        spec = rows("SELECT spec, state FROM jobs WHERE id = :job")[0]
        asks = rows("SELECT number, first, count, told FROM asks WHERE job_id = :job ORDER BY number")
        members = rows("SELECT fidelity, number FROM front_members WHERE job_id = :job AND left_seq IS NULL")
        tried = rows("SELECT count(*) FROM attempts WHERE job_id = :job AND attempt > 0")[0][0]
    engine.dispose()
    assert spec.state == "done", spec.state
    assert all(row.state in ("done", "failed") for row in evaluations)
    numbers = [row.number for row in evaluations]
    wrong = len(set(range(budget)) ^ set(numbers)) + len(numbers) - len(set(numbers))
    wrong += sum(count - 1 for count in Counter((r.candidate_id, r.fidelity, r.repeat) for r in evaluations).values())
    assert sorted(row.seq for row in evaluations) == list(range(1, len(evaluations) + 1))
    # Every ask begins where the one before ended.
    assert [ask.first for ask in asks] == np.cumsum([0, *(ask.count for ask in asks)])[:-1].tolist()
    _assert_front(spec.spec, evaluations, metrics, members)
    begun = Counter(int(line) for line in log.read_text().split())
    assert set(begun) >= {row.number for row in evaluations if row.state == "done"}
    ends = sorted(row.finished_at for row in evaluations)
    return Account(
        job=job,
        budget=budget,
        lost=len(witness.lost(job)),
        twice=wrong,
        beyond=begun.total() - budget - tried,
        failed=sum(row.state == "failed" for row in evaluations),
        longest_pause_s=max(np.diff(ends), default=0.0),
        total_s=ends[-1] - ends[0],
    )


def _assert_front(spec: Any, evaluations: list[Any], metrics: list[Any], members: list[Any]) -> None:
    """The stored front of each fidelity is that of brute force."""
    spec = json.loads(spec) if isinstance(spec, str) else spec
    values: dict[int, dict[str, float]] = {}
    for row in metrics:
        values.setdefault(row.number, {})[row.name] = row.value
    for fidelity in {row.fidelity for row in evaluations}:
        done = [r for r in evaluations if r.fidelity == fidelity and r.state == "done" and r.violation == 0]
        points = np.array(
            [
                [(-1 if o["direction"] == "max" else 1) * values[r.number][o["metric"]] for o in spec["objectives"]]
                for r in done
            ]
        ).reshape(len(done), -1)
        expected = {r.number for r, member in zip(done, nondominated(points), strict=True) if member}
        assert {m.number for m in members if m.fidelity == fidelity} == expected


def settled(witness: Witness, job: int, at_least: int, timeout_s: float) -> float:
    """Wait until so many evaluations are committed. Returns the seconds that it took."""
    start = time.monotonic()
    while witness.count(job) < at_least:
        if time.monotonic() - start > timeout_s:
            raise TimeoutError(f"job {job}: {witness.count(job)} of {at_least} evaluations within {timeout_s:g} s")
        time.sleep(0.1)
    return time.monotonic() - start
