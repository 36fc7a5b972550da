"""NAS-Bench-201 as a table to search in."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from archfront.db.dominance import hypervolume
from archfront.search.strategies.registry import STRATEGIES
from archfront.search.strategy import Ask, Problem, Results

from .driver import ToySpace, columns

EDGES = ["op_0_1", "op_0_2", "op_1_2", "op_0_3", "op_1_3", "op_2_3"]
RADIX = 5 ** np.arange(6)
REFERENCE = (20.0, 160.0)
"""Error in %, MACs in millions."""

FULL_VOLUME = 2018.704


@functools.cache
def table() -> npt.NDArray[np.float64]:
    """``(15625, 2)``: CIFAR-10 test error (%, mean of seeds) and MACs (M), by the edges' operators in base five."""
    folder = os.environ.get("ARCHFRONT_DATA")
    if not folder:
        pytest.skip("ARCHFRONT_DATA does not name the folder of the public tables")
    path = Path(folder) / "nasbench201" / "nb201_accuracy.parquet"
    if not path.is_file():
        pytest.skip(f"ARCHFRONT_DATA has no {path.parent.name}/{path.name}")
    pandas = pytest.importorskip("pandas")
    frame = pandas.read_parquet(path, columns=[*EDGES, "c10_test_200", "c10_flops_M"])
    values = np.empty((len(frame), 2))
    position = frame[EDGES].to_numpy() @ RADIX
    values[position, 0] = 100 - frame["c10_test_200"].to_numpy(dtype=np.float64)
    values[position, 1] = frame["c10_flops_M"].to_numpy(dtype=np.float64)
    return values


def search(name: str, seed: int, evaluations: int, objectives: int, batch: int, **settings: Any) -> Any:
    """Objectives ``(evaluations, objectives)`` in the order of evaluation, all of them of different cells."""
    values = table()[:, :objectives]
    problem = Problem(space=ToySpace(columns(*[5] * 6, ordered=False)), objectives=objectives, seed=seed)
    strategy = STRATEGIES.build({"name": name, **settings}, "strategy", _problem=problem)
    seen: list[npt.NDArray[np.float64]] = []
    done = 0
    for number in range(evaluations):
        if done >= evaluations:
            break
        ask = Ask(number=number, count=min(batch, evaluations - done), first=done, seed=seed)
        proposals = strategy.ask(ask)
        strategy.asked(ask, proposals)
        found = values[proposals.population @ RADIX]
        seen.append(found)
        count = len(proposals)
        strategy.tell(
            Results(
                numbers=np.arange(done, done + count),
                fidelities=proposals.fidelities,
                objectives=found,
                violations=np.zeros(count),
            )
        )
        done += count
    return np.concatenate(seen)


def regrets(name: str, seeds: int, at: list[int], batch: int = 1, **settings: Any) -> npt.NDArray[np.float64]:
    """``(seeds, len(at))`` regrets to the best test accuracy (percentage points) after so many evaluations."""
    best = table()[:, 0].min()
    runs = [search(name, seed, max(at), 1, batch, **settings)[:, 0] for seed in range(seeds)]
    return np.array([np.minimum.accumulate(run)[np.array(at) - 1] - best for run in runs])


def volumes(name: str, seeds: int, at: list[int], batch: int, **settings: Any) -> npt.NDArray[np.float64]:
    """``(seeds, len(at))`` fractions of the full front's hypervolume after so many evaluations."""
    runs = [search(name, seed, max(at), 2, batch, **settings) for seed in range(seeds)]
    return np.array([[hypervolume(run[:n], REFERENCE) / FULL_VOLUME for n in at] for run in runs])
