"""Everything that a ledger says of a job, times aside: to compare two jobs row for row."""

import json
from typing import Any

import sqlalchemy as sa

from archfront.db.ledger import Ledger

_TABLES = {
    "asks": (
        "SELECT number, told, first, count, source, memory, predictor FROM asks WHERE job_id = :job ORDER BY number"
    ),
    "predictors": (
        "SELECT pairs, version, evaluator, CAST(state AS TEXT) FROM predictors WHERE job_id = :job ORDER BY pairs"
    ),
    "evaluations": (
        "SELECT number, ask, key, genotype, fidelity, repeat, state, seq, attempts, violation, worker, error "
        "FROM evaluations JOIN candidates ON candidates.id = candidate_id WHERE job_id = :job ORDER BY number"
    ),
    "metrics": (
        "SELECT number, name, value, std, provenance, predictor, device FROM metrics WHERE job_id = :job "
        "ORDER BY number, name"
    ),
    "attempts": (
        "SELECT number, attempt, kind, message, worker FROM attempts WHERE job_id = :job ORDER BY number, attempt"
    ),
    "front_members": (
        "SELECT fidelity, number, entered_seq, left_seq FROM front_members WHERE job_id = :job "
        "ORDER BY fidelity, number, entered_seq"
    ),
    "column_chunks": ("SELECT first_seq, last_seq, names FROM column_chunks WHERE job_id = :job ORDER BY first_seq"),
}


def dump(ledger: Ledger, job_id: int) -> dict[str, list[tuple[Any, ...]]]:
    with ledger.engine.connect() as connection:
        return {
            name: [tuple(row) for row in connection.execute(sa.text(query), {"job": job_id})]
            for name, query in _TABLES.items()
        }


def differences(first: dict[str, list[tuple[Any, ...]]], second: dict[str, list[tuple[Any, ...]]]) -> list[str]:
    """The first row that differs in each table, in words."""
    found = []
    for name in first:
        if first[name] == second[name]:
            continue
        pairs = zip(first[name], second[name], strict=False)
        index = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first[name]), len(second[name])))
        rows = [json.dumps(rows[index : index + 1], default=str)[:400] for rows in (first[name], second[name])]
        found.append(f"{name}: {len(first[name])} and {len(second[name])} rows; row {index}: {rows[0]} / {rows[1]}")
    return found
