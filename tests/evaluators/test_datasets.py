from __future__ import annotations

import gzip
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from archfront.errors import InputError
from archfront.evaluators.datasets import DATASETS, load
from archfront.evaluators.datasets.cifar import read_batch
from archfront.evaluators.datasets.dataset import resized, stratified_split
from archfront.evaluators.datasets.idx import read_idx


def test_digits_are_split_by_class_and_seed_only() -> None:
    small, large = load({"name": "digits"}, 8, 1), load({"name": "digits"}, 16, 3)
    assert (tuple(small.images.shape), tuple(large.images.shape)) == ((1797, 1, 8, 8), (1797, 3, 16, 16))
    # In pieces, of which these images are in two.
    torch.testing.assert_close(large.images[1000:1050, :1], resized(small.images[1000:1050], 16), rtol=0, atol=0)
    for part in ("train", "validation", "test"):
        np.testing.assert_array_equal(small.split[part], large.split[part])
    every = np.concatenate(list(small.split.values()))
    np.testing.assert_array_equal(np.sort(every), np.arange(1797))
    shares = np.bincount(small.part("validation")[1]) / np.bincount(small.labels)
    assert np.all(np.abs(shares - 0.2) < 0.01)
    other = load({"name": "digits", "split_seed": 1}, 8, 1)
    assert not np.array_equal(other.split["test"], small.split["test"])
    assert other.digest != small.digest
    assert load({"name": "digits"}, 8, 1) is small


def test_the_split_stays_what_it_was() -> None:
    """A new release must not deal the images anew: finalists would have been selected on their test images."""
    split = load({"name": "digits"}, 8, 1).split
    assert [len(part) for part in split.values()] == [1079, 359, 359]
    assert split["test"][:8].tolist() == [4, 5, 23, 24, 29, 37, 44, 50]


def test_a_sets_own_test_part_is_kept() -> None:
    labels = np.repeat(np.arange(2), 20)
    order = np.random.default_rng(0).permutation(40)
    split = stratified_split(labels[order], 30, 0, 0.2, 0.5)
    assert split["test"].tolist() == list(range(30, 40))
    assert len(split["train"]) + len(split["validation"]) == 30


def test_normalised_images_have_mean_0_and_deviation_1_on_the_training_part() -> None:
    data = load({"name": "digits"}, 16, 1)
    values = data.normalised(data.part("train")[0])
    assert abs(float(values.mean())) < 1e-3
    assert abs(float(values.std()) - 1) < 1e-3
    assert data.images.dtype == torch.uint8


def write_idx(path: Path, values: np.ndarray, *, zipped: bool) -> None:
    content = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.tobytes()
    path.write_bytes(gzip.compress(content) if zipped else content)


@pytest.mark.parametrize("zipped", [True, False])
def test_idx_files(tmp_path: Path, zipped: bool) -> None:
    rng = np.random.default_rng(0)
    suffix = ".gz" if zipped else ""
    images = {
        "train": rng.integers(0, 256, (40, 28, 28), np.uint8),
        "t10k": rng.integers(0, 256, (10, 28, 28), np.uint8),
    }
    for prefix, part in images.items():
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte{suffix}", part, zipped=zipped)
        labels = (np.arange(len(part)) % 10).astype(np.uint8)
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte{suffix}", labels, zipped=zipped)
    data = load({"name": "fashion-mnist", "root": str(tmp_path)}, 28, 1)
    np.testing.assert_array_equal(data.images[:40, 0], images["train"])
    assert data.split["test"].tolist() == list(range(40, 50))
    assert data.classes[9] == "boot"
    (tmp_path / f"t10k-labels-idx1-ubyte{suffix}").unlink()
    with pytest.raises(InputError, match=r"data\.root.*t10k-labels-idx1-ubyte"):
        load({"name": "mnist", "root": str(tmp_path)}, 28, 1)


