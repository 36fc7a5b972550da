"""Any strategy of archfront as a searcher of Ray Tune."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ray.tune.search import Searcher

from archfront.errors import InputError
from archfront.registry import validated_arguments
from archfront.search.strategies.registry import STRATEGIES
from archfront.search.strategy import Ask, Problem, Proposals, Results, Strategy, orient
from archfront.search.tune.objectives import read_objectives
from archfront.search.tune.spaces import to_config
from archfront.spaces.registry import SPACES

_FORMAT = 1


class ArchfrontSearcher(Searcher):
    """Proposes what an archfront strategy proposes; no configuration twice.

    With the space ``choices`` a trial's configuration has one entry for each column; with any other space it is
    ``{"genotype": <JSON>}``, and ``archfront.search.tune.build(config, space)`` makes the torch module.

    ``save`` writes JSON: the questions that were asked and their answers. ``restore`` asks nothing: it tells a fresh
    strategy the same in the same order, so that it goes on as the unbroken one would.

    Args:
        space: name and arguments, as in a job file.
        strategy: name and arguments, as in a job file.
        metric: name, or names for a search of a front; trials report them.
        mode: ``min`` or ``max``, for each metric.
        seed: of everything random.

    Raises:
        InputError: something is unknown or does not fit; the message names the field and the remedy.
    """

    CKPT_FILE_TMPL = "searcher-state-{}.json"

    def __init__(
        self,
        space: Mapping[str, Any],
        strategy: Mapping[str, Any],
        metric: str | Sequence[str],
        mode: str | Sequence[str],
        seed: int = 0,
    ) -> None:
        self._objectives = read_objectives(metric, mode)
        if isinstance(metric, str) != isinstance(mode, str):
            raise InputError("mode", mode, "does not have the form of metric", "Give two names or two lists.")
        if not isinstance(seed, int) or seed < 0:
            raise InputError("seed", seed, "is no seed", "Give a whole number from 0.")
        self._arguments: dict[str, Any] = {
            "space": dict(space),
            "strategy": dict(strategy),
            "metric": metric if isinstance(metric, str) else list(metric),
            "mode": mode if isinstance(mode, str) else list(mode),
            "seed": seed,
        }
        super().__init__(metric=self._arguments["metric"], mode=self._arguments["mode"])
        self._space = SPACES.build(space, "space")
        self._strategy = self._fresh_strategy()
        self._asks: list[dict[str, Any]] = []
        self._results: list[tuple[int, list[float] | None]] = []
        self._told = 0
        self._asked = 0
        self._open: dict[str, int] = {}
        self._blocked = False

    def suggest(self, trial_id: str) -> Any:
        """The configuration of a new trial; None while the strategy waits for results, ``FINISHED`` at its end."""
        if self._blocked:
            return None if self._open else Searcher.FINISHED
        self._tell()
        ask = Ask(number=len(self._asks), count=1, first=self._asked, seed=self._arguments["seed"])
        proposals = self._strategy.ask(ask)
        genotypes = self._space.to_json(proposals.population)
        record = {
            "told": self._told,
            "trial": trial_id if genotypes else None,
            "genotypes": genotypes,
            "memory": proposals.memory,
        }
        self._note_ask(record, proposals)
        if not genotypes:
            # Nothing new until a result comes in; without any to come, the space is exhausted.
            self._blocked = True
            return None if self._open else Searcher.FINISHED
        return to_config(self._space, genotypes[0])

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Take in the end of a trial. Without all metrics, or with one that is not finite, it is a failure."""
        number = self._open.pop(trial_id, None)
        if number is None:
            return  # not ours: of a run before a restore, say
        values = [] if error or result is None else [_number(result.get(name)) for name, _ in self._objectives]
        good = bool(values) and all(math.isfinite(value) for value in values)
        self._results.append((number, orient(values, [mode for _, mode in self._objectives]) if good else None))
        self._blocked = False

    def save(self, checkpoint_path: str) -> None:
        """Write the state as JSON, whole or not at all."""
        temporary = Path(f"{checkpoint_path}.tmp")
        temporary.write_text(json.dumps(self.get_state()), encoding="utf-8")
        os.replace(temporary, checkpoint_path)

    def restore(self, checkpoint_path: str) -> None:
        """Go on from a state that ``save`` wrote.

        Raises:
            InputError: the file is none of ours, or of a searcher with other arguments.
        """
        try:
            state = json.loads(Path(checkpoint_path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, ValueError) as error:
            problem = f"cannot be read ({error})"
            raise InputError("checkpoint_path", str(checkpoint_path), problem, "Give a file of save().") from None
        self.set_state(state)

    def get_state(self) -> dict[str, Any]:
        """All that a restored searcher needs, as JSON."""
        return {"format": _FORMAT, "arguments": self._arguments, "asks": self._asks, "results": self._results}

    def set_state(self, state: dict[str, Any]) -> None:
        """Replay a state of ``get_state``.

        Raises:
            InputError: it is of a searcher with other arguments.
        """
        if not isinstance(state, dict) or state.get("format") != _FORMAT:
            raise InputError("state", type(state).__name__, "is no state of this searcher", "Give one of get_state().")
        for name, value in self._arguments.items():
            if state["arguments"][name] != value:
                saved = state["arguments"][name]
                raise InputError(name, value, f"was {saved!r} when the state was saved", "Give the same arguments.")
        ArchfrontSearcher.__init__(self, **self._arguments)
        self._results.extend((int(number), values) for number, values in state["results"])
        for record in state["asks"]:
            self._tell(record["told"])
            population = self._space.from_json(record["genotypes"])
            self._note_ask(record, self._strategy.proposals(population, record["memory"]))
        ended = {number for number, _ in self._results}
        self._open = {trial: number for trial, number in self._open.items() if number not in ended}
        last = self._asks[-1] if self._asks else None
        self._blocked = last is not None and not last["genotypes"] and last["told"] == len(self._results)

    def __getstate__(self) -> dict[str, Any]:
        # Tune pickles searchers beside its experiments. What of a strategy can be pickled differs; its state cannot.
        return self.get_state()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._arguments = state["arguments"]
        self.set_state(state)

    def _fresh_strategy(self) -> Strategy:
        config = self._arguments["strategy"]
        problem = Problem(space=self._space, objectives=len(self._objectives), seed=self._arguments["seed"])
        if "name" in config:
            cls = STRATEGIES.get(str(config["name"]), "strategy.name")
            validated_arguments(cls, {k: v for k, v in config.items() if k != "name"}, "strategy")
            cls.check(problem)
        return STRATEGIES.build(config, "strategy", _problem=problem)

    def _note_ask(self, record: dict[str, Any], proposals: Proposals) -> None:
        ask = Ask(number=len(self._asks), count=len(proposals), first=self._asked, seed=self._arguments["seed"])
        self._strategy.asked(ask, proposals)
        self._asks.append(record)
        if record["trial"] is not None:
            self._open[record["trial"]] = self._asked
        self._asked += len(proposals)

    def _tell(self, until: int | None = None) -> None:
        """Tell the strategy the results up to the ``until``-th, in the order in which they came in."""
        rows = self._results[self._told : until]
        if not rows:
            return
        missing = [math.nan] * len(self._objectives)
        results = Results(
            numbers=np.array([number for number, _ in rows], dtype=np.int64),
            fidelities=np.full(len(rows), self._strategy.problem.fidelities[0], dtype=np.int64),
            objectives=np.array([missing if values is None else values for _, values in rows], dtype=float),
            violations=np.array([math.inf if values is None else 0.0 for _, values in rows]),
        )
        self._strategy.tell(results)
        self._told += len(rows)


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan
