"""The repeated blocks of a network: residual blocks, a transformer's layers."""

from __future__ import annotations

from torch import nn


def repeated_blocks(model: nn.Module) -> list[str]:
    """Paths of the outermost modules that stand in a list or sequence and hold several layers with weights."""
    found: list[str] = []
    for path, module in model.named_modules():
        parent = model.get_submodule(path.rpartition(".")[0]) if path else None
        if not isinstance(parent, (nn.Sequential, nn.ModuleList)):
            continue
        if isinstance(module, (nn.Sequential, nn.ModuleList)) or any(path.startswith(f"{one}.") for one in found):
            continue
        layers = [inner for inner in module.modules() if isinstance(inner, (nn.Linear, nn.Conv2d))]
        if len(layers) > 1:
            found.append(path)
    return found


def block_of(model: nn.Module, path: str) -> str:
    """The block that a layer is part of; the layer itself if it is in none."""
    return next((block for block in repeated_blocks(model) if path.startswith(f"{block}.")), path)
