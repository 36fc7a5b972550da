"""Promise 3: the front in the database equals brute force after every commit."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ledger_rows import ask, done, failed

from archfront.db.front import IncrementalFront
from archfront.db.ledger import Ledger
from archfront.db.queries import FrontQuery, front, seq_of
from archfront.db.records import FinishedRecord
from archfront.db.schema import FrontMember
from archfront.db.writer import JobWriter

NAMES = ["a", "b", "c", "d"]


def brute_force(rows: list[tuple[int, int, list[float], float]]) -> set[int]:
    """Numbers of the front at the highest fidelity; rows are (number, fidelity, point, violation)."""
    top = max((fidelity for _, fidelity, _, _ in rows), default=None)
    alive = [(n, p) for n, f, p, violation in rows if f == top and violation == 0]
    return {n for n, p in alive if not any(all(x <= y for x, y in zip(q, p, strict=True)) and q != p for _, q in alive)}


def open_job(path: Path, objectives: int) -> tuple[Ledger, int, JobWriter]:
    ledger = Ledger.open(f"sqlite:///{path}")
    spec = {"objectives": [{"metric": m, "direction": "min"} for m in NAMES[:objectives]]}
    job = ledger.create_job("front", spec, "s" * 32)
    return ledger, job, ledger.writer(job, ledger.begin_run(job, {}), [(m, 1) for m in NAMES[:objectives]])


def stored(ledger: Ledger, job: int) -> set[int]:
    with ledger.engine.connect() as connection:
        return {row["evaluation"] for row in front(connection, job, FrontQuery())}


def commit_one(writer: JobWriter, number: int, record: Callable[[int], FinishedRecord], fidelity: int) -> None:
    writer.commit([ask(number, number, 1, fidelity=fidelity)], [record(number)])


@pytest.mark.parametrize("objectives", [1, 2, 3, 4])
def test_every_commit_leaves_the_exact_front(tmp_path: Path, objectives: int) -> None:
    """Inserts at random fidelities (promotions), on a coarse grid (ties, duplicates), some infeasible or failed."""
    rng = np.random.default_rng(objectives)
    ledger, job, writer = open_job(tmp_path / "front.db", objectives)
    rows: list[tuple[int, int, list[float], float]] = []
    history: list[set[int]] = []
    number = 0
    while number < 320:
        size = int(rng.integers(1, 4))
        finished = []
        numbers = list(range(number, number + size))
        levels = [int(rng.choice([1, 3, 9], p=[0.7, 0.2, 0.1])) if number > 60 else 1 for _ in numbers]
        for n, level in zip(numbers, levels, strict=True):
            if rng.random() < 0.1:
                finished.append(failed(n, fidelity=level))
                continue
            point = rng.integers(0, 6, size=objectives).astype(float).tolist()
            violation = float(rng.random() < 0.2)
            metrics = dict(zip(NAMES, point, strict=False))
            finished.append(done(n, metrics, fidelity=level, violation=violation))
            rows.append((n, level, point, violation))
        writer.commit([ask(number, number, size, fidelity=levels)], finished)
        number += size
        expected = brute_force(rows)
        assert stored(ledger, job) == expected
        history.append(expected)
    # The history of the stored front is the fronts that were: at every committed evaluation, by the rows until then.
    with ledger.engine.connect() as connection:
        for n in range(0, number, 29):
            seq = seq_of(connection, job, n)
            past = {row["evaluation"] for row in front(connection, job, FrontQuery(seq=seq))}
            assert past == brute_force([row for row in rows if row[0] <= n])


points = st.integers(1, 4).flatmap(
    lambda m: st.lists(
        st.tuples(st.lists(st.integers(0, 4).map(float), min_size=m, max_size=m), st.booleans()), max_size=40
    )
)


@given(points)
@settings(max_examples=150, deadline=None)
def test_incremental_front_equals_brute_force(rows: list[tuple[list[float], bool]]) -> None:
    """5,000 and more inserts over all examples, in batches cut at random places."""
    if not rows:
        return
    tracked = IncrementalFront(len(rows[0][0]))
    members: set[int] = set()
    start = 0
    for i, (_, cut) in enumerate(rows):
        if not cut and i + 1 < len(rows):
            continue
        batch = np.array([point for point, _ in rows[start : i + 1]])
        for change in tracked.insert(list(range(start, i + 1)), list(range(start, i + 1)), batch):
            (members.add if change.entered else members.remove)(change.number)
        start = i + 1
        assert members == brute_force([(n, 0, point, 0.0) for n, (point, _) in enumerate(rows[: i + 1])])
        assert members == set(tracked.numbers.tolist())


@pytest.mark.slow
@pytest.mark.parametrize("objectives", [1, 2, 3, 4])
@given(seed=st.integers(0, 2**32))
@settings(max_examples=1, deadline=None, suppress_health_check=list(HealthCheck))
def test_five_thousand_inserts_in_the_database(
    tmp_path_factory: pytest.TempPathFactory, objectives: int, seed: int
) -> None:
    """5,000 random inserts and promotions, the stored front held against brute force after every one: against every
    member of the last front each time, against all rows now and then."""
    rng = np.random.default_rng(seed)
    ledger, job, writer = open_job(tmp_path_factory.mktemp("front") / "front.db", objectives)
    rows: list[tuple[int, int, list[float], float]] = []
    members: dict[int, list[float]] = {}
    top = 0
    for number in range(5000):
        level = int(rng.choice([1, 3, 9], p=[0.9, 0.08, 0.02])) if number > 1000 else 1
        if rng.random() < 0.05:
            # An objective that was not finite: the engine commits it as failed.
            commit_one(writer, number, partial(failed, fidelity=level), level)
        else:
            point = np.round(rng.random(objectives) * 12).tolist()
            violation = float(rng.random() < 0.2)
            metrics = dict(zip(NAMES, point, strict=False))
            record = partial(done, metrics=metrics, fidelity=level, violation=violation)
            commit_one(writer, number, record, level)
            rows.append((number, level, point, violation))
            if level > top:
                top, members = level, {}
            if level == top and violation == 0:
                together = [*((n, top, p, 0.0) for n, p in members.items()), rows[-1]]
                alive = brute_force(together)
                members = {n: p for n, _, p, _ in together if n in alive}
        with ledger.engine.connect() as connection:
            present = sa.select(FrontMember.number).where(FrontMember.fidelity == top, FrontMember.left_seq.is_(None))
            assert set(connection.execute(present).scalars()) == set(members)
        if number % 500 == 499:
            assert set(members) == brute_force(rows) == stored(ledger, job)


def test_members_leave_and_the_ledger_remembers_when(ledger: Ledger, job: int, writer: JobWriter) -> None:
    writer.commit([ask(0, 0, 3)], [done(0, {"gain": 1.0, "cost": 5.0}), done(1, {"gain": 2.0, "cost": 5.0})])
    assert stored(ledger, job) == {1}
    writer.commit([], [done(2, {"gain": 2.0, "cost": 4.0})])
    assert stored(ledger, job) == {2}
    with ledger.engine.connect() as connection:
        stays = connection.execute(sa.select(FrontMember.number, FrontMember.entered_seq, FrontMember.left_seq)).all()
    assert sorted(map(tuple, stays)) == [(0, 1, 2), (1, 2, 3), (2, 3, None)]
