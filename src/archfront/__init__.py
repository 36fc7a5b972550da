"""Archfront: neural architecture and compression-policy search. ``import archfront`` loads neither torch nor Ray."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from archfront.client import Job, run

__version__ = version("archfront")
__all__ = ["Job", "__version__", "run"]

_LAZY = {"Job": "archfront.client", "run": "archfront.client"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'archfront' has no attribute {name!r}")
