"""How a gateway reaches Ray, and what a pool of workers wants there. Plain data, for both sides of the pipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class GatewayOptions:
    """How to reach Ray.

    Attributes:
        address: of a Ray cluster; None for one of the gateway's own.
        local_cpus: cores of an own cluster.
    """

    address: str | None
    local_cpus: int


@dataclass(frozen=True, kw_only=True)
class PoolOptions:
    """What a pool wants of the cluster.

    Attributes:
        slots: workers.
        cpus: of each; also its threads.
        gpus: of each; fractions share one.
        memory_mb: of each, reserved at Ray, and the limit at which its evaluations are stopped.
        resources: custom resources of Ray, of each.
        device: the workers' hosts must declare Ray's custom resource ``device:NAME``; one evaluation at a time there.
    """

    slots: int
    cpus: float = 1.0
    gpus: float = 0.0
    memory_mb: int | None = None
    resources: Mapping[str, float] = field(default_factory=dict)
    device: str | None = None

    def needs(self) -> dict[str, float]:
        """Of each worker, by Ray's names of resources."""
        found = {"CPU": self.cpus, "GPU": self.gpus, **self.resources}
        if self.memory_mb is not None:
            found["memory"] = self.memory_mb * 2.0**20
        if self.device is not None:
            # A mark of the place, not its measure: jobs take turns at a device by its lock, within a batch.
            found[f"device:{self.device}"] = 0.001
        return {name: amount for name, amount in found.items() if amount}
