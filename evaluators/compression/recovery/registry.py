"""The table of recoveries that job files and recipes can name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from archfront.registry import Registry

if TYPE_CHECKING:
    from archfront.evaluators.compression.recovery.recovery import Recovery

_HERE = "archfront.evaluators.compression.recovery"

RECOVERIES: Registry[Recovery] = Registry(
    "recoveries",
    {
        "batch-norm": f"{_HERE}.batch_norm:BatchNorm",
        "gptq": f"{_HERE}.rounding:Gptq",
        "adaround": f"{_HERE}.rounding:AdaRound",
        "low-rank": f"{_HERE}.low_rank:LowRank",
        "layer-norm-folding": f"{_HERE}.channel_wise_inputs:LayerNormFolding",
        "rsq": f"{_HERE}.rotated:Rsq",
    },
)
