"""Models with weights: the published CIFAR-10 networks as they are known, and files that cannot serve."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from archfront.errors import InputError
from archfront.evaluators.datasets.cifar import Cifar10
from archfront.spaces.models.registry import MODELS

SMALL: dict[str, Any] = {"name": "vit", "resolution": 8, "patch": 4, "dim": 8, "depth": 1, "heads": 2}


@pytest.mark.parametrize(
    ("depth", "params"), [(20, 269_722), (32, 464_154), (44, 658_586), (56, 853_018), (110, 1_727_962)]
)
def test_parameters_are_those_of_the_paper(depth: int, params: int) -> None:
    with torch.device("meta"):
        model = MODELS.build({"name": "cifar-resnet", "depth": depth}, "model").architecture()
    assert sum(p.numel() for p in model.parameters()) == params


@pytest.mark.slow
@pytest.mark.parametrize(
    ("depth", "file", "percent"), [(20, "resnet20-12fca82f.th", 81.03), (56, "resnet56-4bfd9763.th", 83.2)]
)
def test_published_checkpoints_on_jpeg_images(depth: int, file: str, percent: float) -> None:
    if "ARCHFRONT_DATA" not in os.environ:
        pytest.skip("needs the checkpoints and CIFAR-10 below ARCHFRONT_DATA")
    config = {"name": "cifar-resnet", "depth": depth, "weights": f"checkpoints/{file}", "normalisation": "imagenet"}
    source = MODELS.build(config, "model")
    raw = Cifar10().read(32, 3)
    images, labels = torch.from_numpy(raw.images[raw.test_from :]), torch.from_numpy(raw.labels[raw.test_from :])
    assert source.mean_and_deviation is not None
    mean, deviation = (torch.tensor(values).view(-1, 1, 1) for values in source.mean_and_deviation)
    model, right = source.build(), 0
    with torch.no_grad():
        for some, wanted in zip(images.split(500), labels.split(500), strict=True):
            right += int((model((some.float() / 255 - mean) / deviation).argmax(1) == wanted).sum())
    assert 100 * right / len(labels) == pytest.approx(percent)


def test_weights_are_read_back_and_count_by_content(tmp_path: Path) -> None:
    source = MODELS.build({**SMALL, "seed": 3}, "model")
    state = source.build().state_dict()
    save_file(state, tmp_path / "a.safetensors")
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, tmp_path / "b.pt")
    first, second = (MODELS.build({**SMALL, "weights": str(tmp_path / f)}, "model") for f in ("a.safetensors", "b.pt"))
    for read in (first, second):
        assert all(torch.equal(tensor, state[name]) for name, tensor in read.build().state_dict().items())
    save_file(state, tmp_path / "c.safetensors")
    third = MODELS.build({**SMALL, "weights": str(tmp_path / "c.safetensors")}, "model")
    assert first.identity == third.identity
    assert first.identity != MODELS.build(SMALL, "model").identity


def test_fresh_weights_are_a_function_of_the_seed() -> None:
    first, again, other = (MODELS.build({**SMALL, "seed": seed}, "model").build().state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_files_that_cannot_serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARCHFRONT_DATA", str(tmp_path))
    torch.save({"head.weight": torch.zeros(2, 2)}, tmp_path / "other.pt")
    torch.save({"net": torch.nn.Linear(1, 1)}, tmp_path / "pickled.pt")
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    state = MODELS.build(SMALL, "model").build().state_dict()
    torch.save({**state, "head.weight": torch.zeros(3, 8)}, tmp_path / "shape.pt")
    torch.save({**state, "head.bias": torch.full((10,), torch.nan)}, tmp_path / "nan.pt")
    for file, words in {
        "none.pt": "is no file",
        "other.pt": "lacks cls_token.*and",
        "pickled.pt": "cannot be read as tensors alone",
        "broken.safetensors": "cannot be read",
        "nan.pt": r"values in head\.bias that are not finite",
        "shape.pt": r"head\.weight of shape \(3, 8\), not \(10, 8\)",
    }.items():
        with pytest.raises(InputError, match=rf"model\.weights.*{words}"):
            MODELS.build({**SMALL, "weights": file}, "model").build()


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"name": "cifar-resnet", "depth": 21}, r"depth.*6n \+ 2"),
        ({"name": "vit", "patch": 5}, "patch.*does not divide"),
        ({"name": "vit", "heads": 3}, "heads.*does not divide"),
        ({"name": "timm", "model": "resnet19"}, "unknown to timm"),
        ({"name": "vit", "normalisation": "none"}, "normalisation"),
        ({"name": "resnet"}, "known model"),
        ({"name": "network"}, r"model\.space.*missing.*archfront exported"),
        ({"name": "network", "space": {"name": "fbnet-tiny"}, "genotype": ["skip"]}, r"model\.genotype"),
        ({"name": "network", "space": {"name": "choices", "columns": {"a": [1]}}, "genotype": [1]}, "classifiers"),
    ],
)
def test_what_cannot_be_made_is_named(config: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        MODELS.build(config, "model")
