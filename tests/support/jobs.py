"""Small jobs for tests."""

from typing import Any

COLUMNS = {f"c{i}": [1, 2, 3, 4] for i in range(8)}


def synthetic_job(evaluations: int = 60, **changes: Any) -> dict[str, Any]:
    """A job on the synthetic evaluator. ``changes`` replace whole sections, but ``evaluator`` and ``workers``,
    whose keys they update."""
    evaluator = {"name": "synthetic"} | changes.pop("evaluator", {})
    workers = {"executor": "inline", "count": 1} | changes.pop("workers", {})
    return {
        "name": "synthetic",
        "space": {"name": "choices", "columns": COLUMNS},
        "evaluators": [evaluator],
        "objectives": [{"metric": "gain", "direction": "max"}, {"metric": "cost", "direction": "min"}],
        "strategy": {"name": "nsga2", "population": 12},
        "budget": {"evaluations": evaluations},
        "workers": workers,
        "seed": 7,
    } | changes
