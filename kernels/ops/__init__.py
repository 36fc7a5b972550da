"""The operators as Triton kernels behind torch custom operators, ``torch.ops.archfront.*``: an import registers all.

Each module has the kernel, its launcher, the custom operator with an eager twin on a CPU and a fake, and
``compile_cases()``, what of it is compiled for GPUs in tests. Needs torch and triton alone, so Linux; importing touches
no device.
"""

from __future__ import annotations

from archfront.kernels.ops import depthwise

MODULES = (depthwise,)
"""All modules of operators; each has ``OPERATORS``, the names that it registers, and ``compile_cases()``."""

OPERATORS = tuple(name for module in MODULES for name in module.OPERATORS)
