"""The families that a job file names components of, and plug-in files for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from archfront.evaluators.compression.recovery.registry import RECOVERIES
from archfront.evaluators.compression.scores.registry import SCORES
from archfront.evaluators.registry import EVALUATORS
from archfront.plugins import Plugin, load_into
from archfront.registry import Registry
from archfront.search.allocators.registry import ALLOCATORS
from archfront.search.recipes.registry import RECIPES
from archfront.search.strategies.registry import STRATEGIES
from archfront.spaces.models.registry import MODELS
from archfront.spaces.registry import SPACES

FAMILIES: dict[str, Registry[Any]] = {
    "spaces": SPACES, "evaluators": EVALUATORS, "strategies": STRATEGIES,
    "models": MODELS, "scores": SCORES, "recoveries": RECOVERIES,
    "allocators": ALLOCATORS, "recipes": RECIPES,
}  # fmt: skip


def load_plugins(plugins: Sequence[Plugin]) -> None:
    """Run plug-in files and enter what they hold.

    Raises:
        InputError: a file fails to run, or names no known family.
    """
    load_into(FAMILIES, plugins)
