"""The space of bit widths: how many bits the weights and the inputs of each layer of a trained network get."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from archfront.errors import InputError, suggestion
from archfront.spaces.policies.bit_costs import BitCosts
from archfront.spaces.policies.policy_space import PolicySpace, Variant, Vector, check_costs
from archfront.spaces.policies.quantiser import (
    BITS,
    FLOAT,
    ActivationQuantiser,
    ActivationRanges,
    Granularity,
    Quantiser,
    Ranges,
)
from archfront.spaces.policies.site import Choice, Site
from archfront.spaces.space import Genotype, Layer, Population

if TYPE_CHECKING:
    from torch import Tensor, nn

    from archfront.spaces.policies.layers import LayerFacts, Layers
    from archfront.spaces.policies.quantised import Calibration, LayerBits

WEIGHTS, ACTIVATIONS = "weights", "activations"


class Bits(PolicySpace):
    """A genotype lists the bits of each decision, in the order in which the layers run.

    Every linear and convolutional layer of the model has a decision for its weights and, if ``activations`` is a list,
    one for its input. Layers that read one tensor have these in common: it is quantised once.

    Args:
        model: the trained network, as ``{name: cifar-resnet, weights: FILE}``.
        weights: bits to choose from, 2 to 8, or 32 for none; rising.
        activations: the same for what layers read; ``follow`` gives them the weights' bits, ``float`` leaves them.
        keep: layer -> bits of its weights that are not to be chosen, ``{conv1: 8}``, and of its input unless
            activations are float.
        tie: whether layers that read one tensor have their decisions in common. ``blocks`` ties, beside these, the
            weights of all layers of a repeated block, and their inputs where these have decisions: each block is one
            decision, as in Layer-Wise Quantization; layers in no block are tied as by ``true``.
        symmetric, granularity, group, ranges: of the weights' quantisers, see ``Quantiser``.
        activation_ranges: of what layers read, see ``ActivationQuantiser``.

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
        tie: bool | Literal["blocks"] = True,
        symmetric: bool = True,
        granularity: Granularity = "channel",
        group: int = 64,
        ranges: Ranges = "minmax",
        activation_ranges: ActivationRanges = "mse",
    ) -> None:
        self.keep, self.tie = dict(keep or {}), tie
        self.weight_bits = rising("weights", [2, 4, 8] if weights is None else weights)
        self.activations = activations if isinstance(activations, str) else rising("activations", activations)
        self._settings = {
            "symmetric": symmetric, "granularity": granularity, "group": group, "ranges": ranges
        }  # fmt: skip
        Quantiser(bits=BITS[-1], **self._settings)  # type: ignore[arg-type]
        ActivationQuantiser(BITS[-1], ranges=activation_ranges)
        self.activation_ranges: ActivationRanges = activation_ranges
        super().__init__(model=model)

    @property
    def options(self) -> Mapping[str, Any]:
        return {
            "weights": list(self.weight_bits),
            "activations": self.activations if isinstance(self.activations, str) else list(self.activations),
            "keep": self.keep, "tie": self.tie, "activation_ranges": self.activation_ranges, **self._settings,
        }  # fmt: skip

    @cached_property
    def layers(self) -> Layers:
        """The layers of the model, those that are kept included."""
        from archfront.spaces.policies.layers import find_layers

        return find_layers(*self._on_meta())

    def _on_meta(self) -> tuple[nn.Module, Tensor]:
        """The model and an example, without memory for their values."""
        import torch

        try:
            with torch.device("meta"):
                return self.source.architecture(), self.source.example()
        except (RuntimeError, ValueError, TypeError, OverflowError) as error:
            problem = f"cannot be built ({type(error).__name__}: {str(error).splitlines()[0]})"
            raise InputError("space.model", self._model, problem, "Give sizes that such a network can have.") from error

    def quantiser(self, bits: int) -> Quantiser:
        """Of weights."""
        return Quantiser(bits=bits, **self._settings)  # type: ignore[arg-type]

    def layer_bits(self, genotype: Genotype) -> dict[str, LayerBits]:
        """Path -> bits of every layer, those that are kept included."""
        from archfront.spaces.policies.quantised import LayerBits

        policy: dict[str, Any] = self.policy(genotype)
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

    def variant(self, genotype: Genotype) -> dict[str, LayerBits]:
        """See ``layer_bits``."""
        return self.layer_bits(genotype)

    def untouched(self) -> dict[str, LayerBits]:
        """Float everywhere, in the layers that are kept at some bits too."""
        from archfront.spaces.policies.quantised import LayerBits

        return {layer.path: LayerBits() for layer in self.layers.found}

    def alone(self, site: Site, choice: Choice) -> dict[str, LayerBits]:
        """One layer's weights, with its inputs if these follow, or its inputs at some bits, and all else float."""
        from archfront.spaces.policies.quantised import LayerBits

        bits = int(choice)
        follow = self.activations == "follow"
        mine = LayerBits(
            weights=bits if site.kind == "weight-bits" else FLOAT,
            activations=bits if follow or site.kind != "weight-bits" else FLOAT,
        )
        return {**self.untouched(), site.module: mine}

    def transform(self, model: nn.Module, variant: Variant, inputs: Sequence[Tensor]) -> nn.Module:
        """Quantised weights, and inputs of layers quantised in the ranges that calibration shows, or else in those of
        each batch."""
        from archfront.spaces.policies.quantised import quantise

        # Other policies may have taken layers out.
        there = {path for path, _ in model.named_modules()}
        variant = {
            path: bits
            for path, bits in variant.items()
            if path in there and hasattr(model.get_submodule(path), "weight")
        }
        widths = {path: [bits.activations] for path, bits in variant.items() if bits.activations != FLOAT}
        ranges = self.calibrated(model, widths, inputs) if inputs and widths else None
        return quantise(model, variant, self.quantiser, ranges)

    def calibrated(
        self, model: nn.Module, widths: Mapping[str, Sequence[int]], inputs: Sequence[Tensor]
    ) -> Calibration:
        """Quantisers of what layers read, path -> bits, in the ranges that some batches have."""
        from archfront.spaces.policies.quantised import Calibration

        return Calibration(model, widths, inputs, lambda bits: ActivationQuantiser(bits, ranges=self.activation_ranges))

    @cached_property
    def activation_widths(self) -> tuple[int, ...]:
        """All numbers of bits that some policy gives to what a layer reads."""
        if self.activations == "float":
            return ()
        chosen = self.weight_bits if self.activations == "follow" else self.activations
        return tuple(sorted({int(bits) for bits in (*chosen, *self.keep.values()) if bits != FLOAT}))

    def cost_table(self, population: Population) -> dict[str, Vector]:
        """In closed form."""
        params, macs = (count.astype(np.float64) for count in self.costs(population))
        return {"params": params, "macs": macs, **self.bit_costs(population)}

    def additive_costs(self, names: Sequence[str]) -> tuple[dict[str, list[Vector]], dict[str, float]]:
        """Sizes are sums; bit operations are, where inputs follow the weights or have one width.

        Raises:
            InputError: an unknown cost, or bit operations of decisions that meet in a product.
        """
        check_costs(names)
        if "gbops" in names and not isinstance(self.activations, str):
            problem = "is a product of two decisions of a layer, and no sum over sites"
            raise InputError("budget.gbops", "gbops", problem, "Set activations to follow or float.")
        costs = {name: [np.zeros(len(site.domain)) for site in self.sites] for name in names}
        fixed = dict.fromkeys(names, 0.0)
        places = {site.id: i for i, site in enumerate(self.sites)}
        for path, each in self.bit_costs.by_layer().items():
            site = places.get(f"{path}:{WEIGHTS}")
            for name in set(names) & set(each):
                if site is None:
                    fixed[name] += float(each[name][0])
                else:
                    costs[name][site] += each[name]
        if "size_bytes" in names:
            fixed["size_bytes"] += self.bit_costs.other_bytes
        if "gbops" in names:
            fixed["gbops"] += self.bit_costs.other_gbops
        for name, count in (("params", self.layers.params), ("macs", self.layers.macs)):
            if name in names:
                fixed[name] = float(count)
        return costs, fixed

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
        macs = self.layers.macs
        shape = len(population)
        return np.full(shape, self.layers.params, dtype=np.int64), np.full(shape, macs, dtype=np.int64)

    def find_sites(self) -> list[Site]:
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
        one_input = {ACTIVATIONS} if len(kinds) > 1 else {WEIGHTS} if self.activations == "follow" else set()
        ties = {what: self._ties(free, one_input=what in one_input) for what, _, _ in kinds}
        return [
            Site(
                id=f"{layer.path}:{what}",
                kind=kind,
                domain=domain,
                module=layer.path,
                tied=ties[what].get(layer.path),
                facts={"params": layer.params, "macs": layer.macs, "inputs": layer.inputs},
            )
            for layer in free
            for what, kind, domain in kinds
        ]

    def _ties(self, layers: Sequence[LayerFacts], *, one_input: bool) -> dict[str, str]:
        """Path -> name of what ties a layer's decision to those of others; without layers that nothing ties.

        Args:
            layers: that are searched.
            one_input: whether layers that read one tensor are tied.
        """
        from archfront.spaces.policies.repeated_blocks import repeated_blocks

        blocks = repeated_blocks(self._on_meta()[0]) if self.tie == "blocks" else []
        groups: list[tuple[set[str], list[str]]] = []
        for layer in layers:
            reasons = {f"block {block}" for block in blocks if layer.path.startswith(f"{block}.")}
            if self.tie and one_input:
                reasons.add(str(layer.source))
            # Layers of two blocks that read one tensor tie these blocks.
            joined = [group for group in groups if group[0] & reasons]
            groups = [group for group in groups if not group[0] & reasons]
            paths = [path for _, others in joined for path in others]
            groups.append((reasons.union(*(known for known, _ in joined)), [*paths, layer.path]))
        return {path: min(reasons) for reasons, paths in groups if len(paths) > 1 for path in paths}


def rising(field: str, bits: Sequence[int]) -> tuple[int, ...]:
    """Widths as a job file gives them.

    Raises:
        InputError: they do not rise, or one is no width.
    """
    given = list(bits)
    if not given or sorted(set(given)) != given:
        raise InputError(f"space.{field}", given, "does not rise", "Give each width once, e.g. [2, 4, 8].")
    for width in given:
        if width != FLOAT and width not in BITS:
            raise InputError(f"space.{field}", width, "is no width", f"Give 2 to 8, or {FLOAT} for none.")
    return tuple(given)
