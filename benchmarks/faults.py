"""Prints the table of `make bench-faults`: what each fault cost, from benchmarks/faults.json."""

from __future__ import annotations

import json
from pathlib import Path

FILE = Path(__file__).with_suffix(".json")


def main() -> None:
    titles = ["fault", "committed before: short, training", "lost", "twice", "begun again", "failed"]
    titles += ["longest pause, s: short, training", "whole job, s"]
    print(f"| {' | '.join(titles)} |")
    print("|---" * len(titles) + "|")
    for record in json.loads(FILE.read_text()):
        jobs = record["jobs"]
        sums = [str(sum(job[name] for job in jobs)) for name in ("lost", "twice", "beyond", "failed")]
        pauses = ", ".join(f"{job['longest_pause_s']:.1f}" for job in jobs)
        totals = ", ".join(f"{job['total_s']:.0f}" for job in jobs)
        struck = ", ".join(str(count) for count in record.get("struck_at", ())) or "not noted"
        print(f"| {record['fault']} | {struck} | {' | '.join(sums)} | {pauses} | {totals} |")


if __name__ == "__main__":
    main()
