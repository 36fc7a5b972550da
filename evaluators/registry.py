"""The table of evaluators that job files can name."""

from __future__ import annotations

from archfront.evaluators.evaluator import Evaluator
from archfront.registry import Registry

EVALUATORS: Registry[Evaluator] = Registry(
    "evaluators",
    {
        "training": "archfront.evaluators.training:Training",
        "costs": "archfront.evaluators.costs:Costs",
        "compression": "archfront.evaluators.compression.evaluator:Compression",
        "latency": "archfront.evaluators.latency.evaluator:Latency",
        "evonorm-protocols": "archfront.evaluators.evonorm_protocols:EvonormProtocols",
    },
)
