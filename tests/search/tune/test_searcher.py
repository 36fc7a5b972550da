"""archfront's strategies as searchers of Ray Tune."""

import json
import pickle
from pathlib import Path
from typing import Any

import moocore
import numpy as np
import pytest

from archfront.errors import InputError
from archfront.search.tune import ArchfrontSearcher, build

COLUMNS = {f"c{i}": [0, 1, 2, 3, 4] for i in range(10)}
SMALL: dict[str, Any] = {"name": "choices", "columns": {"a": [0, 1, 2, 3, 4], "b": ["x", "y", "z"]}}
STRATEGIES = [
    {"name": "nsga2", "population": 6},
    {"name": "random"},
    {"name": "regularized-evolution"},
    {"name": "optuna:tpe"},
]


def searcher(strategy: dict[str, Any], space: dict[str, Any] = SMALL) -> ArchfrontSearcher:
    return ArchfrontSearcher(space=space, strategy=strategy, metric=["loss", "size"], mode=["min", "max"], seed=3)


def result(config: dict[str, Any]) -> dict[str, Any]:
    return {"loss": config["a"] ** 2, "size": config["a"] - ord(config["b"]), "pid": 7}


def go_on(searching: ArchfrontSearcher, start: int, end: int) -> list[Any]:
    """Two trials under way at a time; every fifth fails."""
    proposed = []
    for i in range(start, end):
        config = searching.suggest(f"t{i}")
        proposed.append(config)
        if i >= 1 and isinstance(proposed[-1], dict):
            last = proposed[-2] if len(proposed) > 1 else None
            if last is not None:
                searching.on_trial_complete(f"t{i - 1}", result(last), error=i % 5 == 4)
    return proposed


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda s: s["name"])
def test_a_restored_searcher_goes_on_as_an_unbroken_one(tmp_path: Path, strategy: dict[str, Any]) -> None:
    whole = searcher(strategy)
    before = go_on(whole, 0, 8)
    whole.save(str(tmp_path / "state.json"))
    pickled = pickle.dumps(whole)
    assert set(json.loads((tmp_path / "state.json").read_text())) == {"format", "arguments", "asks", "results"}
    restored = searcher(strategy)
    restored.restore(str(tmp_path / "state.json"))
    # The trial that was under way when the state was saved ends after it.
    for one in (whole, restored):
        one.on_trial_complete("t7", result(before[-1]))
    expected = go_on(whole, 8, 15)
    assert all(isinstance(config, dict) for config in before + expected)
    assert go_on(restored, 8, 15) == expected
    unpickled = pickle.loads(pickled)
    unpickled.on_trial_complete("t7", result(before[-1]))
    assert go_on(unpickled, 8, 15) == expected


def test_nothing_twice_and_then_finished() -> None:
    searching = searcher({"name": "nsga2", "population": 6})
    seen = []
    for i in range(15):
        config = searching.suggest(str(i))
        seen.append((config["a"], config["b"]))
        if i < 14:
            searching.on_trial_complete(str(i), result(config))
    assert len(set(seen)) == 15
    # One trial is under way, and its result could bring something new.
    assert searching.suggest("more") is None
    searching.on_trial_complete("14", error=True)
    assert searching.suggest("more") == ArchfrontSearcher.FINISHED


def test_failures_are_told_as_failures() -> None:
    searching = searcher({"name": "random"})
    configs = [searching.suggest(str(i)) for i in range(4)]
    searching.on_trial_complete("0", result(configs[0]))
    searching.on_trial_complete("1", result(configs[1]) | {"loss": float("nan")})
    searching.on_trial_complete("2", {"loss": 1.0})
    searching.on_trial_complete("3", result(configs[3]), error=True)
    searching.on_trial_complete("unknown", result(configs[0]))
    good = result(configs[0])
    assert searching.get_state()["results"] == [(0, [good["loss"], -good["size"]]), (1, None), (2, None), (3, None)]