def test_broken_idx_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "images"
    for content in (
        b"",
        b"\x00\x00\x08",
        struct.pack(">HBBI", 0, 8, 1, 9) + b"short",
        b"\x1f\x8bgarbage",
        b"PK\x03\x04...",
    ):
        path.write_bytes(content)
        with pytest.raises(InputError, match="idx"):
            read_idx(path)


class Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)

    def __init__(self, path: Path) -> None:
        self.path = path


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_cifar_batches_are_read_without_running_them(tmp_path: Path, protocol: int) -> None:
    rng = np.random.default_rng(0)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    for name in names:
        data = rng.integers(0, 256, (20, 3072), np.uint8)
        batch = {b"data": data, b"labels": [i % 10 for i in range(20)], b"batch_label": b"x"}
        (folder / name).write_bytes(pickle.dumps(batch, protocol))
    loaded = load({"name": "cifar10", "root": str(tmp_path)}, 32, 3)
    assert tuple(loaded.images.shape) == (120, 3, 32, 32)
    np.testing.assert_array_equal(loaded.images[100:].flatten(1), data)
    made = tmp_path / "made"
    (folder / "test_batch").write_bytes(pickle.dumps({b"data": Payload(made)}, protocol))
    with pytest.raises(InputError, match="mkdir is not admitted"):
        read_batch(folder / "test_batch")
    assert not made.exists()
    for content in (pickle.dumps([1]), pickle.dumps({b"data": np.zeros(3), b"labels": [1]}), b"no pickle"):
        (folder / "test_batch").write_bytes(content)
        with pytest.raises(InputError, match="CIFAR"):
            read_batch(folder / "test_batch")


def test_image_folder(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for i in range(10):
            pixels = rng.integers(0, 256, (20, 30, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.{'png' if i % 2 else 'jpg'}")
    config = {"name": "image-folder", "root": str(tmp_path)}
    data = load(config, 16, 3)
    assert tuple(data.images.shape) == (20, 3, 16, 16)
    assert data.classes == ("cat", "dog")
    assert [len(part) for part in data.split.values()] == [12, 4, 4]
    (tmp_path / "dog" / "bad.png").write_bytes(b"not an image")
    with pytest.raises(InputError, match=r"bad\.png"):
        load(config, 17, 3)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "digitz"}, r"data\.name.*digits"),
        ({"name": "digits", "validation": 0.0}, r"data\.validation"),
        ({"name": "digits", "validation": 0.6, "test": 0.5}, r"data\.validation.*train"),
        ({"name": "digits", "split_seed": -1}, r"data\.split_seed"),
        ({"name": "mnist", "root": "/nowhere/at/all"}, r"data\.root.*nowhere.*idx files"),
        ({"name": "mnist"}, r"data\.root.*ARCHFRONT_DATA"),
        ({"name": "cifar10"}, r"data\.root.*cs\.toronto\.edu"),
        ({"name": "mnist", "limit": 0}, r"data\.limit"),
    ],
)
def test_bad_data_is_named(config: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ARCHFRONT_DATA", raising=False)
    with pytest.raises(InputError, match=message):
        load(config, 16, 1)


@pytest.mark.parametrize(
    ("name", "folder", "counts", "mean"),
    [
        ("mnist", "mnist", [54001, 5999, 10000], [0.1306]),
        pytest.param("cifar10", "cifar10", [45000, 5000, 10000], [0.491, 0.482, 0.446], marks=pytest.mark.slow),
    ],
)
def test_public_data(name: str, folder: str, counts: list[int], mean: list[float]) -> None:
    root = os.environ.get("ARCHFRONT_DATA")
    if not root or not (Path(root) / folder).is_dir():
        pytest.skip(f"needs $ARCHFRONT_DATA/{folder}")
    data = load({"name": name}, 28 if name == "mnist" else 32, len(mean))
    assert [len(part) for part in data.split.values()] == counts
    assert data.normalisation[0].flatten().tolist() == pytest.approx(mean, abs=2e-3)
    assert np.bincount(data.labels[data.split["test"]]).sum() == 10000


def test_every_registered_set_is_constructible() -> None:
    for name in DATASETS:
        assert DATASETS.build({"name": name}, "data").name == name
