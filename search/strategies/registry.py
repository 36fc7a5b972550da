"""The table of strategies that job files can name."""

from __future__ import annotations

from archfront.registry import Registry
from archfront.search.strategy import Strategy

OPTUNA_SAMPLERS = {
    "bruteforce": "BruteForceSampler",
    "cmaes": "CmaEsSampler",
    "gp": "GPSampler",
    "grid": "GridSampler",
    "nsgaii": "NSGAIISampler",
    "nsgaiii": "NSGAIIISampler",
    "partialfixed": "PartialFixedSampler",
    "qmc": "QMCSampler",
    "random": "RandomSampler",
    "tpe": "TPESampler",
}
"""Every sampler of Optuna. Written down, because finding them would import Optuna to list names; a test compares."""

STRATEGIES: Registry[Strategy] = Registry(
    "strategies",
    {
        "random": "archfront.search.strategies.random:RandomSearch",
        "regularized-evolution": "archfront.search.strategies.regularized_evolution:RegularizedEvolution",
        "nsga2": "archfront.search.strategies.nsga2:NSGA2",
        "surrogate-nsga2": "archfront.search.strategies.surrogate_nsga2:SurrogateNSGA2",
    }
    # The module makes the class of a sampler when it is first asked for the sampler's name.
    | {f"optuna:{name}": f"archfront.search.strategies.optuna_sampler:{s}" for name, s in OPTUNA_SAMPLERS.items()},
)