def test_other_spaces_give_the_genotype_and_a_module() -> None:
    space = {"name": "fbnet-tiny"}
    searching = ArchfrontSearcher(space=space, strategy={"name": "random"}, metric="acc", mode="max")
    config = searching.suggest("t")
    assert set(config) == {"genotype"}
    assert sum(p.numel() for p in build(config, space).parameters()) > 100


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"strategy": {"name": "nsga3"}}, "strategy.name: 'nsga3' is not a known strategy"),
        ({"strategy": {"name": "nsga2", "populaton": 3}}, "strategy.populaton"),
        ({"space": {"name": "choice"}}, "Did you mean 'choices'"),
        ({"mode": "lowest"}, "mode: 'lowest' is no direction"),
        ({"metric": ["a", "b"], "mode": ["min"]}, "does not fit 2 metrics"),
        ({"metric": ["a", "a"], "mode": ["min", "min"]}, "names a metric twice"),
        ({"metric": ["a"]}, "does not have the form of metric"),
        ({"seed": -1}, "seed: -1 is no seed"),
    ],
)
def test_wrong_arguments_are_named(changes: dict[str, Any], words: str) -> None:
    arguments: dict[str, Any] = {"space": SMALL, "strategy": {"name": "random"}, "metric": "loss", "mode": "min"}
    with pytest.raises(InputError, match=words):
        ArchfrontSearcher(**arguments | changes)


def test_a_state_of_another_searcher_is_refused(tmp_path: Path) -> None:
    searcher({"name": "random"}).save(str(tmp_path / "state.json"))
    with pytest.raises(InputError, match=r"strategy: .*nsga2.* was .*random"):
        searcher({"name": "nsga2"}).restore(str(tmp_path / "state.json"))
    (tmp_path / "state.json").write_text("no JSON")
    with pytest.raises(InputError, match="cannot be read"):
        searcher({"name": "random"}).restore(str(tmp_path / "state.json"))


def objectives(config: dict[str, Any]) -> dict[str, float]:
    """Zero-max and ones-max with weights: conflicting, and random configurations lie far from the front."""
    values = [config[name] for name in COLUMNS]
    return {
        "first": float(sum(v * v for v in values)),
        "second": float(sum((v - 4) ** 2 + 3 * (v % 2) for v in values)),
    }


def trainable(config: dict[str, Any]) -> dict[str, float]:
    return objectives(config)


def volume(points: list[dict[str, float]]) -> float:
    return float(moocore.hypervolume(np.array([[p["first"], p["second"]] for p in points]), ref=[200, 200]))


def test_a_tuner_finds_a_better_front_than_random(tmp_path: Path, ray_address: str) -> None:
    from ray import tune

    count = 60
    search = ArchfrontSearcher(
        space={"name": "choices", "columns": COLUMNS},
        strategy={"name": "nsga2", "population": 10},
        metric=["first", "second"],
        mode=["min", "min"],
        seed=1,
    )
    tuner = tune.Tuner(
        tune.with_resources(trainable, {"cpu": 1}),
        tune_config=tune.TuneConfig(search_alg=search, num_samples=count, reuse_actors=True, max_concurrent_trials=1),
        run_config=tune.RunConfig(name="searcher", storage_path=str(tmp_path), verbose=0),
    )
    found = [r.metrics or {} for r in tuner.fit()]
    assert len(found) == count
    assert (tmp_path / "searcher").is_dir()
    states = list((tmp_path / "searcher").glob("searcher-state-*.json"))
    assert len(json.loads(states[0].read_text())["results"]) == count
    ours = volume(found)
    rng = np.random.default_rng(0)
    drawn = [
        volume([objectives(dict(zip(COLUMNS, row, strict=True))) for row in rng.integers(0, 5, (count, len(COLUMNS)))])
        for _ in range(20)
    ]
    assert ours > max(drawn)
