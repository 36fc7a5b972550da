"""Settings of kernels (tiles, warps, stages): looked up at a launch, found only when asked for.

A launch looks its key up in the table of its GPU, ``configs/<gpu>.json`` beside this file and over it the user's own
(``ARCHFRONT_KERNEL_CONFIGS``, else ``~/.cache/archfront/kernels``), and takes the operator's default where none is
there. ``tune`` measures candidates and writes the user's table; nothing else ever does, so no timed region tunes.
"""

from __future__ import annotations

import json
import os
import re
import statistics
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton

Setting = dict[str, int]
"""The ``constexpr`` arguments of a kernel that are a matter of speed alone, with ``num_warps`` and ``num_stages``."""

SHIPPED = Path(__file__).parent / "configs"
_CALLS = 20
_ROUNDS = 5


def bucket(rows: int) -> int:
    """Rows of a matrix as keys have them: the next power of two."""
    return int(triton.next_power_of_2(max(rows, 1)))


def chosen(operator: str, key: str, default: Setting, device: torch.device) -> Setting:
    """The setting for a key on a device.

    Args:
        operator: name, as registered.
        key: what of dtypes and sizes a setting depends on, rows by ``bucket``; as ``fp16-m16-n4096-k4096``.
        default: for keys in no table, and for devices other than GPUs.
    """
    if device.type != "cuda":
        return default
    found = table(torch.cuda.get_device_name(device)).get(operator, {}).get(key)
    return default if found is None else default | found


@cache
def table(gpu: str) -> Mapping[str, Mapping[str, Setting]]:
    """Operator -> key -> setting of a GPU by its name, the shipped ones under the user's own."""
    merged: dict[str, dict[str, Setting]] = {}
    for folder in (SHIPPED, own_folder()):
        file = folder / f"{slug(gpu)}.json"
        if not file.exists():
            continue
        for operator, keys in json.loads(file.read_text())["settings"].items():
            merged.setdefault(operator, {}).update(keys)
    return merged


def slug(gpu: str) -> str:
    """A GPU's name as a file's: ``nvidia-h200``."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


def own_folder() -> Path:
    given = os.environ.get("ARCHFRONT_KERNEL_CONFIGS")
    return Path(given) if given else Path.home() / ".cache" / "archfront" / "kernels"


def tune(
    operator: str,
    key: str,
    candidates: Iterable[Setting],
    run: Callable[[Setting], Any],
    device: torch.device,
    *,
    time_ms: Callable[[Callable[[], Any]], float] | None = None,
) -> Setting:
    """Measure candidates on a device, interleaved, and keep the fastest in the user's table.

    Args:
        run: launches the kernel once with a setting. A setting that the GPU has no room for is left out.
        time_ms: times a call; where not given, by events around some of them, which have the launches of small
            kernels in them.

    Raises:
        ValueError: no candidate runs.
    """
    runnable = []
    for setting in candidates:
        try:
            run(setting)
            torch.cuda.synchronize(device)
        except triton.runtime.errors.OutOfResources:
            continue
        runnable.append(setting)
    if not runnable:
        raise ValueError(f"{operator} {key}: none of the candidates runs on {torch.cuda.get_device_name(device)}")
    times: list[list[float]] = [[] for _ in runnable]
    for _ in range(_ROUNDS):
        for setting, found in zip(runnable, times, strict=True):
            found.append((time_ms or _time_ms)(lambda setting=setting: run(setting)))  # type: ignore[misc]
    best = runnable[min(range(len(runnable)), key=lambda i: statistics.median(times[i]))]
    keep(torch.cuda.get_device_name(device), operator, key, best)
    return best


def keep(gpu: str, operator: str, key: str, setting: Setting) -> None:
    """Write a setting into the user's table of a GPU."""
    file = own_folder() / f"{slug(gpu)}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"gpu": gpu, "settings": {}}
    content["triton"] = triton.__version__
    content["settings"].setdefault(operator, {})[key] = setting
    # Renamed into place, so that a reader never finds half of it.
    draft = file.with_suffix(f".{os.getpid()}")
    draft.write_text(json.dumps(content, indent=1, sort_keys=True))
    draft.replace(file)
    table.cache_clear()


def _time_ms(call: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    for _ in range(_CALLS):
        call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / _CALLS
