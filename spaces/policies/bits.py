"""The space of bit widths: how many bits the weights and the inputs of each layer of a trained network get."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from archfront.errors import InputError, suggestion
from archfront.spaces.models.registry import MODELS
from archfront.spaces.policies.bit_costs import BitCosts
from archfront.spaces.policies.quantiser import BITS, FLOAT, Granularity, Quantiser, Ranges
from archfront.spaces.policies.site import Policy, Site, complete, tied_groups
from archfront.spaces.product import Column, ProductSpace
from archfront.spaces.space import Genotype, Layer, Population, digest_of

if TYPE_CHECKING:
    from torch import nn

    from archfront.spaces.policies.layers import Layers
    from archfront.spaces.policies.quantised import LayerBits

WEIGHTS, ACTIVATIONS = "weights", "activations"


class Bits(ProductSpace):
    """A genotype lists the bits of each decision, in the order in which the layers run.

    Every linear and convolutional layer of the model has a decision for its weights and, if ``activations`` is a list,
    one for its input. Layers that read one tensor have these in common: it is quantised once.

    Args:
        model: the trained network, as ``{name: cifar-resnet, weights: FILE}``.
        weights: bits to choose from, 2 to 8, or 32 for none; rising.
        activations: the same for what layers read; ``follow`` gives them the weights' bits, ``float`` leaves them.
        keep: layer -> bits of its weights that are not to be chosen, ``{conv1: 8}``, and of its input unless
            activations are float.
        tie: whether layers that read one tensor have their decisions in common.
        symmetric, granularity, group, ranges: of the weights' quantisers, see ``Quantiser``.

    Raises:
        InputError: a model or weights that cannot be read, bits out of range, or an unknown layer.
    """

    name: ClassVar[str] = "bits"

    def __init__(
        self,
        *,
        model: dict[str, Any],
        weights: list[int] | None = None,
        activations: Literal["follow", "float"] | list[int] = "follow",
        keep: dict[str, int] | None = None,
        tie: bool = True,
        symmetric: bool = True,
        granularity: Granularity = "channel",
        group: int = 64,
        ranges: Ranges = "minmax",
    ) -> None:
        self.source = MODELS.build(model, "space.model")
        fixed = self.source.mean_and_deviation
        if fixed is not None and self.source.in_channels > len(fixed[0]):
            problem = f"is of {len(fixed[0])} channels, and the model takes {self.source.in_channels}"
            raise InputError("space.model.normalisation", self.source.normalisation, problem, "Give 'data'.")
        self._model = model
        self.resolution, self.in_channels = self.source.resolution, self.source.in_channels
        self.classes = self.source.classes
        self.keep, self.tie = dict(keep or {}), tie
        self.weight_bits = _rising("weights", [2, 4, 8] if weights is None else weights)
        self.activations = activations if isinstance(activations, str) else _rising("activations", activations)
        self._settings = {
            "symmetric": symmetric, "granularity": granularity, "group": group, "ranges": ranges
        }  # fmt: skip
        Quantiser(bits=BITS[-1], **self._settings)  # type: ignore[arg-type]
        self.sites = self._find_sites()
        self._groups = tied_groups(self.sites)
        columns = []
        for members in self._groups:
            name = "+".join(self.sites[i].id for i in members)
            columns.append(Column(name, self.sites[members[0]].domain, ordered=True))
        super().__init__(columns)

    @property
    def config(self) -> Mapping[str, Any]:
        return {
            "model": self._model, "weights": list(self.weight_bits),
            "activations": self.activations if isinstance(self.activations, str) else list(self.activations),
            "keep": self.keep, "tie": self.tie, **self._settings,
        }  # fmt: skip

    @cached_property
    def digest(self) -> str:
        """With the content of the model's weights, not the place where they lie."""
        return digest_of(self.name, self.version, {**self.config, "model": self.source.identity})

    @cached_property
    def layers(self) -> Layers:
        """The layers of the model, those that are kept included."""
        import torch

        from archfront.spaces.policies.layers import find_layers

        try:
            with torch.device("meta"):
                model = self.source.architecture()
                example = torch.zeros(1, self.in_channels, self.resolution, self.resolution)
        except (RuntimeError, ValueError, TypeError, OverflowError) as error:
            problem = f"cannot be built ({type(error).__name__}: {str(error).splitlines()[0]})"
            raise InputError("space.model", self._model, problem, "Give sizes that such a network can have.") from error
        return find_layers(model, example)

    def quantiser(self, bits: int) -> Quantiser:
        """Of weights."""
        return Quantiser(bits=bits, **self._settings)  # type: ignore[arg-type]

    def policy(self, genotype: Genotype) -> dict[str, int]:
        """Site id -> bits.

        Raises:
            InputError: the genotype is not of this space.
        """
        [row] = self.from_json([genotype]).tolist()
        found: dict[str, int] = {}
        for members, column, choice in zip(self._groups, self.columns, row, strict=True):
            found |= {self.sites[i].id: int(column.choices[choice]) for i in members}
        return found

    def genotype(self, policy: Policy) -> Genotype:
        """The inverse of ``policy``; a site that is not named gets its most bits.

        Raises:
            InputError: an unknown site, bits that it cannot have, or tied sites with different ones.
        """
        full = complete(self.sites, policy)
        return [full[self.sites[members[0]].id] for members in self._groups]

    def layer_bits(self, genotype: Genotype) -> dict[str, LayerBits]:
        """Path -> bits of every layer, those that are kept included."""
        from archfront.spaces.policies.quantised import LayerBits

        policy = self.policy(genotype)
        found: dict[str, LayerBits] = {}
        for layer in self.layers.found:
            kept = self.keep.get(layer.path, FLOAT)
            weights = policy.get(f"{layer.path}:{WEIGHTS}", kept)
            if self.activations == "follow":
                inputs = weights
            elif self.activations == "float":
                inputs = FLOAT
            else:
                inputs = policy.get(f"{layer.path}:{ACTIVATIONS}", kept)
            found[layer.path] = LayerBits(weights=weights, activations=inputs)
        return found

    @cached_property
    def bit_costs(self) -> BitCosts:
        """What every choice costs, and how many each column's choices are in all."""
        return BitCosts.of(self)

    def build(self, genotype: Genotype) -> nn.Module:
        """The network with quantised weights; inputs of layers are quantised in the range of each batch."""
        from archfront.spaces.policies.quantised import quantise

        return quantise(self.source.build(), self.layer_bits(genotype), self.quantiser)

    def describe(self, genotype: Genotype) -> list[Layer]:
        bits = self.layer_bits(genotype)
        rows = []
        for layer in self.layers.found:
            mine = bits[layer.path]
            details = {"params": layer.params, "macs": layer.macs, "kept": layer.path in self.keep}
            kind = f"W{mine.weights} A{mine.activations}"
            rows.append(Layer(name=layer.path, kind=kind, shape=(), size=mine.weights / 8, details=details))
        return rows

    def costs(self, population: Population) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Parameters and multiply-adds for one image, which bits do not change: ``(n,)`` each."""
        macs = sum(layer.macs for layer in self.layers.found)
        shape = len(population)
        return np.full(shape, self.layers.params, dtype=np.int64), np.full(shape, macs, dtype=np.int64)

    def _find_sites(self) -> list[Site]:
        paths = [layer.path for layer in self.layers.found]
        for path, bits in self.keep.items():
            if path not in paths:
                raise InputError(f"space.keep.{path}", bits, "is for no layer of the model", suggestion(path, paths))
            if bits != FLOAT and bits not in BITS:
                raise InputError(f"space.keep.{path}", bits, "is no width", f"Give 2 to 8, or {FLOAT} for none.")
        free = [layer for layer in self.layers.found if layer.path not in self.keep]
        if not free:
            raise InputError("space.keep", self.keep, "leaves no layer to choose for", "Keep fewer layers.")
        kinds = [(WEIGHTS, "weight-bits", self.weight_bits)]
        if not isinstance(self.activations, str):
            kinds.append((ACTIVATIONS, "activation-bits", self.activations))
        # Weights are in common only where the inputs, which are, follow them.
        tied = {ACTIVATIONS} if len(kinds) > 1 else {WEIGHTS} if self.activations == "follow" else set()
        sources = [layer.source for layer in free]
        return [
            Site(
                id=f"{layer.path}:{what}",
                kind=kind,
                domain=domain,
                module=layer.path,
                tied=str(layer.source) if self.tie and what in tied and sources.count(layer.source) > 1 else None,
                facts={"params": layer.params, "macs": layer.macs, "inputs": layer.inputs},
            )
            for layer in free
            for what, kind, domain in kinds
        ]


def _rising(field: str, bits: Sequence[int]) -> tuple[int, ...]:
    given = list(bits)
    if not given or sorted(set(given)) != given:
        raise InputError(f"space.{field}", given, "does not rise", "Give each width once, e.g. [2, 4, 8].")
    for width in given:
        if width != FLOAT and width not in BITS:
            raise InputError(f"space.{field}", width, "is no width", f"Give 2 to 8, or {FLOAT} for none.")
    return tuple(given)
