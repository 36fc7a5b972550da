from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from archfront.errors import InputError
from archfront.evaluators import checkpoints
from archfront.evaluators.datasets import load
from archfront.evaluators.evaluator import Evaluated, EvaluationContext, Task
from archfront.evaluators.registry import EVALUATORS
from archfront.evaluators.training import Training, train_finalist
from archfront.evaluators.training_loop import Run, augmented
from archfront.evaluators.training_recipe import Recipe
from archfront.spaces.choices import Choices
from archfront.spaces.fbnet import FBNetTiny

SPACE = FBNetTiny(layers=6, head_channels=32)
GENOTYPE = ["k3_e3", "skip", "k5_e1_g2", "skip", "k3_e1", "skip"]
DATA = {"name": "digits", "validation": 0.2, "test": 0.6}


def task(fidelity: int, seed: int = 7, repeat: int = 0) -> Task:
    key = SPACE.keys(SPACE.from_json([GENOTYPE]))[0].hex()
    return Task(number=0, genotype=GENOTYPE, key=key, fidelity=fidelity, repeat=repeat, seed=seed)


def context(files: Path | str | None = None) -> EvaluationContext:
    return EvaluationContext(space=SPACE, data=DATA, threads=1, files=None if files is None else str(files))


def evaluated(training: Training, fidelity: int, where: EvaluationContext, **changes: Any) -> Evaluated:
    [result] = training.evaluate([task(fidelity, **changes)], where)
    assert isinstance(result, Evaluated), result
    return result


def tensors(uri: str | None) -> dict[str, torch.Tensor]:
    assert uri is not None
    return checkpoints.read(uri, {})[0]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_continuing_equals_an_unbroken_run_bit_for_bit(tmp_path: Path, optimizer: Any) -> None:
    """Weights, batch norm statistics, optimizer state and metrics; the runs in between must leave no trace."""
    rate = 0.1 if optimizer == "sgd" else 3e-3
    training = Training(fidelities=[2, 5], optimizer=optimizer, learning_rate=rate)
    whole = evaluated(training, 5, context(tmp_path / "whole"))
    evaluated(training, 2, context(tmp_path / "other"), seed=9)
    torch.manual_seed(123)
    short = evaluated(training, 2, context(tmp_path / "steps"))
    continued = evaluated(training, 5, context(tmp_path / "steps"))
    assert continued.metrics == whole.metrics
    assert short.metrics != whole.metrics
    one, other = tensors(whole.checkpoint), tensors(continued.checkpoint)
    assert one.keys() == other.keys()
    assert any(name.startswith("optimizer/") for name in one)
    assert any("running_var" in name for name in one)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert evaluated(training, 5, context()).metrics == whole.metrics


def test_the_checkpoint_is_really_used(tmp_path: Path) -> None:
    training = Training(fidelities=[2, 5])
    short = evaluated(training, 2, context(tmp_path))
    whole = evaluated(training, 5, context())
    assert short.checkpoint is not None
    content, metadata = checkpoints.read(short.checkpoint, {})
    assert metadata["epochs"] == "1"
    name = next(name for name in content if name.startswith("model/") and name.endswith("classifier.weight"))
    checkpoints.write(short.checkpoint, {**content, name: content[name] + 0.5}, metadata)
    assert evaluated(training, 5, context(tmp_path)).metrics != whole.metrics


