"""Tuning before anything is timed: every key that the cases look up, most important first, into a table to ship."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterable, Mapping
from itertools import cycle
from typing import Any

import torch
from case import Case, Tuning
from ceilings import reason
from rows import Deadline
from timing import Timer

from archfront.kernels.tuning import Setting, own_folder, slug, tune


def tune_all(cases: Iterable[Case], timer: Timer, deadline: Deadline) -> list[dict[str, Any]]:
    """A line for each key: what was kept, what the default was, what did not run, or that there was no time."""
    lines: list[dict[str, Any]] = []
    seen: set[tuple[str, str]] = set()
    for case in cases:
        for tuning in case.tunings:
            if (tuning.operator, tuning.key) in seen:
                continue
            seen.add((tuning.operator, tuning.key))
            line = {"operator": tuning.operator, "key": tuning.key, "kept": None, "default": tuning.default}
            lines.append(line | {"failures": {}, "problem": None})
            if deadline.left_s <= 0:
                lines[-1]["problem"] = "not reached"
                continue
            try:
                lines[-1] |= _tuned(case, tuning, timer)
            # A key that cannot be tuned keeps its default.
            except Exception as error:
                lines[-1]["problem"] = reason(error)
            gc.collect()
    return lines


def _tuned(case: Case, tuning: Tuning, timer: Timer) -> dict[str, Any]:
    sets = timer.inputs(lambda seed: tuning.prepare(case.values(seed)))
    runnable, failures = runnable_settings(tuning, sets[0])
    if not runnable:
        return {"failures": failures, "problem": f"no candidate runs: {next(iter(failures.values()))}"}
    torch.cuda.synchronize(timer.device)
    inputs = cycle(sets)
    kept = tune(
        tuning.operator,
        tuning.key,
        runnable,
        lambda setting: tuning.run(*next(inputs), setting),
        timer.device,
        time_ms=lambda call: timer.once(call, len(sets)),
    )
    return {"kept": kept, "failures": failures}


def runnable_settings(tuning: Tuning, arguments: tuple[Any, ...]) -> tuple[list[Setting], dict[str, str]]:
    """Candidates, the default among them, that compile and launch; and why others do not."""
    candidates = [tuning.default, *(setting for setting in tuning.candidates if setting != tuning.default)]
    runnable: list[Setting] = []
    failures: dict[str, str] = {}
    for setting in candidates:
        try:
            tuning.run(*arguments, setting)
        # Compilers of other releases refuse in ways of their own.
        except Exception as error:
            failures[json.dumps(setting)] = reason(error)
            continue
        runnable.append(setting)
    return runnable, failures


def described(lines: Iterable[Mapping[str, Any]], gpu: str) -> list[str]:
    """For a reader: how many keys, and which went wrong."""
    found = list(lines)
    kept = [line for line in found if line["kept"] is not None]
    better = [line for line in kept if line["kept"] != line["default"]]
    text = [f"Tuned {len(kept)} of {len(found)} keys, {len(better)} to other settings than the default"]
    text += [f"  {line['operator']} {line['key']}: {line['problem']}" for line in found if line["problem"]]
    refused = sum(len(line["failures"]) for line in found)
    if refused:
        text.append(f"  {refused} candidates did not run; the JSON has their reasons")
    if kept:
        text.append(f"  written to {own_folder() / (slug(gpu) + '.json')}, to ship as kernels/configs/{slug(gpu)}.json")
    return text
