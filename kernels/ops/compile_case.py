"""A launch of a kernel as a compiler sees it: dtypes in the place of tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch


class CompileCase(NamedTuple):
    """What is compiled for GPUs in tests, without one.

    Attributes:
        name: shape, dtypes and setting in words.
        kernel: the ``triton.jit`` function.
        arguments: those of the launch that are not ``constexpr``: a dtype for each tensor, numbers as they are.
        constants: ``constexpr`` arguments and ``num_warps``, ``num_stages``.
        matrix: whether the machine code must hold matrix instructions.
        since: compute capability from which on it is served; 89 for fp8.
        spills: why spills are borne; empty where none may be.
    """

    name: str
    kernel: Any
    arguments: tuple[torch.dtype | int | float, ...]
    constants: Mapping[str, Any]
    matrix: bool = False
    since: int = 80
    spills: str = ""
