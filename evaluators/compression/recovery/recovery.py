"""The contract of a recovery: what is done to a compressed network so that it loses less."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


@dataclass(kw_only=True)
class Case:
    """A compressed network and what it can be mended by.

    Attributes:
        student: the compressed network, in evaluation mode; changed in place. Behind quantised weights lie the float
            ones, see ``spaces.policies.quantised``.
        teacher: the network that it was made of, in evaluation mode.
        batches: calibration inputs of the training part.
        labels: of all of them.
        seed: of whatever is drawn.
    """

    student: nn.Module
    teacher: nn.Module
    batches: Sequence[Tensor]
    labels: Tensor
    seed: int = 0


class Recovery(ABC):
    """One step. The keyword arguments of ``__init__`` are what a job file may set under ``recovery``."""

    name: ClassVar[str]

    stage: ClassVar[int]
    """Steps of a list rise in stage: 0 for what changes float weights, 1 for what chooses codes, 2 for what corrects
    them, 3 for what adapts to the result."""

    def check(self, student: nn.Module) -> None:
        """Called when a job is validated, with a compressed network.

        Raises:
            InputError: it cannot serve such a network.
        """

    @abstractmethod
    def recover(self, case: Case) -> None:
        """Mend the student, in place. A student that nothing was done to is left to the bit."""


class _Reached(Exception):
    """The layer that was waited for has its input: the rest of the pass need not run."""


def inputs_of(model: nn.Module, path: str, batches: Sequence[Tensor]) -> list[Tensor]:
    """What a module reads as its first argument, behind its own hooks, one tensor for each batch."""
    found: list[Tensor] = []

    def note(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
        found.append(inputs[0])
        raise _Reached

    handle = model.get_submodule(path).register_forward_pre_hook(note)
    try:
        for batch in batches:
            _run(model, batch)
    finally:
        handle.remove()
    return found


def _run(model: Callable[[Tensor], Any], batch: Tensor) -> None:
    try:
        with torch.no_grad():
            model(batch)
    except _Reached:
        pass
