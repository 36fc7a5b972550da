"""What a launch of attention by pattern needs beside its tensors: blocks of a good size, and lists of them."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import NamedTuple

import torch

from archfront.kernels.reference.attention_patterns import BlockLists, MultiDiagonal, Pattern, block_lists
from archfront.kernels.tuning import Setting, bucket, chosen

DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
"""Of the queries, and what keys of settings call them."""


def default_setting(width: int, length: int, dtype: torch.dtype, diagonals: bool) -> Setting:
    """For heads of ``width`` where no table has a better one; ``diagonals``: whether any is of ``MultiDiagonal``."""
    if dtype == torch.float32:
        # Exact float32 products have no matrix instructions and hold both operands in registers; more or fewer stages
        # spill.
        return {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1 if width == 64 else 2}
    keys = 32 if width == 128 and diagonals else 64
    if length <= 512:
        return {"BLOCK_M": 64, "BLOCK_N": keys, "num_warps": 4, "num_stages": 3}
    return {"BLOCK_M": 128, "BLOCK_N": keys, "num_warps": 8, "num_stages": 3}


def candidates(width: int, dtype: torch.dtype, diagonals: bool) -> list[Setting]:
    """Settings worth measuring; all compile without spills for GPUs from sm_80 on."""
    if dtype == torch.float32:
        return [default_setting(width, 4096, dtype, diagonals)]
    tiles = [(m, n, warps, stages) for m, n, warps in ((64, 32, 4), (64, 64, 8), (128, 32, 8)) for stages in (2, 3)]
    if width < 128:
        tiles += [(m, n, warps, stages) for m, n, warps in ((64, 64, 4), (128, 64, 8)) for stages in (2, 3)]
    elif not diagonals:
        tiles += [(128, 64, 8, 3)]
    return [{"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "num_stages": stages} for m, n, warps, stages in tiles]


def tuning_key(width: int, length: int, dtype: torch.dtype, diagonals: bool) -> str:
    return f"{DTYPES[dtype]}-d{width}-l{bucket(length)}" + ("-diagonals" if diagonals else "")


class Plan(NamedTuple):
    """Lists on a device, and the setting whose blocks they are of."""

    lists: BlockLists
    warps: int
    stages: int


def plan(patterns: Sequence[Pattern], length: int, width: int, dtype: torch.dtype, device: torch.device) -> Plan:
    """What a call for heads of these patterns needs beside its tensors. Made anew each time."""
    kind = (width, length, dtype, any(isinstance(pattern, MultiDiagonal) for pattern in patterns))
    setting = chosen("pattern_attention", tuning_key(*kind), default_setting(*kind), device)
    lists = block_lists(patterns, length, setting["BLOCK_M"], setting["BLOCK_N"])
    return Plan(lists.to(device), setting["num_warps"], setting["num_stages"])


@lru_cache(maxsize=256)
def kept_plan(patterns: tuple[Pattern, ...], length: int, width: int, dtype: torch.dtype, device: torch.device) -> Plan:
    # Modes are of a thread: in another one lists are made of numbers also while this one traces an export.
    with ThreadPoolExecutor(1) as alone:
        return alone.submit(plan, patterns, length, width, dtype, device).result()
