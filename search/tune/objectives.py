"""What ``metric`` and ``mode`` of a Tune user mean to us."""

from __future__ import annotations

from collections.abc import Sequence

from archfront.errors import InputError


def read_objectives(metric: str | Sequence[str], mode: str | Sequence[str]) -> list[tuple[str, str]]:
    """``(metric, direction)`` pairs from a name or a list of names, as Tune takes them.

    Raises:
        InputError: no metric, one given twice, a mode other than ``min`` and ``max``, or lists of different lengths.
    """
    metrics = [metric] if isinstance(metric, str) else list(metric)
    modes = [mode] if isinstance(mode, str) else list(mode)
    if not metrics or not all(isinstance(name, str) and name for name in metrics):
        raise InputError("metric", metric, "names no metric", "Give a name or a list of names.")
    if len(set(metrics)) < len(metrics):
        raise InputError("metric", metric, "names a metric twice", "Name each once.")
    if len(metrics) != len(modes):
        raise InputError("mode", mode, f"does not fit {len(metrics)} metrics", "Give one of min and max for each.")
    for given in modes:
        if given not in ("min", "max"):
            raise InputError("mode", given, "is no direction", "Give 'min' or 'max'.")
    return list(zip(metrics, modes, strict=True))
