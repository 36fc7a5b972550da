"""The Triton operators on this machine: are they right, how fast, and how near to what the card allows.

    PYTHONPATH=src python benchmarks/kernels/run.py [--correctness] [--tune] [--configs FOLDER] [--minutes 9]

Needs torch and triton alone. Without a GPU it tries everything on tiny shapes, and its times mean nothing.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attention_cases
import ceilings
import correctness
import depthwise_cases
import evonorm_cases
import int8_cases
import linear_checks
import other_checks
import quantise_cases
import sparse_cases
import sparse_checks
import token_cases
import torch
import tuned
import weight_cases
from case import Case
from correctness import Check
from facts import card_state, facts
from goals import verdicts
from printing import operator_table, table, write_json
from rows import Bench, Deadline, by_priority
from timing import timer_for

CASES: tuple[Callable[[torch.device], Iterator[Case]], ...] = (
    int8_cases.cases,
    weight_cases.cases,
    attention_cases.cases,
    token_cases.cases,
    sparse_cases.cases,
    depthwise_cases.cases,
    evonorm_cases.cases,
    quantise_cases.cases,
)
CHECKS: tuple[Callable[[torch.device], Iterator[Check]], ...] = (
    linear_checks.checks,
    sparse_checks.checks,
    other_checks.checks,
)
# Of all minutes, as long as measurements follow.
_SHARES = {"correctness": 0.4, "tuning": 0.5}
# Between looks at the card's clocks, each of which takes a while.
_LOOK_S = 30


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="OP", help="operators whose name contains one of these")
    parser.add_argument("--quick", action="store_true", help="the most important shapes, few samples")
    parser.add_argument("--correctness", action="store_true", help="check against float64 first; exit 1 if any fails")
    parser.add_argument("--no-timing", action="store_true", help="stop after checking and tuning")
    parser.add_argument("--tune", action="store_true", help="tune first, and write the table to --configs")
    parser.add_argument("--configs", type=Path, help="folder of the table of settings to use and to write")
    parser.add_argument("--warm", action="store_true", help="one input again and again, left in the cache")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="compiled baselines; only on GPUs")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="a GPU where there is one")
    parser.add_argument("--minutes", type=float, default=9.0, help="stop in time, least important shapes left out")
    parser.add_argument("--json", type=Path, default=Path(__file__).with_name("figures.json"))
    return parser.parse_args()


def main() -> None:
    chosen = options()
    deadline = Deadline.after(chosen.minutes)
    if chosen.configs is not None:
        os.environ["ARCHFRONT_KERNEL_CONFIGS"] = str(chosen.configs)
    device = torch.device(chosen.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if chosen.tune and device.type != "cuda":
        sys.exit("--tune: needs a GPU")
    content: dict[str, Any] = {"machine": facts(device), "options": {k: str(v) for k, v in vars(chosen).items()}}
    for name, value in content["machine"].items():
        print(f"{name}: {value}")
    content |= {"card": [card_state()], "rows": [], "not_reached": [], "correctness": [], "tuning": []}
    print(f"card: {content['card'][0]}\n", flush=True)
    if device.type == "cpu":
        print("No GPU: tiny shapes and the eager twins; times, floors and goals below say nothing.\n")

    if chosen.correctness:
        _check(content, chosen, device, deadline)
    timer = timer_for(device, quick=chosen.quick)
    cases = by_priority(case for source in CASES for case in source(device) if wanted(case.operator, chosen.only))
    if chosen.quick and device.type != "cpu":
        cases = [case for case in cases if case.priority == 0]
    if chosen.tune:
        share = 1.0 if chosen.no_timing else _SHARES["tuning"]
        content["tuning"] = tuned.tune_all(cases, timer, Deadline.after(share * deadline.left_s / 60))
        print("\n".join(tuned.described(content["tuning"], content["machine"]["gpu"])), flush=True)
        write_json(chosen.json, content)
    if not chosen.no_timing:
        found = ceilings.measure(timer)
        content["ceilings"] = found._asdict()
        print(table("Measured ceilings", ("of", "rate", "with"), ceilings.described(found)), flush=True)
        compiling = device.type == "cuda" if chosen.compile is None else chosen.compile
        why = None if compiling else "not compiled: --compile was not given, and this is no GPU"
        _time(content, chosen, cases, Bench(timer, found, why, chosen.warm), deadline)
    content["card"].append(card_state())
    write_json(chosen.json, content)
    print(f"card: {content['card'][-1]}\nwritten to {chosen.json}")
    if any(line["state"] == "failed" for line in content["correctness"]):
        sys.exit("some checks failed")


def wanted(operator: str, only: list[str] | None) -> bool:
    return only is None or any(part in operator for part in only)


def _check(content: dict[str, Any], chosen: argparse.Namespace, device: torch.device, deadline: Deadline) -> None:
    share = 1.0 if chosen.no_timing and not chosen.tune else _SHARES["correctness"]
    checks = (check for source in CHECKS for check in source(device) if wanted(check.operator, chosen.only))
    content["correctness"] = correctness.run_all(checks, Deadline.after(share * deadline.left_s / 60))
    rows, failed = correctness.described(content["correctness"])
    columns = ("against float64", "passed", "failed", "not reached", "largest error / gate")
    print("\n".join([table("Correctness", columns, rows), *failed, ""]), flush=True)
    write_json(chosen.json, content)


def _time(
    content: dict[str, Any], chosen: argparse.Namespace, cases: list[Case], bench: Bench, deadline: Deadline
) -> None:
    looked = time.monotonic()
    for case in cases:
        if deadline.left_s <= 0:
            content["not_reached"].append(f"{case.operator}: {case.shape}")
            continue
        try:
            content["rows"] += bench.rows(case, deadline)
        # After some errors a GPU serves this process no more; what was measured before is still printed.
        except Exception as error:
            content["not_reached"].append(f"{case.operator}: {case.shape} ({ceilings.reason(error)})")
        if time.monotonic() - looked > _LOOK_S:
            content["card"].append(card_state())
            looked = time.monotonic()
        content["goals"] = [verdict._asdict() for verdict in verdicts(content["rows"])]
        # One case holds gigabytes of inputs.
        gc.collect()
        write_json(chosen.json, content)
    rows = content["rows"]
    for operator in dict.fromkeys(row["operator"] for row in rows):
        print(operator_table(operator, [row for row in rows if row["operator"] == operator]))
    if content["not_reached"]:
        print(f"Not reached, {len(content['not_reached'])} cases: " + "; ".join(content["not_reached"]) + "\n")
    print(table("Goals", ("goal", "", ""), verdicts(rows)))


if __name__ == "__main__":
    main()
