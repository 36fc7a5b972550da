"""Cheap evaluations per second through the whole stack: archfront, Ray Tune with Optuna's searcher, Optuna alone.

Every candidate has 22 decisions of 9 choices (FBNet's size) and two objectives; evaluating it costs nothing. All three
run in one process after the other, on the same disk, with durable commits: SQLite in WAL mode with synchronous=FULL
for archfront and for Optuna's storage; Ray Tune as it comes, which promises less.

    python benchmarks/throughput.py [--evaluations 20000] [--peer-seconds 40] [--json benchmarks/throughput.json]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import sqlalchemy as sa
from rich.console import Console
from rich.table import Table

import archfront

DECISIONS, CHOICES, POPULATION, WORKERS = 22, 9, 50, 2
PLUGIN = Path(__file__).parent / "noop_evaluator.py"


def objectives(genotype: list[int]) -> tuple[float, float]:
    """Two conflicting sums: some arithmetic, so that fronts and selections are real."""
    return float(sum(genotype)), float(sum((c - i % CHOICES) ** 2 for i, c in enumerate(genotype)))


def run_archfront(folder: Path, evaluations: int, strategy: str, executor: str, **arguments: Any) -> dict[str, Any]:
    spec = {
        "name": strategy,
        "space": {"name": "choices", "columns": {f"x{i}": list(range(CHOICES)) for i in range(DECISIONS)}},
        "evaluators": [{"name": "no-op"}],
        "objectives": [{"metric": "a", "direction": "min"}, {"metric": "b", "direction": "min"}],
        "strategy": {"name": strategy, **arguments},
        "budget": {"evaluations": evaluations},
        "workers": {"executor": executor, "count": WORKERS if executor == "ray" else 1},
    }
    start, cpu = time.perf_counter(), time.process_time()
    job = archfront.run(spec, db=folder / f"{strategy.replace(':', '-')}-{executor}.db", plugins=[PLUGIN])
    wall = time.perf_counter() - start
    driver_ms = (time.process_time() - cpu) / evaluations * 1e3
    with job.ledger.engine.connect() as connection:
        commits = sorted(connection.execute(sa.text("SELECT finished_at FROM evaluations")).scalars())
    assert len(commits) == evaluations
    # From the first commit to the last: what a long job sees, without the seconds that Ray takes to start.
    first = commits.count(commits[0])
    steady = (evaluations - first) / max(commits[-1] - commits[0], 1e-9)
    name = f"archfront {strategy} ({executor})"
    return {"name": name, "evaluations": evaluations, "per_second": steady, "wall_s": wall, "driver_ms": driver_ms}


def run_optuna(folder: Path, seconds: float) -> dict[str, Any]:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = optuna.storages.RDBStorage(f"sqlite:///{folder}/optuna.db")

    @sa.event.listens_for(storage.engine, "connect")
    def durable(connection: Any, _record: Any) -> None:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")

    storage.engine.dispose()
    sampler = optuna.samplers.NSGAIISampler(population_size=POPULATION, seed=0)
    study = optuna.create_study(storage=storage, sampler=sampler, directions=["minimize", "minimize"])

    def objective(trial: optuna.Trial) -> tuple[float, float]:
        return objectives([trial.suggest_categorical(f"x{i}", list(range(CHOICES))) for i in range(DECISIONS)])

    start = time.perf_counter()
    study.optimize(objective, timeout=seconds)
    wall = time.perf_counter() - start
    count = len(study.trials)
    return {"name": "Optuna NSGA-II, SQLite", "evaluations": count, "per_second": count / wall, "wall_s": wall}


def run_tune(folder: Path, seconds: float, reuse_actors: bool) -> dict[str, Any]:
    import optuna
    import ray
    from ray import tune
    from ray.tune.search.optuna import OptunaSearch

    class NoOp(tune.Trainable):
        """A trial of one step."""

        def setup(self, config: dict[str, Any]) -> None:
            self.genotype = list(config.values())

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            self.genotype = list(new_config.values())
            return True

        def step(self) -> dict[str, Any]:
            a, b = objectives(self.genotype)
            return {"a": a, "b": b, "done": True}

        def save_checkpoint(self, checkpoint_dir: str) -> None:
            """Nothing to keep: the trial is done after its step. Tune asks all the same."""

        def load_checkpoint(self, checkpoint: Any) -> None:
            """Nothing was kept."""

    search = OptunaSearch(
        metric=["a", "b"],
        mode=["min", "min"],
        sampler=optuna.samplers.NSGAIISampler(population_size=POPULATION, seed=0),
    )
    tuner = tune.Tuner(
        NoOp,
        param_space={f"x{i}": tune.choice(list(range(CHOICES))) for i in range(DECISIONS)},
        tune_config=tune.TuneConfig(
            search_alg=search,
            num_samples=-1,
            time_budget_s=seconds,
            max_concurrent_trials=WORKERS,
            reuse_actors=reuse_actors,
        ),
        run_config=tune.RunConfig(storage_path=str(folder), name=f"tune-{reuse_actors}", verbose=0),
    )
    if not ray.is_initialized():
        ray.init(log_to_driver=False, logging_level="ERROR", include_dashboard=False)
    start = time.perf_counter()
    results = tuner.fit()
    wall = time.perf_counter() - start
    ends = sorted(r.metrics["timestamp"] for r in results if r.metrics and "a" in r.metrics)
    span = max(ends[-1] - ends[0], 1) if len(ends) > 1 else wall
    name = f"Ray Tune, OptunaSearch, reuse_actors={reuse_actors}"
    rate = max(len(ends) / wall, (len(ends) - 1) / span)
    return {"name": name, "evaluations": len(ends), "per_second": rate, "wall_s": wall}


def machine() -> dict[str, Any]:
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in ("archfront", "optuna", "ray", "sqlalchemy")},
    }


def repeated(run: Callable[[Path], dict[str, Any]], repeats: int) -> dict[str, Any]:
    """The run with the median rate."""
    rows = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            rows.append(run(Path(folder)))
    rate = statistics.median_low(row["per_second"] for row in rows)
    return next(row for row in rows if row["per_second"] == rate)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluations", type=int, default=20_000)
    parser.add_argument("--peer-seconds", type=float, default=40)
    parser.add_argument("--repeats", type=int, default=3, help="of archfront's runs; the median is reported")
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    n, repeats = options.evaluations, options.repeats
    rows = [
        repeated(lambda f: run_archfront(f, n, "nsga2", "ray", population=POPULATION), repeats),
        repeated(lambda f: run_archfront(f, n, "random", "ray"), repeats),
        repeated(lambda f: run_archfront(f, n, "nsga2", "inline", population=POPULATION), repeats),
        repeated(lambda f: run_archfront(f, max(n // 20, 100), "optuna:nsgaii", "ray", population_size=POPULATION), 1),
        repeated(lambda f: run_optuna(f, options.peer_seconds), 1),
        repeated(lambda f: run_tune(f, options.peer_seconds, False), 1),
        repeated(lambda f: run_tune(f, options.peer_seconds, True), 1),
    ]
    best_peer = max(row["per_second"] for row in rows if not row["name"].startswith("archfront"))
    table = Table("", "evaluations", "per second", "driver CPU ms each", "times the best peer")
    for row in rows:
        row["ratio"] = row["per_second"] / best_peer
        cpu = f"{row['driver_ms']:.3f}" if "driver_ms" in row else ""
        table.add_row(row["name"], str(row["evaluations"]), f"{row['per_second']:.1f}", cpu, f"{row['ratio']:.1f}")
    facts = machine()
    Console(width=110).print(table)
    print(f"{facts['cpu']}, {facts['cores']} cores; " + ", ".join(f"{k} {v}" for k, v in facts["packages"].items()))
    options.json.write_text(json.dumps({"machine": facts, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
