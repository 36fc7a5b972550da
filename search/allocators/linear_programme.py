"""Integer linear programme over all choices (HAWQ-V3, 2021; MixDQ, 2024), and the bound that its relaxation gives."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator, Sequence

import numpy as np
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from archfront.errors import ArchfrontError, InputError
from archfront.search.allocators.allocator import Allocation, Allocator, Evaluate
from archfront.search.allocators.problem import Problem, Vector, rounded_up
from archfront.search.allocators.tables import Ints, Tables

_OBJECTIVE_SCALE = 1e6
"""Range of the objective: HiGHS stops an absolute 1e-6 from the optimum, whatever the relative gap, and scipy does not
let one change that."""


class Milp(Allocator):
    """The least damage there is under any number of budgets, by scipy's HiGHS with gap 0."""

    name = "milp"
    is_exact = True

    def allocate(self, problem: Problem, evaluate: Evaluate | None = None) -> Allocation:
        """See the base.

        Raises:
            InputError: no policy meets all budgets at once; the message has the least that each one could be.
        """
        tables = Tables.of(problem)
        return Allocation.of(problem, problem.spread(least(tables, tables.damage).tolist()), gap=0.0)


def least(tables: Tables, objective: Vector) -> Ints:
    """The feasible choices of least ``objective`` ``(groups, choices)``.

    Raises:
        InputError: no policy meets all budgets at once.
    """
    found = _solve(tables, objective)
    if found is None:
        raise _conflict(tables)
    return found


def with_bound(tables: Tables, choices: Sequence[int], evaluations: int = 0) -> Allocation:
    """The allocation of choices of the groups; its gap is to the relaxation of the problem without floors."""
    problem = tables.problem
    spread = problem.spread(choices)
    found = Allocation.of(problem, spread, evaluations=evaluations)
    bound = relaxed(Tables.of(problem))
    above = max(found.damage - bound, 0.0)
    if above <= 1e-9 * abs(found.damage):
        gap: float | None = 0.0
    else:
        gap = above / bound if bound > 0 else None
    return Allocation.of(problem, spread, gap=gap, evaluations=evaluations)


def relaxed(tables: Tables) -> float:
    """The least damage if choices could be mixed: a lower bound for every policy; inf where even that is infeasible."""
    groups, picks = _possible(tables, tables.load)
    if len(np.unique(groups)) < len(tables):
        return float("inf")
    base, scale, values = _scaled(tables.damage[groups, picks], groups, len(tables))
    result = milp(values, bounds=Bounds(0, 1), constraints=_rows(groups, tables.load[:, groups, picks]))
    if result.status == 2:
        return float("inf")
    return base + float(result.fun) / scale if result.status == 0 else float("-inf")


def _rows(groups: Ints, loads: Vector) -> list[LinearConstraint]:
    """One choice of each group, and loads ``(budgets, variables)`` that sum to 1 at most."""
    count = len(np.unique(groups))
    one_each = sparse.csr_array((np.ones(len(groups)), (groups, np.arange(len(groups)))))
    rows = [LinearConstraint(one_each, np.ones(count), np.ones(count))]
    if len(loads):
        rows.append(LinearConstraint(sparse.csr_array(loads), -np.inf, np.ones(len(loads))))
    return rows


def _possible(tables: Tables, load: Vector) -> tuple[Ints, Ints]:
    """Groups and choices, without those that take more than all the room by themselves: loads are never negative."""
    groups, picks = np.nonzero(tables.allowed & (load <= 1.0).all(axis=0))
    return groups, picks


def _scaled(values: Vector, groups: Ints, count: int) -> tuple[float, float, Vector]:
    """What all groups cost at least, a factor, and the values above that by the factor."""
    low = np.full(count, np.inf)
    np.minimum.at(low, groups, values)
    above = values - low[groups]
    high = np.zeros(count)
    np.maximum.at(high, groups, above)
    span = float(high.sum())
    scale = _OBJECTIVE_SCALE / span if span > 0 else 1.0
    return float(low.sum()), scale, above * scale


def _solve(tables: Tables, objective: Vector, without: int | None = None) -> Ints | None:
    """The least objective under all budgets but one; None if no policy meets them."""
    rows = [b for b in range(len(tables.budgets)) if b != without]
    load = tables.load[rows]
    groups, picks = _possible(tables, load)
    count = len(tables)
    if len(np.unique(groups)) < count:
        return None
    _, _, values = _scaled(objective[groups, picks], groups, count)
    loads = load[:, groups, picks]
    constraints = _rows(groups, loads)
    while True:
        with _stdout_kept_clean():
            result = milp(
                values,
                integrality=np.ones(len(groups), dtype=np.int64),
                bounds=Bounds(0, 1),
                constraints=constraints,
                options={"mip_rel_gap": 0.0},
            )
        if result.status == 2:
            return None
        if result.status != 0 or result.x is None:
            raise ArchfrontError(f"The integer programme was not solved: {result.message}")
        weights = np.zeros(tables.allowed.shape)
        weights[groups, picks] = result.x
        choices = np.asarray(weights.argmax(axis=1), dtype=np.int64)
        taken = load[:, np.arange(count), choices]
        over = np.flatnonzero(taken.sum(axis=1) > 1.0)
        if not len(over):
            return choices
        # HiGHS allows 1e-6 of the room beyond it. No policy that costs as much in every group is feasible.
        cover = (loads[over[0]] >= taken[over[0]][groups]).astype(np.float64)
        constraints.append(LinearConstraint(sparse.csr_array(cover[None]), -np.inf, np.array([count - 1.0])))


@contextlib.contextmanager
def _stdout_kept_clean() -> Iterator[None]:
    """What C code prints goes to stderr meanwhile.

    HiGHS 1.12, scipy 1.17's, leaves a line of its own in stdout now and then, told to be silent or not (its issue
    2783); at the end of a command that prints JSON it would be part of that.
    """
    if sys.platform == "win32":
        yield
        return
    flush = ctypes.CDLL(None).fflush
    try:
        stdout = os.dup(1)
    except OSError:  # closed
        yield
        return
    sys.stdout.flush()
    flush(None)
    os.dup2(2, 1)
    try:
        yield
    finally:
        flush(None)
        os.dup2(stdout, 1)
        os.close(stdout)


def _conflict(tables: Tables) -> InputError:
    needs = {}
    for number, name in enumerate(tables.budgets):
        found = _solve(tables, np.where(tables.allowed, tables.load[number], np.inf), without=number)
        if found is not None:
            needs[name] = tables.cost(number, found)
    listed = "; ".join(f"{name} {rounded_up(value)} or more" for name, value in needs.items())
    text = "cannot be met together"
    if listed:
        text += f". With the others as they are it would take {listed}"
    budgets = {name: tables.problem.budgets[name] for name in tables.budgets}
    return InputError("budgets", budgets, text, "Raise one of them." if listed else "Raise several of them.")
