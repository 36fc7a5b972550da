"""What a data set is, how it is split, and its cache."""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from archfront.errors import InputError
from archfront.spaces.models.weights import ROOT_VARIABLE

SplitName = Literal["train", "validation", "test"]
Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class RawData:
    """A data set as it is stored: images with one label each, or rows of tokens with one label at every place.

    Attributes:
        images: ``(n, channels, height, width)`` uint8, 0 to 255; of tokens ``(n, context)`` uint8.
        labels: ``(n,)`` int64, from 0; of tokens ``(n, context)``.
        classes: names in the order of the labels.
        test_from: index of the first image of the set's own test part, which then stays its test part; None where
            there is none and the test part is drawn.
        split: the parts, where the source deals them itself; None where they are drawn by class.
    """

    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]
    classes: tuple[str, ...]
    test_from: int | None = None
    split: Mapping[SplitName, Indices] | None = None

    @property
    def tokens(self) -> bool:
        """Whether these are rows of tokens."""
        return self.images.ndim == 2


class Source(ABC):
    """Where a data set comes from. The keyword arguments of ``__init__`` are what ``data`` may set in a job file."""

    name: ClassVar[str]

    split_seed: int = 0
    validation: float = 0.2
    test: float = 0.2

    @abstractmethod
    def read(self, resolution: int, channels: int) -> RawData:
        """All images; a source of mixed sizes gives them at the wanted resolution, others at their own.

        A source of tokens gives rows of ``resolution`` of them.

        Raises:
            InputError: the files are missing or unreadable, or hold nothing for such a network.
        """

    @property
    def identity(self) -> dict[str, Any]:
        """What tells this data set's content from another's, as JSON; no paths of this machine."""
        return {"name": self.name, "split": [self.split_seed, self.validation, self.test]}

    def set_split(self, split_seed: int, validation: float, test: float) -> None:
        """Store the split's settings.

        Raises:
            InputError: a share is not in (0, 1), or nothing would be left to train on.
        """
        for field, share in (("validation", validation), ("test", test)):
            if not 0 < share < 1:
                raise InputError(f"data.{field}", share, "is not a share", "Give a number between 0 and 1.")
        if validation + test >= 1:
            raise InputError("data.validation", validation, f"and test {test} leave nothing to train on", "Lower one.")
        if split_seed < 0:
            raise InputError("data.split_seed", split_seed, "is negative", "Give 0 or more.")
        self.split_seed, self.validation, self.test = split_seed, validation, test


