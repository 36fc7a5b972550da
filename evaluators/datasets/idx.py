"""MNIST and its kin: idx files, plain or gzip, or npz files with ``images`` and ``labels``."""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from archfront.errors import InputError
from archfront.evaluators.datasets.dataset import RawData, Source, data_folder

_UBYTE = 8
"""idx's code of unsigned bytes."""


class Mnist(Source):
    """MNIST (LeCun et al.): 60,000 + 10,000 grey images of 28 x 28 pixels; its own test part is kept.

    Args:
        root: folder with the four idx files (``train-images-idx3-ubyte[.gz]``, ...) or with ``mnist_train.npz`` and
            ``mnist_test.npz``; by default ``$ARCHFRONT_DATA/mnist``.
        split_seed: of the split of the training images into training and validation.
        validation: share of each class.
        limit: use only this many training images and as many test images, the first ones; None for all.
    """

    name: ClassVar[str] = "mnist"
    classes: ClassVar[tuple[str, ...]] = tuple("0123456789")
    site: ClassVar[str] = "https://yann.lecun.com/exdb/mnist"
    stem: ClassVar[str] = "mnist"

    def __init__(
        self, *, root: str | None = None, split_seed: int = 0, validation: float = 0.1, limit: int | None = None
    ) -> None:
        self.set_split(split_seed, validation, 0.2)
        if limit is not None and limit < 1:
            raise InputError("data.limit", limit, "is not positive", "Give a number of images, or leave it out.")
        self.root = root
        self.limit = limit

    @property
    def identity(self) -> dict[str, Any]:
        return {**super().identity, "limit": self.limit}

    def read(self, resolution: int, channels: int) -> RawData:
        remedy = (
            f"Put the four idx files (train-images-idx3-ubyte.gz and so on, from {self.site}) into a folder and "
            f"give it as data.root, or as $ARCHFRONT_DATA/{self.stem}."
        )
        folder = data_folder(self.root, self.stem, self.name, remedy)
        images, labels = zip(*(self._part(folder, part, remedy) for part in ("train", "test")), strict=True)
        kept = [part[: self.limit] for part in images]
        return RawData(
            np.concatenate(kept)[:, None],
            np.concatenate([part[: self.limit] for part in labels]),
            self.classes,
            len(kept[0]),
        )

    def _part(self, folder: Path, part: str, remedy: str) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
        packed = folder / f"{self.stem}_{part}.npz"
        if packed.is_file():
            with np.load(packed, allow_pickle=False) as arrays:
                images, labels = arrays["images"], arrays["labels"]
        else:
            prefix = "train" if part == "train" else "t10k"
            images = read_idx(_present(folder, f"{prefix}-images-idx3-ubyte", self.name, remedy))
            labels = read_idx(_present(folder, f"{prefix}-labels-idx1-ubyte", self.name, remedy))
        if images.ndim != 3 or images.dtype != np.uint8 or len(images) != len(labels):
            raise InputError("data.root", str(folder), f"holds unusable images of the {part} part", remedy)
        return images, labels.astype(np.int64)


class FashionMnist(Mnist):
    """Fashion-MNIST (Xiao et al., 2017): as ``Mnist``, by default in ``$ARCHFRONT_DATA/fashion-mnist``."""

    name: ClassVar[str] = "fashion-mnist"
    classes: ClassVar[tuple[str, ...]] = (
        "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot",
    )  # fmt: skip
    site: ClassVar[str] = "https://github.com/zalandoresearch/fashion-mnist"
    stem: ClassVar[str] = "fashion-mnist"


def read_idx(path: Path) -> npt.NDArray[np.uint8]:
    """An idx file of unsigned bytes, plain or gzip (told by its content).

    Raises:
        InputError: it is not such a file, or it is cut off.
    """
    remedy = "Get the file again."
    content = path.read_bytes()
    try:
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
        zeros, code, dimensions = struct.unpack_from(">HBB", content)
        shape = struct.unpack_from(f">{dimensions}I", content, 4)
    except (struct.error, OSError, EOFError, zlib.error):
        raise InputError("data.root", str(path), "is not a readable idx file", remedy) from None
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions)
    if zeros or code != _UBYTE or values.size != np.prod(shape, dtype=np.int64):
        raise InputError("data.root", str(path), "is not a complete idx file of bytes", remedy)
    return values.reshape(shape)


def _present(folder: Path, stem: str, name: str, remedy: str) -> Path:
    # The original site wrote a dot for the second hyphen in some releases.
    for candidate in (stem, stem.replace("-idx", ".idx")):
        for suffix in ("", ".gz"):
            if (folder / (candidate + suffix)).is_file():
                return folder / (candidate + suffix)
    raise InputError("data.root", str(folder), f"has no {stem}[.gz], which {name} needs", remedy)
