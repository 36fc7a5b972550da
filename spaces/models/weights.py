"""Weights in a file: safetensors, or what ``torch.save`` wrote of tensors alone."""

from __future__ import annotations

import hashlib
import os
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from archfront.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor, nn

ROOT_VARIABLE = "ARCHFRONT_DATA"
_WRAPPERS = ("state_dict", "model", "model_state_dict")
_COUNTERS = "num_batches_tracked"
"""Of batch norms with a momentum it says nothing, and older checkpoints do not have it."""

_PREFIX = "module."
"""What DataParallel puts before each name."""

_FINAL = "final/"
"""What archfront's own checkpoints put before the names of finished weights, beside those of an unfinished run."""

_REMEDY = f"Give a .safetensors file or a checkpoint of torch, by its path or by its place below ${ROOT_VARIABLE}."


class Weights:
    """A checkpoint file.

    Args:
        path: of the file; a relative one that is not there is looked for below the folder that ``ARCHFRONT_DATA``
            names.

    Raises:
        InputError: there is no such file.
    """

    def __init__(self, path: str) -> None:
        root = os.environ.get(ROOT_VARIABLE)
        places = [Path(path), *([Path(root) / path] if root else [])]
        found = next((place for place in places if place.is_file()), None)
        if found is None:
            raise InputError("model.weights", path, "is no file", _REMEDY)
        self.given = path
        self.path = found

    @cached_property
    def digest(self) -> str:
        return hashlib.blake2b(self.path.read_bytes(), digest_size=16).hexdigest()

    def metadata(self) -> dict[str, str]:
        """What a safetensors file says of itself; nothing of any other."""
        if self.path.suffix != ".safetensors":
            return {}
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path, "pt") as file:
                return dict(file.metadata() or {})
        except SafetensorError as error:
            raise InputError("model.weights", self.given, f"cannot be read ({error})", _REMEDY) from None

    def tensors(self) -> dict[str, Tensor]:
        """Name -> tensor, without what training wrapped around them.

        Raises:
            InputError: the file holds no tensors by name, or more than tensors.
        """
        import torch

        if self.path.suffix == ".safetensors":
            from safetensors import SafetensorError
            from safetensors.torch import load_file

            try:
                found = load_file(self.path)
            except SafetensorError as error:
                raise InputError("model.weights", self.given, f"cannot be read ({error})", _REMEDY) from None
            finished = {name.removeprefix(_FINAL): t for name, t in found.items() if name.startswith(_FINAL)}
            return finished or found
        try:
            held: Any = torch.load(self.path, map_location="cpu", weights_only=True)
        except Exception as error:  # the reader's own errors are of many kinds
            problem = f"cannot be read as tensors alone ({str(error).splitlines()[0]})"
            raise InputError("model.weights", self.given, problem, _REMEDY) from None
        for wrapper in _WRAPPERS:
            if isinstance(held, dict) and isinstance(held.get(wrapper), dict):
                held = held[wrapper]
        if not isinstance(held, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in held.values()):
            raise InputError("model.weights", self.given, "holds no tensors by name", _REMEDY)
        return {str(name).removeprefix(_PREFIX): tensor for name, tensor in held.items()}

    def load_into(self, model: nn.Module) -> None:
        """Put the weights into a network.

        Raises:
            InputError: a tensor is missing, left over, or of another shape.
        """
        import torch

        found, expected = self.tensors(), model.state_dict()
        missing = [name for name in expected if name not in found and not name.endswith(_COUNTERS)]
        unknown = [name for name in found if name not in expected]
        if missing or unknown:
            parts = [f"lacks {_some(missing)}" if missing else "", f"has {_some(unknown)} besides" if unknown else ""]
            problem = " and ".join(part for part in parts if part)
            raise InputError("model.weights", self.given, problem, "Give the weights of this architecture.")
        for name, tensor in found.items():
            if not torch.isfinite(tensor).all():
                problem = f"has values in {name} that are not finite"
                raise InputError("model.weights", self.given, problem, "Give weights of a training that converged.")
            if tensor.shape != expected[name].shape:
                problem = f"has {name} of shape {tuple(tensor.shape)}, not {tuple(expected[name].shape)}"
                raise InputError("model.weights", self.given, problem, "Give the weights of this architecture.")
        model.load_state_dict(found, strict=False)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