@dataclass(frozen=True)
class DataSet:
    """Images at one resolution, or rows of tokens, and their split.

    Attributes:
        name: the data set's.
        images: ``(n, channels, height, width)`` uint8; of tokens ``(n, context)`` uint8.
        labels: ``(n,)`` int64; of tokens ``(n, context)``, one at every place.
        classes: names in the order of the labels.
        split: indices of the three parts, disjoint, each in rising order.
        identity: of the content, JSON.
        tokens: whether ``images`` are rows of tokens.
    """

    name: str
    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    split: Mapping[SplitName, Indices]
    identity: Mapping[str, Any]
    tokens: bool = False

    @cached_property
    def digest(self) -> str:
        """Of the identity: what a training recipe's digest takes in."""
        return hashlib.blake2b(json.dumps(self.identity, sort_keys=True).encode(), digest_size=8).hexdigest()

    @cached_property
    def normalisation(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation of each channel of the training images, ``(channels, 1, 1)``, of values in 0..1."""
        images = self.images[torch.from_numpy(self.split["train"])].numpy()
        # From counts of the 256 values: exact, whatever the number of threads, and in little memory.
        counts = np.stack([np.bincount(images[:, c].ravel(), minlength=256) for c in range(images.shape[1])])
        shares, values = counts / counts.sum(axis=1, keepdims=True), np.arange(256) / 255
        mean = shares @ values
        std = np.sqrt(np.maximum(shares @ values**2 - mean**2, 0))
        shape = (-1, 1, 1)
        return torch.from_numpy(mean).float().view(shape), torch.from_numpy(np.maximum(std, 1e-3)).float().view(shape)

    def part(self, name: SplitName) -> tuple[Tensor, Tensor]:
        """Images ``(m, channels, height, width)`` uint8 and labels ``(m,)`` of one part; of tokens ``(m, context)``."""
        chosen = torch.from_numpy(self.split[name])
        return self.images[chosen], self.labels[chosen]

    def normalised(self, images: Tensor) -> Tensor:
        """uint8 images as float32 of mean 0 and deviation 1 over the training part, tokens as int64; shape kept."""
        if self.tokens:
            return images.long()
        mean, std = self.normalisation
        return images.float().div_(255).sub_(mean).div_(std)


_loaded: dict[str, DataSet] = {}


def load(config: Mapping[str, Any], resolution: int, channels: int) -> DataSet:
    """The data set of a job file's ``data`` mapping, read once per process.

    Args:
        config: ``{"name": ..., <keyword arguments of the source>}``.
        resolution: wanted height and width in pixels; images of another size are resampled bilinearly. Of tokens: how
            many there are in a row.
        channels: 1 or 3; colour becomes luma (ITU-R BT.601), grey is repeated. Of tokens: 1.

    Raises:
        InputError: an unknown name or argument, or missing files.
    """
    from archfront.evaluators.datasets.registry import DATASETS

    source = DATASETS.build(config, "data")
    text = json.dumps([dict(config), os.environ.get(ROOT_VARIABLE), resolution, channels], sort_keys=True)
    if text not in _loaded:
        raw = source.read(resolution, channels)
        images = torch.from_numpy(raw.images)
        if not raw.tokens:
            images = resized(_with_channels(images, channels), resolution)
        identity = {**source.identity, "resolution": resolution, "channels": channels}
        split = raw.split
        if split is None:
            split = stratified_split(raw.labels, raw.test_from, source.split_seed, source.validation, source.test)
        labels = torch.from_numpy(raw.labels.astype(np.int64))
        _loaded[text] = DataSet(source.name, images, labels, raw.classes, split, identity, raw.tokens)
    return _loaded[text]


def stratified_split(
    labels: npt.NDArray[np.int64], test_from: int | None, seed: int, validation: float, test: float
) -> dict[SplitName, Indices]:
    """Three disjoint parts with each class in its share: a function of these arguments alone.

    Args:
        labels: ``(n,)``.
        test_from: images from here on are the test part; None draws it.
        validation: share of what is not a given test part.
        test: share of all, where it is drawn.
    """
    rng = np.random.default_rng([0x53504C49, seed])
    parts: dict[SplitName, list[Indices]] = {"train": [], "validation": [], "test": []}
    pool = labels[:test_from] if test_from is not None else labels
    for label in np.unique(pool):
        members = rng.permutation(np.flatnonzero(pool == label))
        tested = 0 if test_from is not None else max(1, round(test * len(members)))
        validated = max(1, round(validation * len(members)))
        parts["test"].append(members[:tested])
        parts["validation"].append(members[tested : tested + validated])
        parts["train"].append(members[tested + validated :])
    if test_from is not None:
        parts["test"] = [np.arange(test_from, len(labels))]
    return {name: np.sort(np.concatenate(members)).astype(np.int64) for name, members in parts.items()}


def resized(images: Tensor, resolution: int) -> Tensor:
    """Bilinear resampling, with anti-aliasing when it shrinks: ``(n, c, h, w)`` uint8 to ``(n, c, r, r)`` uint8."""
    if images.shape[2:] == (resolution, resolution):
        return images
    found = torch.empty((*images.shape[:2], resolution, resolution), dtype=torch.uint8)
    # In floats all of it would take four times the memory of what is made.
    for piece, given in zip(torch.split(found, 1024), torch.split(images, 1024), strict=True):
        sampled = torch.nn.functional.interpolate(
            given.float(), size=(resolution, resolution), mode="bilinear", align_corners=False, antialias=True
        )
        piece.copy_(sampled.round_().clamp_(0, 255))
    return found


def _with_channels(images: Tensor, channels: int) -> Tensor:
    present = images.shape[1]
    if present == channels:
        return images
    if present == 1:
        return images.expand(-1, channels, -1, -1).contiguous()
    if channels == 1:
        weights = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
        pieces = [(piece.float() * weights).sum(1, keepdim=True) for piece in torch.split(images, 4096)]
        return torch.cat([piece.round_().clamp_(0, 255).to(torch.uint8) for piece in pieces])
    problem = f"differs from the images' {present}"
    raise InputError("space.in_channels", channels, problem, "Give 1 or 3.")


def data_folder(root: str | None, default: str, name: str, remedy: str) -> Path:
    """The folder of a data set: ``root``, or ``default`` below the folder that ``ARCHFRONT_DATA`` names.

    Raises:
        InputError: it does not exist.
    """
    base = os.environ.get(ROOT_VARIABLE)
    folder = Path(root) if root is not None else Path(base) / default if base else None
    if folder is None:
        raise InputError("data.root", root, f"is not given, and {ROOT_VARIABLE} is not set for {name}", remedy)
    if not folder.is_dir():
        raise InputError("data.root", str(folder), f"is not a folder with {name}", remedy)
    return folder
