"""How a network under a policy travels to the process that measures it on its device, and what comes back.

All of it is plain data: tensors and JSON. The process builds the modules anew from the job's space.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

if TYPE_CHECKING:
    from archfront.evaluators.compression.compressible import Judged
    from archfront.evaluators.deployment.kernel_layers import LayerPlan

KERNEL_BACKENDS = ("triton", "triton-graph")
"""Backends that run low-bit kernels, chosen layer by layer on the device."""

_TENSORS = ("codes", "scale", "zero")


def write_student(path: Path, plain: nn.Module, plans: Mapping[str, LayerPlan]) -> None:
    """One file with a network's state and the codes behind it.

    Args:
        plain: the network with the policy's weights, and nothing before what its layers read.
        plans: of ``layer_plans``.
    """
    # Copies: tied weights share memory, which the format refuses.
    tensors = {f"state/{name}": value.detach().clone().contiguous() for name, value in plain.state_dict().items()}
    facts: dict[str, dict[str, Any]] = {}
    for layer, plan in plans.items():
        facts[layer] = {key: value for key, value in vars(plan).items() if key not in _TENSORS}
        for name in _TENSORS:
            value = getattr(plan, name)
            if value is not None:
                tensors[f"{name}/{layer}"] = value.contiguous()
    save_file(tensors, path, {"layers": json.dumps(facts)})


def read_student(path: str | Path, network: nn.Module) -> dict[str, LayerPlan]:
    """Load a network's state, and what is behind it.

    Args:
        network: of the policy's architecture, without quantisers; changed.

    Raises:
        RuntimeError: the state is of another architecture.
    """
    from archfront.evaluators.deployment.kernel_layers import LayerPlan

    with safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()["layers"])
    tensors = load_file(path)
    state = {name.removeprefix("state/"): value for name, value in tensors.items() if name.startswith("state/")}
    network.load_state_dict(state)
    return {
        layer: LayerPlan(**{**known, **{name: tensors.get(f"{name}/{layer}") for name in _TENSORS}})
        for layer, known in facts.items()
    }


def write_samples(path: Path, parts: Mapping[str, tuple[list[Tensor], Tensor, Tensor]]) -> None:
    """What a network is judged on.

    Args:
        parts: beginning of the figures' names -> normalised batches, labels, and the network's own logits.
    """
    tensors: dict[str, Tensor] = {}
    for part, (batches, labels, own) in parts.items():
        named = {"inputs": torch.cat(batches), "labels": labels, "own": own}
        tensors |= {f"{part}/{name}": value.detach().clone().contiguous() for name, value in named.items()}
    save_file(tensors, path, {"batch": str(len(next(iter(parts.values()))[0][0]))})


def read_samples(path: str | Path) -> dict[str, tuple[list[Tensor], Tensor, Tensor]]:
    """What ``write_samples`` was given."""
    with safe_open(path, "pt") as file:
        batch = int(file.metadata()["batch"])
    tensors = load_file(path)
    return {
        part: (list(torch.split(tensors[f"{part}/inputs"], batch)), tensors[f"{part}/labels"], tensors[f"{part}/own"])
        for part in sorted({name.rpartition("/")[0] for name in tensors})
    }


def accuracy_facts(prefix: str, judged: Judged) -> dict[str, Any]:
    """Figures of a part of the data, as a benchmark stores them."""
    return {
        f"{prefix}accuracy": judged.accuracy,
        f"{prefix}accuracy_drop": judged.drop,
        f"{prefix}accuracy_drop_std": judged.drop_std,
        f"{prefix}divergence": judged.divergence,
    }


def write_record(path: str | Path, facts: Mapping[str, Any]) -> None:
    """What the measuring process found out about an item, besides its time."""
    Path(path).write_text(json.dumps(dict(facts)))


def recorded(item: Mapping[str, Any]) -> dict[str, Any]:
    """What the measuring process found out about an item; nothing where there is nothing."""
    path = item.get("record")
    if path is None or not Path(path).exists():
        return {}
    found: dict[str, Any] = json.loads(Path(path).read_text())
    return found
