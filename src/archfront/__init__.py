"""Archfront: neural architecture and compression-policy search. ``import archfront`` loads neither torch nor Ray."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from archfront.client import Job, run

try:
    __version__ = version("archfront")
except PackageNotFoundError:  # the kernels alone, on a machine that has no more than torch and triton
    __version__ = "0+uninstalled"
__all__ = ["Job", "__version__", "run"]

_LAZY = {"Job": "archfront.client", "run": "archfront.client"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'archfront' has no attribute {name!r}")
