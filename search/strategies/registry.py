"""The table of strategies that job files can name."""

from __future__ import annotations

from archfront.registry import Registry
from archfront.search.strategy import Strategy

STRATEGIES: Registry[Strategy] = Registry(
    "strategies",
    {
        "random": "archfront.search.strategies.random:RandomSearch",
        "regularized-evolution": "archfront.search.strategies.regularized_evolution:RegularizedEvolution",
        "nsga2": "archfront.search.strategies.nsga2:NSGA2",
    },
)