def test_without_a_good_checkpoint_it_starts_again(tmp_path: Path) -> None:
    training = Training(fidelities=[2, 4])
    whole = evaluated(training, 4, context()).metrics
    uri = evaluated(training, 2, context(tmp_path)).checkpoint
    assert uri is not None
    path = Path(uri)
    content = path.read_bytes()
    good, metadata = checkpoints.read(uri, {})
    lacking = {name: t for name, t in good.items() if not name.startswith("optimizer/")}
    other_shape = {name: torch.zeros(3) if name.startswith("optimizer/0") else t for name, t in good.items()}
    for damage in (content[: len(content) // 2], b"", b"\xff" * 64, lacking, other_shape, {"model/x": torch.zeros(1)}):
        if isinstance(damage, bytes):
            path.write_bytes(damage)
        else:
            checkpoints.write(uri, damage, metadata)
        assert evaluated(training, 4, context(tmp_path)).metrics == whole
        for file in tmp_path.glob("*-f4-*"):
            file.unlink()
    # One of another seed under the same name is not taken either.
    stranger = evaluated(training, 2, context(tmp_path / "stranger"), seed=8).checkpoint
    assert stranger is not None
    path.write_bytes(Path(stranger).read_bytes())
    assert evaluated(training, 4, context(tmp_path)).metrics == whole
    assert not list(tmp_path.glob("*.part"))


def test_names_tell_recipes_data_repeats_and_fidelities_apart(tmp_path: Path) -> None:
    uris = {
        evaluated(Training(fidelities=[1]), 1, context(tmp_path)).checkpoint,
        evaluated(Training(fidelities=[1]), 1, context(tmp_path), repeat=1).checkpoint,
        evaluated(Training(fidelities=[1], learning_rate=0.2), 1, context(tmp_path)).checkpoint,
        evaluated(
            Training(fidelities=[1]), 1, dataclasses.replace(context(tmp_path), data=DATA | {"test": 0.7})
        ).checkpoint,
    }
    assert len(uris) == 4
    assert all(uri is not None and f"{task(1).key}-r" in uri and "-f1-" in uri for uri in uris)
    # The ladder itself is no part: a job with a further rung continues the files of one without.
    again = evaluated(Training(fidelities=[1, 2, 7]), 1, context(tmp_path)).checkpoint
    assert again in uris
    recipes = [
        Recipe(),
        *(dataclasses.replace(Recipe(), **{f.name: other(f.name)}) for f in dataclasses.fields(Recipe)),
    ]
    assert len({recipe.digest() for recipe in recipes}) == len(recipes)


def other(field: str) -> Any:
    named = {"optimizer": "adamw", "augmentation": "none", "batch": 16}
    return named[field] if field in named else getattr(Recipe(), field) / 2


def test_checkpoints_go_to_any_file_system() -> None:
    training = Training(fidelities=[1, 2])
    where = context("memory://jobs/1")
    first = evaluated(training, 1, where)
    assert first.checkpoint is not None
    assert first.checkpoint.startswith("memory://jobs/1/")
    assert evaluated(training, 2, where).metrics == evaluated(training, 2, context()).metrics


def test_kept_weights_are_those_that_were_measured(tmp_path: Path) -> None:
    result = evaluated(Training(fidelities=[2]), 2, context(tmp_path))
    assert result.checkpoint is not None
    model = checkpoints.read_model(SPACE, GENOTYPE, result.checkpoint)
    data = load(DATA, 16, 1)
    images, labels = data.part("validation")
    with torch.no_grad():
        right = float((model(data.normalised(images)).argmax(1) == labels).float().mean()) * 100
    assert right == pytest.approx(result.metrics["accuracy"].value, abs=0.3)
    with pytest.raises(checkpoints.UnreadableCheckpointError):
        checkpoints.read_model(SPACE, ["k5_e6"] * 6, result.checkpoint)
    uri = str(tmp_path / "final.safetensors")
    checkpoints.write_model(uri, model.state_dict(), {"genotype": "x"})
    again = checkpoints.read_model(SPACE, GENOTYPE, uri)
    assert torch.equal(again(data.normalised(images)), model(data.normalised(images)))


def test_the_search_never_touches_the_test_part(monkeypatch: pytest.MonkeyPatch) -> None:
    from archfront.evaluators.datasets.dataset import DataSet

    parts = []
    part = DataSet.part
    monkeypatch.setattr(DataSet, "part", lambda self, name: parts.append(name) or part(self, name))
    evaluated(Training(fidelities=[1]), 1, context())
    assert set(parts) == {"train", "validation"}
    parts.clear()
    result = train_finalist(SPACE, GENOTYPE, DATA, epochs=1, seed=7)
    assert "test" in parts
    # The same recipe and seed, so the same network as the search's.
    assert result.validation_accuracy == evaluated(Training(fidelities=[1]), 1, context()).metrics["accuracy"].value
    assert 0 <= result.test_accuracy <= 100
    SPACE.build(GENOTYPE).load_state_dict(result.state_dict)


def test_final_tasks_continue_and_keep_the_finished_model(tmp_path: Path) -> None:
    training = Training(fidelities=[2])
    evaluated(training, 2, context(tmp_path))
    final = dataclasses.replace(task(4), final=True)
    [result] = training.evaluate([final], context(tmp_path))
    assert isinstance(result, Evaluated)
    expected = train_finalist(SPACE, GENOTYPE, DATA, epochs=4, seed=7)
    assert result.metrics["accuracy"].value == expected.validation_accuracy
    assert result.metrics["test_accuracy"].value == expected.test_accuracy
    assert result.checkpoint is not None
    assert "-final4-" in result.checkpoint
    kept = checkpoints.read_model(SPACE, GENOTYPE, result.checkpoint).state_dict()
    assert all(torch.equal(kept[name], tensor) for name, tensor in expected.state_dict.items())
    assert not any(name.startswith("optimizer/") for name in tensors(result.checkpoint))


def test_seeds_matter_and_threads_come_back() -> None:
    before = torch.get_num_threads()
    state = torch.get_rng_state()
    training = Training(fidelities=[1])
    assert evaluated(training, 1, context()).metrics != evaluated(training, 1, context(), seed=8).metrics
    assert torch.get_num_threads() == before
    assert torch.equal(torch.get_rng_state(), state)


def test_each_epoch_has_its_own_order(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []
    step = Run._step

    def recorded(self: Run, images: torch.Tensor, labels: torch.Tensor, number: int, epochs: int) -> torch.Tensor:
        seen.append(labels.tolist())
        return step(self, images, labels, number, epochs)

    monkeypatch.setattr(Run, "_step", recorded)
    run = Run(lambda: SPACE.build(GENOTYPE), load(DATA, 16, 1), Recipe(), 0)
    run.train(2, 2)
    assert seen[: run.steps] != seen[run.steps :]
    assert len(seen) == 2 * run.steps
    first = list(seen)
    seen.clear()
    Run(lambda: SPACE.build(GENOTYPE), load(DATA, 16, 1), Recipe(), 0).train(2, 2)
    assert seen == first


def test_the_rate_warms_up_stays_and_falls() -> None:
    recipe = Recipe(warmup=1, decay=0.25)
    factors = [recipe.factor(step, 10, 8) for step in range(80)]
    assert factors[:10] == pytest.approx(np.arange(1, 11) / 10)
    assert set(factors[10:60]) == {1.0}
    assert factors[60:] == pytest.approx(np.arange(20, 0, -1) / 20)
    trunks = [recipe.trunk(epochs) for epochs in range(1, 60)]
    assert trunks == sorted(trunks)
    assert trunks[0] == 0
    # The trunk is the same for a longer run, which is what continuing rests on.
    assert [recipe.factor(step, 10, 40) for step in range(60)] == factors[:60]


def test_augmentation_shifts_each_image() -> None:
    images = torch.zeros(64, 1, 16, 16, dtype=torch.uint8)
    images[:, 0, 8, 5] = 200
    shifted = augmented(images, Recipe(augmentation="shift"), np.random.default_rng(0))
    assert shifted.shape == images.shape
    _, _, rows, columns = torch.nonzero(shifted, as_tuple=True)
    assert len(rows) == 64
    assert (int(rows.min()), int(rows.max()), int(columns.min()), int(columns.max())) == (6, 10, 3, 7)
    flipped = augmented(images, Recipe(augmentation="shift-flip"), np.random.default_rng(0))
    assert {int(c) for c in torch.nonzero(flipped)[:, 3]} & set(range(8, 13))
    assert augmented(images, Recipe(augmentation="none"), np.random.default_rng(0)) is images


def test_it_learns() -> None:
    """A light network, three epochs: far above the 10 % of guessing."""
    space = FBNetTiny()
    data = load({"name": "digits"}, 16, 1)
    run = Run(lambda: space.build(["k5_e3", "skip", "skip", "skip"] * 3), data, Recipe(), 0)
    run.train(3, 3)
    assert run.accuracy("validation") > 80
    assert run.loss < 1.5


@pytest.mark.slow
def test_it_learns_digits_well() -> None:
    space = FBNetTiny()
    result = train_finalist(space, ["k5_e3", "k3_e1", "skip", "skip"] * 3, {"name": "digits"}, epochs=40, seed=0)
    assert result.validation_accuracy > 98
    assert result.test_accuracy > 98


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"fidelities": []}, "fidelities"),
        ({"fidelities": [3, 3]}, "fidelities"),
        ({"fidelities": [0, 3]}, "fidelities"),
        ({"fidelities": [1], "batch": 1}, "batch"),
        ({"fidelities": [1], "optimizer": "adam"}, "optimizer"),
        ({"fidelities": [1], "learning_rate": 0}, "learning_rate"),
        ({"fidelities": [1], "label_smoothing": 1}, "label_smoothing"),
        ({"fidelities": [1], "decay": 2}, "decay"),
        ({"fidelities": [1], "augmentation": "mixup"}, "augmentation"),
        ({"fidelities": [1], "epochs": 3}, "epochs"),
        ({}, "fidelities"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], field: str) -> None:
    with pytest.raises(InputError, match=rf"evaluators\.(0|training)\.{field}"):
        EVALUATORS.build({"name": "training", **arguments}, "evaluators.0")


def test_jobs_that_do_not_fit_are_refused() -> None:
    training = Training(fidelities=[1])
    training.check(context())
    with pytest.raises(InputError, match=r"^data"):
        training.check(EvaluationContext(space=SPACE))
    with pytest.raises(InputError, match=r"space\.classes: 7.*10"):
        training.check(EvaluationContext(space=FBNetTiny(classes=7), data=DATA))
    with pytest.raises(InputError, match=r"space\.name"):
        training.check(EvaluationContext(space=Choices(columns={"a": [1]}), data=DATA))
    with pytest.raises(InputError, match=r"batch: 4096.*training images"):
        Training(fidelities=[1], batch=4096).check(context())
    with pytest.raises(InputError, match=r"finalists\.epochs"):
        train_finalist(SPACE, GENOTYPE, DATA, epochs=0, seed=0)
    wrong = dataclasses.replace(task(1), genotype=["k9"])
    results = training.evaluate([wrong, task(1)], context())
    assert isinstance(results[0], InputError)
    assert isinstance(results[1], Evaluated)
