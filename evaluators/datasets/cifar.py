"""CIFAR-10: the python batches, read without running what a pickle may hold, or npz files of JPEG bytes."""

from __future__ import annotations

import io
import pickle
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from archfront.errors import InputError
from archfront.evaluators.datasets.dataset import RawData, Source, data_folder

_FILES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
_REMEDY = (
    "Unpack cifar-10-python.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html and give the folder "
    "cifar-10-batches-py as data.root, or its parent as $ARCHFRONT_DATA/cifar10."
)
_ADMITTED = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}
"""What the published batches name, and no more: rebuilding an array of numbers, and bytes written by Python 2."""


class Cifar10(Source):
    """CIFAR-10 (Krizhevsky, 2009): 50,000 + 10,000 colour images of 32 x 32 pixels; its own test part is kept.

    Args:
        root: folder with ``data_batch_1`` to ``5`` and ``test_batch`` (or with ``cifar-10-batches-py``), or with
            ``cifar10_train_jpeg.npz`` and ``cifar10_test_jpeg.npz``; by default ``$ARCHFRONT_DATA/cifar10``.
        split_seed: of the split of the training images into training and validation.
        validation: share of each class.
    """

    name: ClassVar[str] = "cifar10"
    classes: ClassVar[tuple[str, ...]] = (
        "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
    )  # fmt: skip

    def __init__(self, *, root: str | None = None, split_seed: int = 0, validation: float = 0.1) -> None:
        self.set_split(split_seed, validation, 0.2)
        self.root = root
        self._lossy = False

    @property
    def identity(self) -> dict[str, Any]:
        return {**super().identity, "lossy": self._lossy}

    def read(self, resolution: int, channels: int) -> RawData:
        folder = data_folder(self.root, "cifar10", self.name, _REMEDY)
        self._lossy = (folder / "cifar10_train_jpeg.npz").is_file()
        read = _jpeg_part if self._lossy else _batches_part
        images, labels = zip(*(read(folder, part) for part in ("train", "test")), strict=True)
        return RawData(np.concatenate(images), np.concatenate(labels), self.classes, len(images[0]))


def _jpeg_part(folder: Path, part: str) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    path = folder / f"cifar10_{part}_jpeg.npz"
    if not path.is_file():
        raise InputError("data.root", str(path), "is missing", _REMEDY)
    with np.load(path, allow_pickle=False) as arrays:
        content, offsets, labels = arrays["jpeg"].tobytes(), arrays["offsets"], arrays["labels"]
    images = np.empty((len(labels), 3, 32, 32), np.uint8)
    for i, (start, stop) in enumerate(pairwise(offsets)):
        with Image.open(io.BytesIO(content[start:stop])) as image:
            images[i] = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    return images, labels.astype(np.int64)


def _batches_part(folder: Path, part: str) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    inner = folder / "cifar-10-batches-py"
    folder = inner if inner.is_dir() else folder
    images, labels = [], []
    for name in _FILES[part]:
        batch = read_batch(folder / name)
        images.append(batch[0])
        labels.append(batch[1])
    return np.concatenate(images), np.concatenate(labels)


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles builtin containers, text, bytes and numpy arrays; anything else that a file names is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ADMITTED:
            raise pickle.UnpicklingError(f"{module}.{name} is not admitted")
        if name == "_reconstruct":
            return _reconstruct
        if name == "encode":
            return _encode
        return _ArrayMark if name == "ndarray" else _dtype


class _ArrayMark:
    """Stands for ``numpy.ndarray`` where a pickle names it, so that it cannot be called to get raw memory."""


def _reconstruct(_kind: type[_ArrayMark], _shape: tuple[int, ...], _code: bytes) -> npt.NDArray[np.uint8]:
    """An empty array, which the pickle's state then fills."""
    return np.ndarray.__new__(np.ndarray, (0,), np.uint8)


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"encoding {encoding} is not admitted")
    return text.encode("latin1")


def _dtype(code: str | bytes, *_flags: int) -> np.dtype[Any]:
    text = code.decode("ascii") if isinstance(code, bytes) else code
    if text not in ("u1", "|u1", "uint8"):
        raise pickle.UnpicklingError(f"arrays of {text} are not admitted")
    return np.dtype(np.uint8)


def read_batch(path: Path) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Images ``(n, 3, 32, 32)`` and labels ``(n,)`` of one python batch.

    Raises:
        InputError: the file is missing, names anything but arrays and containers, or does not hold a batch.
    """
    if not path.is_file():
        raise InputError("data.root", str(path), "is missing", _REMEDY)
    try:
        with path.open("rb") as file:
            batch = _ArrayUnpickler(file, encoding="bytes").load()
    except Exception as error:
        # A malformed pickle may fail in any way; none of them ran code of the file's choosing.
        raise InputError("data.root", str(path), f"is not a CIFAR batch ({error})", _REMEDY) from None
    fields = {k.decode() if isinstance(k, bytes) else k: v for k, v in batch.items()} if isinstance(batch, dict) else {}
    data, labels = fields.get("data"), fields.get("labels")
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or not isinstance(labels, list):
        raise InputError("data.root", str(path), "is not a CIFAR batch", _REMEDY)
    if data.shape != (len(labels), 3 * 32 * 32):
        raise InputError("data.root", str(path), f"holds {data.shape} bytes for {len(labels)} labels", _REMEDY)
    return data.reshape(-1, 3, 32, 32), np.array(labels, dtype=np.int64)
