"""A folder of images, one sub-folder for each class."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image, UnidentifiedImageError

from archfront.errors import InputError
from archfront.evaluators.datasets.dataset import RawData, Source, data_folder

SUFFIXES = {".png", ".jpg", ".jpeg"}
_REMEDY = "Give a folder that holds one sub-folder of .png or .jpg images for each class."


class ImageFolder(Source):
    """``root/<class>/*.png|jpg``; the classes are the sub-folders in alphabetical order.

    An image is scaled so that its shorter side fits and cropped around its centre.

    Args:
        root: the folder; by default ``$ARCHFRONT_DATA/images``.
        split_seed: of the split.
        validation, test: shares of each class.
    """

    name: ClassVar[str] = "image-folder"

    def __init__(
        self, *, root: str | None = None, split_seed: int = 0, validation: float = 0.2, test: float = 0.2
    ) -> None:
        self.set_split(split_seed, validation, test)
        self.root = root
        self._content = ""

    @property
    def identity(self) -> dict[str, Any]:
        return {**super().identity, "content": self._content}

    def read(self, resolution: int, channels: int) -> RawData:
        root = data_folder(self.root, "images", self.name, _REMEDY)
        files = [
            (path, folder.name)
            for folder in sorted(root.iterdir())
            if folder.is_dir()
            for path in sorted(folder.iterdir())
            if path.suffix.lower() in SUFFIXES
        ]
        classes = sorted({name for _, name in files})
        if len(classes) < 2:
            raise InputError("data.root", str(root), f"holds images of {len(classes)} classes", _REMEDY)
        content = hashlib.blake2b(digest_size=16)
        images = np.empty((len(files), channels, resolution, resolution), np.uint8)
        for i, (path, name) in enumerate(files):
            content.update(f"{name}/{path.name}\n".encode())
            images[i] = _pixels(path, resolution, channels)
        content.update(images.tobytes())
        self._content = content.hexdigest()
        return RawData(images, np.array([classes.index(name) for _, name in files], np.int64), tuple(classes))


def _pixels(path: Path, resolution: int, channels: int) -> Any:
    try:
        with Image.open(path) as file:
            image = file.convert("L" if channels == 1 else "RGB")
    except (OSError, UnidentifiedImageError):
        raise InputError("data.root", str(path), "is not a readable image", "Remove it or get it again.") from None
    scale = resolution / min(image.size)
    width, height = (max(resolution, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - resolution) // 2, (height - resolution) // 2
    pixels = np.asarray(image.crop((left, top, left + resolution, top + resolution)))
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
