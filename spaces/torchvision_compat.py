"""Importing timm where torchvision's compiled operators do not load.

timm imports torchvision, whose import registers fake kernels for ``torchvision::nms`` and ``torchvision::qnms``. Where
its compiled library does not load (a torchvision built for another torch), these operators are unknown and
the import fails, although nothing here needs them. Declaring their signatures is enough.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import torch

_SIGNATURES = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_declared: list[torch.library.Library] = []
"""Libraries undo their declarations when collected, so they are kept."""


def import_timm() -> ModuleType:
    """timm, with torchvision's missing operators declared if its import fails without them.

    Raises:
        ImportError: timm or torchvision is not installed, or fails for another reason.
    """
    try:
        return importlib.import_module("timm")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    _declare_operators()
    for name in [n for n in sys.modules if n.split(".")[0] in ("torchvision", "timm")]:
        del sys.modules[name]
    return importlib.import_module("timm")


def _declare_operators() -> None:
    for name, signature in _SIGNATURES.items():
        if not hasattr(torch.ops.torchvision, name):
            library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
            library.define(signature)  # type: ignore[no-untyped-call]
            _declared.append(library)
