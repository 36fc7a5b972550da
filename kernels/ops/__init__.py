"""The operators as Triton kernels behind torch custom operators, ``torch.ops.archfront.*``: an import registers all.

Each module has the kernel, its launcher, the custom operator with an eager twin on a CPU and a fake, and
``compile_cases()``, what of it is compiled for GPUs in tests. Needs torch and triton alone, so Linux; importing touches
no device.
"""

from __future__ import annotations

from archfront.kernels.ops import (
    block_sparse_linear,
    depthwise,
    dequantise_weight,
    evonorm,
    fp8_linear,
    int8_linear,
    inverted_residual,
    pattern_attention,
    quantise_rows,
    shared_pattern_linear,
    token_matching,
    token_merging,
    weight_only_linear,
)

MODULES = (
    depthwise,
    pattern_attention,
    token_matching,
    token_merging,
    quantise_rows,
    int8_linear,
    fp8_linear,
    dequantise_weight,
    weight_only_linear,
    evonorm,
    block_sparse_linear,
    shared_pattern_linear,
    inverted_residual,
)
"""All modules of operators; each has ``OPERATORS``, the names that it registers, and ``compile_cases()``."""

OPERATORS = tuple(name for module in MODULES for name in module.OPERATORS)
