"""Text by its characters: each is to be told from those before it."""

from __future__ import annotations

import hashlib
import math
import os
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from archfront.errors import InputError
from archfront.evaluators.datasets.dataset import Indices, RawData, Source, SplitName
from archfront.spaces.models.weights import ROOT_VARIABLE

VOCABULARY = "\n" + "".join(map(chr, range(32, 127)))
"""Newline and printable ASCII, in the order of the tokens: 96, whatever the text."""

_STRETCHES = 100
"""Into which a text is cut, about: each part then holds something from all over it."""

_REMEDY = f"Give a UTF-8 text file, by its path or by its place below ${ROOT_VARIABLE}."


class Text(Source):
    """Windows of ``context`` characters, the resolution of the network; the label of each place is the next character.

    The text is cut into equal stretches, of which some are drawn for validation and some for the test. A window and its
    labels lie within one stretch, so no two parts have a character of the text in common.

    Args:
        file: UTF-8 text, by its path or by its place below the folder that ``ARCHFRONT_DATA`` names; by default the
            English help topics that come with the running Python, 0.46 million characters in 3.11.
        stride: characters from one window to the next; by default the context, so that windows do not overlap.
        split_seed: of the split.
        validation, test: shares of the stretches.
    """

    name: ClassVar[str] = "text"

    def __init__(
        self,
        *,
        file: str | None = None,
        stride: int | None = None,
        split_seed: int = 0,
        validation: float = 0.1,
        test: float = 0.1,
    ) -> None:
        self.set_split(split_seed, validation, test)
        if stride is not None and stride < 1:
            raise InputError("data.stride", stride, "is not positive", "Give a number of characters, or leave it out.")
        self.file = file
        self.stride = stride

    @property
    def identity(self) -> dict[str, Any]:
        content = hashlib.blake2b(self._tokens.tobytes(), digest_size=16).hexdigest()
        return {**super().identity, "content": content, "stride": self.stride}

    @cached_property
    def _tokens(self) -> npt.NDArray[np.uint8]:
        return encoded(_help_topics() if self.file is None else _text(self.file))

    def read(self, resolution: int, channels: int) -> RawData:
        if channels != 1:
            raise InputError("space.in_channels", channels, "is of images, and text has none", "Give 1.")
        starts, split = self._windows(resolution)
        places = starts[:, None] + np.arange(resolution)
        return RawData(self._tokens[places], self._tokens[places + 1].astype(np.int64), tuple(VOCABULARY), split=split)

    def _windows(self, context: int) -> tuple[Indices, dict[SplitName, Indices]]:
        """The first character of each window, and which windows are in which part."""
        length = len(self._tokens)
        # With its last label a window is one character longer than the context, and so is a row of them that touch.
        each = max(1, math.ceil(length / (_STRETCHES * (context + 1))))
        stretch = each * context + 1
        count = length // stretch
        tested, validated = (max(1, round(share * count)) for share in (self.test, self.validation))
        if count <= tested + validated:
            problem = f"holds {length} characters, too few for three parts with windows of {context}"
            raise InputError("data.file", self.file, problem, "Give a longer text, or a model of a shorter context.")
        rng = np.random.default_rng([0x54455854, self.split_seed])
        order = rng.permutation(count)
        part_of = np.zeros(count, np.int64)
        part_of[order[tested : tested + validated]] = 1
        part_of[order[:tested]] = 2
        inside = np.arange(0, stretch - context, context if self.stride is None else self.stride)
        starts = (np.arange(count)[:, None] * stretch + inside).ravel()
        parts = np.repeat(part_of, len(inside))
        names: tuple[SplitName, ...] = ("train", "validation", "test")
        return starts, {name: np.flatnonzero(parts == i) for i, name in enumerate(names)}


def encoded(text: str) -> npt.NDArray[np.uint8]:
    r"""Tokens ``(n,)`` of a text: ``\r\n`` becomes a newline, a character outside the vocabulary a space."""
    codes = np.frombuffer(text.replace("\r\n", "\n").encode("utf-32-le"), "<u4")
    printable = np.where((codes >= 32) & (codes < 127), codes - 31, 1)
    return np.where(codes == ord("\n"), 0, printable).astype(np.uint8)


def _help_topics() -> str:
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


def _text(file: str) -> str:
    root = os.environ.get(ROOT_VARIABLE)
    places = [Path(file), *([Path(root) / file] if root else [])]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise InputError("data.file", file, "is no file", _REMEDY)
    try:
        # As bytes: reading text would make a newline of a lone carriage return.
        return found.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError("data.file", file, f"cannot be read as UTF-8 text ({error})", _REMEDY) from None
