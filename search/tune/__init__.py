"""Ray Tune: our strategies as its searchers, any of its runs in the ledger, our jobs on its controller."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from archfront.search.tune.callback import LedgerCallback
    from archfront.search.tune.searcher import ArchfrontSearcher
    from archfront.search.tune.spaces import build

__all__ = ["ArchfrontSearcher", "LedgerCallback", "build"]

_HOMES = {"ArchfrontSearcher": "searcher", "LedgerCallback": "callback", "build": "spaces"}


def __getattr__(name: str) -> Any:
    """Load on first use: importing Ray takes a second, which a job on another engine need not spend."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
