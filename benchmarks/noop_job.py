"""The job of the throughput benchmarks: FBNet's 22 decisions of 9 choices, two objectives, evaluations for nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

DECISIONS, CHOICES = 22, 9
PLUGIN = Path(__file__).parent / "noop_evaluator.py"


def objectives(genotype: list[int]) -> tuple[float, float]:
    """Two conflicting sums: some arithmetic, so that fronts and selections are real."""
    return float(sum(genotype)), float(sum((c - i % CHOICES) ** 2 for i, c in enumerate(genotype)))


def noop_job(
    evaluations: int, strategy: dict[str, Any], executor: str, workers: int = 1, evaluator: str = "no-op"
) -> dict[str, Any]:
    """A job file."""
    return {
        "name": strategy["name"],
        "space": {"name": "choices", "columns": {f"x{i}": list(range(CHOICES)) for i in range(DECISIONS)}},
        "evaluators": [{"name": evaluator}],
        "objectives": [{"metric": "a", "direction": "min"}, {"metric": "b", "direction": "min"}],
        "strategy": strategy,
        "budget": {"evaluations": evaluations},
        "workers": {"executor": executor, "count": workers},
    }
