"""Any run of Ray Tune in the ledger."""

import json
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import archfront
from archfront.db.dominance import nondominated_ranks
from archfront.errors import InputError
from archfront.search.tune import LedgerCallback
from archfront.search.tune.callback import numeric, plain

COUNT = 12


def trainable(config: dict[str, Any]) -> None:
    """Somebody's own: three results, the error falling; one configuration fails after its first."""
    from ray import tune

    for step in range(1, 4):
        tune.report({"error": config["x"] / step, "size": 10 - config["x"], "nested": {"lr": 0.5}, "note": "text"})
        if config["x"] == 4:
            raise RuntimeError("no x may be 4")


def recorded(tmp_path: Path, *, every_result: bool) -> archfront.Job:
    from ray import tune

    callback = LedgerCallback(
        tmp_path / "archfront.db", "theirs", ["error", "size"], ["min", "min"], every_result=every_result
    )
    tuner = tune.Tuner(
        trainable,
        param_space={"x": tune.grid_search(list(range(COUNT))), "layers": {"kind": "conv", "sizes": [3, 5]}},
        tune_config=tune.TuneConfig(max_concurrent_trials=2, reuse_actors=True),
        run_config=tune.RunConfig(name="theirs", storage_path=str(tmp_path / "tune"), callbacks=[callback], verbose=0),
    )
    tuner.fit()
    assert callback.job_id is not None
    return archfront.Job(tmp_path / "archfront.db", callback.job_id)


def rows(job: archfront.Job) -> list[Any]:
    with job.ledger.engine.connect() as connection:
        return list(
            connection.exec_driver_sql(
                "SELECT evaluations.number, state, fidelity, error, genotype, worker, duration_s FROM evaluations "
                "JOIN candidates ON candidates.id = candidate_id ORDER BY number"
            )
        )


def metrics(job: archfront.Job) -> dict[int, dict[str, float]]:
    found: dict[int, dict[str, float]] = {}
    with job.ledger.engine.connect() as connection:
        for number, name, value in connection.exec_driver_sql("SELECT number, name, value FROM metrics"):
            found.setdefault(number, {})[name] = value
    return found


def front(job: archfront.Job, fidelity: int) -> set[int]:
    with job.ledger.engine.connect() as connection:
        query = f"SELECT number FROM front_members WHERE left_seq IS NULL AND fidelity = {fidelity}"
        return {int(row[0]) for row in connection.exec_driver_sql(query)}


def test_each_trial_is_an_evaluation(tmp_path: Path, ray_address: str) -> None:
    job = recorded(tmp_path, every_result=False)
    assert job.state == "done"
    found = rows(job)
    assert Counter(row.state for row in found) == {"done": COUNT - 1, "failed": 1}
    values = metrics(job)
    for row in found:
        config = row.genotype if isinstance(row.genotype, dict) else json.loads(row.genotype)
        assert config["layers"] == {"kind": "conv", "sizes": [3, 5]}
        if config["x"] == 4:
            assert row.state == "failed"
            assert "no x may be 4" in row.error
            continue
        assert values[row.number]["error"] == config["x"] / 3
        assert values[row.number]["nested/lr"] == 0.5
        assert not {"note", "pid", "trial_id"} & set(values[row.number])
        assert row.duration_s >= 0
        assert ":" in row.worker
    done = [row.number for row in found if row.state == "done"]
    points = np.array([[values[n]["error"], values[n]["size"]] for n in done])
    best = {n for n, rank in zip(done, nondominated_ranks(points), strict=True) if rank == 0}
    assert front(job, 0) == best


def test_each_result_is_an_evaluation(tmp_path: Path, ray_address: str) -> None:
    job = recorded(tmp_path, every_result=True)
    found = rows(job)
    assert Counter((row.state, row.fidelity) for row in found) == {
        ("done", 1): COUNT,
        ("done", 2): COUNT - 1,
        ("done", 3): COUNT - 1,
        ("failed", 2): 1,
    }
    assert len(front(job, 3)) == COUNT - 1  # less error is bought with size, so nothing is dominated


def test_a_state_of_the_tuner_is_pickled_without_the_ledger(tmp_path: Path) -> None:
    callback = LedgerCallback(tmp_path / "archfront.db", "theirs", "error", "min")
    callback.setup()
    again = pickle.loads(pickle.dumps(callback))
    callback.on_experiment_end([])
    assert again.job_id == callback.job_id
    again.setup()
    again.on_experiment_end([])
    assert again.job_id != callback.job_id


@pytest.mark.parametrize(
    ("metric", "mode", "words"),
    [
        ("pid", "min", "metric: 'pid' is no metric of a trial"),
        ("seq", "min", "metric: 'seq' is no metric of a trial"),
        (["a", "b"], "min", "does not fit 2 metrics"),
        ("a", "down", "mode: 'down' is no direction"),
        ([], [], "names no metric"),
    ],
)
def test_wrong_objectives_are_named(tmp_path: Path, metric: Any, mode: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        LedgerCallback(tmp_path / "archfront.db", "theirs", metric, mode)
    assert not (tmp_path / "archfront.db").exists()


def test_what_json_and_a_database_can_hold() -> None:
    assert plain({"a": (1, np.float32(0.5)), "b": np.int64(3), "c": float("nan"), 4: "x\0"}) == {
        "a": [1, 0.5], "b": 3, "c": "nan", "4": "x\\0",
    }  # fmt: skip
    assert numeric({"a": np.float32(2), "b": True, "c": "x", "d": {"e": 1}, "fidelity": 3, "pid": 4}) == {
        "a": 2.0, "d/e": 1.0,
    }  # fmt: skip
