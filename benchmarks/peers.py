"""Optuna and Ray Tune on the same problem as ``noop_job``, with commits as durable as archfront's where they can be."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from noop_job import CHOICES, DECISIONS, objectives

from archfront.db.connection import parse_url

WORKERS = 2


def optuna_storage(url: str) -> Any:
    """Optuna's storage: ``journal:PATH``, or a database at archfront's own durability.

    A journal's every append is flushed and fsync'ed by Optuna 5 itself. SQLite is set to WAL with synchronous=FULL;
    PostgreSQL commits synchronously as it comes.
    """
    import optuna
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if url.startswith("journal:"):
        backend = JournalFileBackend(url.removeprefix("journal:"))
        return optuna.storages.JournalStorage(backend)
    storage = optuna.storages.RDBStorage(parse_url(url).render_as_string(hide_password=False))
    if url.startswith("sqlite"):

        @sa.event.listens_for(storage.engine, "connect")
        def durable(connection: Any, _record: Any) -> None:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=FULL")

        storage.engine.dispose()
    return storage


def run_optuna(name: str, url: str, population: int, seconds: float) -> dict[str, Any]:
    """NSGA-II for some seconds: trials a second over the whole run, in one process as Optuna does it."""
    import optuna

    sampler = optuna.samplers.NSGAIISampler(population_size=population, seed=0)
    study = optuna.create_study(storage=optuna_storage(url), sampler=sampler, directions=["minimize", "minimize"])

    def objective(trial: optuna.Trial) -> tuple[float, float]:
        return objectives([trial.suggest_categorical(f"x{i}", list(range(CHOICES))) for i in range(DECISIONS)])

    start, cpu = time.perf_counter(), time.process_time()
    study.optimize(objective, timeout=seconds)
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    count = len(study.get_trials(deepcopy=False))
    row = {"name": f"Optuna NSGA-II, {name}", "evaluations": count, "per_second": count / wall, "wall_s": wall}
    return row | {"driver_ms": cpu / max(count, 1) * 1e3}


def run_tune(folder: Path, population: int, seconds: float, reuse_actors: bool) -> dict[str, Any]:
    """Ray Tune with Optuna's searcher, as it comes: it promises less than a commit for each result."""
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
        sampler=optuna.samplers.NSGAIISampler(population_size=population, seed=0),
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
        ray.init(address="local", log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
    start = time.perf_counter()
    results: Any = tuner.fit()
    wall = time.perf_counter() - start
    ends = sorted(r.metrics["timestamp"] for r in results if r.metrics and "a" in r.metrics)
    # The better of the whole run and of the time between the first and the last trial: start-up is nobody's fault.
    span = max(ends[-1] - ends[0], 1) if len(ends) > 1 else wall
    rate = max(len(ends) / wall, (len(ends) - 1) / span)
    name = f"Ray Tune, OptunaSearch, reuse_actors={reuse_actors}"
    return {"name": name, "evaluations": len(ends), "per_second": rate, "wall_s": wall}
