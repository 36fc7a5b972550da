"""Text: its windows, its parts, and a decoder that learns from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor

from archfront.errors import InputError
from archfront.evaluators.datasets import DataSet, load
from archfront.evaluators.datasets.text import VOCABULARY, encoded
from archfront.evaluators.training_loop import Run, torch_threads
from archfront.evaluators.training_recipe import Recipe
from archfront.spaces.models.registry import MODELS

CONTEXT = 16
NUMBERED = "".join(f"|{i:06d}" for i in range(3000))
"""Every 13 characters of it tell where they stand."""


def written(folder: Path, text: str, name: str = "text.txt") -> dict[str, Any]:
    (folder / name).write_text(text, encoding="utf-8", newline="")
    return {"name": "text", "file": str(folder / name)}


def decoded(row: Tensor) -> str:
    return "".join(VOCABULARY[token] for token in row.tolist())


def start(window: str) -> int:
    bar = window.index("|")
    return 7 * int(window[bar + 1 : bar + 7]) - bar


def test_the_vocabulary_is_newline_and_printable_ascii() -> None:
    assert len(VOCABULARY) == 96
    assert encoded(VOCABULARY).tolist() == list(range(96))
    assert decoded(torch.from_numpy(encoded("a\tb\r\nc\rd\n—é\x7f\x00🙂~"))) == "a b\nc d\n     ~"
    assert encoded("").tolist() == []


def test_labels_are_the_next_characters(tmp_path: Path) -> None:
    data = load(written(tmp_path, NUMBERED), CONTEXT, 1)
    assert data.tokens
    assert data.classes == tuple(VOCABULARY)
    assert (data.images.dtype, data.labels.dtype) == (torch.uint8, torch.int64)
    assert data.images.shape == data.labels.shape == (len(data.images), CONTEXT)
    for image, label in zip(data.images, data.labels, strict=True):
        window, following = decoded(image), decoded(label)
        assert following[:-1] == window[1:]
        assert window + following[-1] == NUMBERED[start(window) :][: CONTEXT + 1]
    normalised = data.normalised(data.images)
    assert normalised.dtype == torch.int64
    assert torch.equal(normalised, data.images.long())


@pytest.mark.parametrize(("stride", "context"), [(None, 16), (1, 16), (40, 16), (None, 150), (5, 13)])
def test_no_two_parts_have_a_character_in_common(tmp_path: Path, stride: int | None, context: int) -> None:
    data = load({**written(tmp_path, NUMBERED), "stride": stride, "validation": 0.2}, context, 1)
    seen: dict[str, set[int]] = {}
    for name in ("train", "validation", "test"):
        images, _ = data.part(name)
        starts = [start(decoded(image)) for image in images]
        assert starts == sorted(set(starts))
        seen[name] = {place for first in starts for place in range(first, first + context + 1)}
    assert not seen["train"] & seen["validation"]
    assert not seen["train"] & seen["test"]
    assert not seen["validation"] & seen["test"]
    if stride != 40:
        used = sum(map(len, seen.values()))
        assert used > 0.97 * len(NUMBERED)
        shares = [len(seen[name]) / used for name in ("train", "validation", "test")]
        assert shares == pytest.approx([0.7, 0.2, 0.1], abs=0.015)
    every = np.sort(np.concatenate(list(data.split.values())))
    np.testing.assert_array_equal(every, np.arange(len(data.images)))


def test_windows_overlap_only_where_they_are_told_to(tmp_path: Path) -> None:
    config = written(tmp_path, NUMBERED)
    apart, close = (load({**config, "stride": stride}, CONTEXT, 1) for stride in (None, 4))
    starts = np.array([start(decoded(image)) for image in apart.images])
    assert np.diff(starts).min() == CONTEXT
    assert 3.5 < len(close.images) / len(apart.images) < 4.5
    assert apart.digest != close.digest


def test_the_split_stays_what_it_was(tmp_path: Path) -> None:
    """A new release must not deal the text anew: finalists would have been selected on their test windows."""
    split = load(written(tmp_path, NUMBERED), CONTEXT, 1).split
    assert [len(split[name]) for name in ("train", "validation", "test")] == [1040, 130, 130]
    assert split["test"][::13].tolist() == [104, 208, 364, 390, 442, 585, 598, 663, 715, 1287]


def test_the_seed_draws_the_parts(tmp_path: Path) -> None:
    config = written(tmp_path, NUMBERED)
    first, other = (load({**config, "split_seed": seed}, CONTEXT, 1) for seed in (0, 1))
    assert torch.equal(first.images, other.images)
    assert not np.array_equal(first.split["test"], other.split["test"])
    assert first.digest != other.digest


def test_text_counts_by_its_content(tmp_path: Path) -> None:
    first = load(written(tmp_path, NUMBERED, "a"), CONTEXT, 1)
    same = load(written(tmp_path, NUMBERED, "b"), CONTEXT, 1)
    other = load(written(tmp_path, NUMBERED[:-1] + "x", "c"), CONTEXT, 1)
    assert first.digest == same.digest != other.digest
    assert str(tmp_path) not in str(first.identity)
    assert load(written(tmp_path, NUMBERED, "a"), CONTEXT + 1, 1).digest != first.digest


def test_a_file_is_found_below_the_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ARCHFRONT_DATA", raising=False)
    (tmp_path / "books").mkdir()
    written(tmp_path / "books", NUMBERED)
    config = {"name": "text", "file": "books/text.txt"}
    with pytest.raises(InputError, match=r"data\.file: 'books/text\.txt' is no file.*ARCHFRONT_DATA"):
        load(config, CONTEXT, 1)
    monkeypatch.setenv("ARCHFRONT_DATA", str(tmp_path))
    assert load(config, CONTEXT, 1).digest == load(written(tmp_path, NUMBERED), CONTEXT, 1).digest


def test_pythons_own_text_is_the_default() -> None:
    data = load({"name": "text"}, 64, 1)
    assert len(data.images) > 5000
    text = "".join(decoded(image) for image in data.part("train")[0])
    assert " the " in text
    assert len(set(text)) > 80


@pytest.mark.parametrize(
    ("text", "options", "context", "message"),
    [
        ("a" * 50, {}, 16, r"data\.file.*holds 50 characters, too few for three parts with windows of 16"),
        ("", {}, 16, r"data\.file.*holds 0 characters"),
        ("a" * 51, {"validation": 0.4, "test": 0.5}, 16, r"data\.file.*three parts"),
        ("a" * 51, {"stride": 0}, 16, r"data\.stride: 0 is not positive"),
        ("a" * 51, {"validation": 0.6, "test": 0.5}, 16, r"data\.validation.*train"),
        ("a" * 51, {"root": "x"}, 16, r"data\.root"),
    ],
)
def test_text_that_cannot_serve_is_named(
    tmp_path: Path, text: str, options: dict[str, Any], context: int, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        load({**written(tmp_path, text), **options}, context, 1)


def test_the_shortest_text_has_one_window_a_part(tmp_path: Path) -> None:
    data = load(written(tmp_path, "a" * 51), 16, 1)
    assert [len(part) for part in data.split.values()] == [1, 1, 1]


def test_files_and_networks_of_another_kind_are_refused(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(b"\x89PNG\r\n")
    with pytest.raises(InputError, match=r"data\.file.*image' cannot be read as UTF-8 text"):
        load({"name": "text", "file": str(tmp_path / "image")}, CONTEXT, 1)
    with pytest.raises(InputError, match=r"data\.file.*is no file"):
        load({"name": "text", "file": str(tmp_path)}, CONTEXT, 1)
    with pytest.raises(InputError, match=r"space\.in_channels: 3 is of images"):
        load(written(tmp_path, NUMBERED), CONTEXT, 3)


TINY = {"name": "decoder", "context": 32, "dim": 32, "depth": 2, "heads": 2}
RECIPE = Recipe(optimizer="adamw", learning_rate=0.01, label_smoothing=0.0)


def training(data: DataSet, recipe: Recipe = RECIPE, **options: Any) -> Run:
    return Run(MODELS.build(TINY, "model").architecture, data, recipe, 0, **options)


def test_a_decoder_learns_more_than_how_frequent_characters_are() -> None:
    data = load({"name": "text"}, 32, 1)
    with torch_threads(1):
        run = training(data)
        run.train(1, 1)
        images, labels = data.part("validation")
        with torch.no_grad():
            logits = run.model.eval()(data.normalised(images))
    counts = torch.bincount(data.part("train")[1].flatten(), minlength=96) + 1.0
    unigram = -float((counts / counts.sum()).log()[labels].mean())
    assert float(functional.cross_entropy(logits.flatten(0, 1), labels.flatten())) < unigram - 0.8
    assert run.accuracy("validation") == pytest.approx(100 * float((logits.argmax(2) == labels).float().mean()))


def short(tmp_path: Path) -> DataSet:
    return load({**written(tmp_path, NUMBERED), "split_seed": 5}, 32, 1)


def test_tokens_are_never_augmented(tmp_path: Path) -> None:
    data = short(tmp_path)
    states = []
    for augmentation in ("none", "shift-flip"):
        with torch_threads(1):
            run = training(data, Recipe(augmentation=augmentation))
            run.train(1, 1)
        states.append(run.weights())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_decoders_training_continues_bit_for_bit(tmp_path: Path) -> None:
    data = short(tmp_path)
    with torch_threads(1):
        whole, first, second = (training(data) for _ in range(3))
        whole.train(3, 3)
        first.train(2, 3)
        second.restore(first.state())
        second.train(3, 3)
    weights, continued = whole.weights(), second.weights()
    assert all(torch.equal(weights[name], continued[name]) for name in weights)


def test_a_run_takes_another_loss_and_another_normalisation(tmp_path: Path) -> None:
    data = short(tmp_path)
    shapes = set()

    def loss(batch: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        shapes.add((tuple(batch.shape), tuple(logits.shape), tuple(labels.shape), batch.dtype))
        return functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.1)

    with torch_threads(1):
        runs = [
            training(data, Recipe()),
            training(data, Recipe(), loss=loss),
            training(data, Recipe(), normalised=lambda images: images.long() * 0),
        ]
        for run in runs:
            run.train(1, 1)
        own, same, blind = (run.weights() for run in runs)
        assert shapes == {((32, 32), (32, 32, 96), (32, 32), torch.int64)}
        assert all(torch.equal(own[name], same[name]) for name in own)
        # All tokens but 0 are unseen, so their embeddings only decay; it says the same of every text.
        assert not torch.equal(own["head.weight"], blind["head.weight"])
        assert len({tuple(row) for row in runs[2].model(runs[2]._normalised(data.images)).argmax(2).tolist()}) == 1
