"""scikit-learn's digits: 1,797 grey images of 8 x 8 pixels, part of that package, nothing to fetch."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from archfront.evaluators.datasets.dataset import RawData, Source


class Digits(Source):
    """Optical recognition of handwritten digits (Alpaydin and Kaynak, UCI), the copy inside scikit-learn.

    Args:
        split_seed: of the split.
        validation, test: shares of each class.
    """

    name: ClassVar[str] = "digits"

    def __init__(self, *, split_seed: int = 0, validation: float = 0.2, test: float = 0.2) -> None:
        self.set_split(split_seed, validation, test)

    def read(self, resolution: int, channels: int) -> RawData:
        from sklearn.datasets import load_digits

        bunch = load_digits()
        # Stored as 0 to 16.
        images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[:, None]
        return RawData(images, bunch.target.astype(np.int64), tuple("0123456789"))
