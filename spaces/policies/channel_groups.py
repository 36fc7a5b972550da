"""Channels that can only be cut together, found with Torch-Pruning's dependency graph.

The graph (DepGraph, Fang et al. 2023, arXiv 2301.12900) says which index of one layer's outputs is which index of
another layer's inputs. It takes every operation that it does not know for one that keeps indices, and does not say
when that was wrong. So nobody should believe a group before ``Trials`` have run the network with it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

Owners = NDArray[np.int64]
"""For every index along an axis the number of the unit that it goes with; -1 for none."""


@dataclass(frozen=True, eq=False)
class Cut:
    """Where one tensor holds a group's channels.

    Attributes:
        tensor: name of the parameter or buffer; of tied ones the first.
        axis: along which it holds them.
        owners: of the indices of that axis.
    """

    tensor: str
    axis: int
    owners: Owners


@dataclass(frozen=True, kw_only=True, eq=False)
class Group:
    """Units of channels: those of one unit vanish together, from every tensor that holds one of them.

    Attributes:
        writers: paths of the layers that make the channels, in the order in which they run.
        readers: paths of the linear and convolutional layers that take them in.
        cuts: the tensors that hold them; one for each tensor and axis.
        units: how many can vanish one after the other.
        channels: of the first writer that are in a unit.
        operations: names of the autograd operations on the way.
        problem: what its channels are or do that forbids a cut; None where nothing speaks against it.
    """

    writers: tuple[str, ...]
    readers: tuple[str, ...] = ()
    cuts: tuple[Cut, ...] = ()
    units: int = 0
    channels: int = 0
    operations: frozenset[str] = frozenset()
    problem: str | None = None

    def params(self, parameters: Mapping[str, Tensor]) -> int:
        """Elements of ``parameters`` (by name) that belong to any of the units."""
        kept = {cut.tensor: list(parameters[cut.tensor].shape) for cut in self.cuts if cut.tensor in parameters}
        for cut in self.cuts:
            if cut.tensor in kept:
                kept[cut.tensor][cut.axis] = int((cut.owners < 0).sum())
        return sum(parameters[name].numel() - math.prod(shape) for name, shape in kept.items())


def tensors_of(output: object) -> Iterator[Tensor]:
    """All tensors in what a network returned."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (Mapping, tuple, list)):
        for value in output.values() if isinstance(output, Mapping) else output:
            yield from tensors_of(value)


def names_of_tensors(model: nn.Module) -> dict[int, str]:
    """Identity -> name of every parameter and buffer; of tied ones the first name."""
    return {id(tensor): name for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def find_groups(model: nn.Module, example: Tensor, order: Sequence[str]) -> list[Group]:
    """The groups of all layers' output channels, by the first of their writers in ``order`` (paths as they run).

    ``model`` is put into evaluation mode and must need gradients. A group with a ``problem`` has only writers.
    Raises whatever the model does on the example, or Torch-Pruning on the model.
    """
    graph, outputs = _dependency_graph(model, example)
    paths = {module: path for path, module in model.named_modules()}
    groups: list[Group] = []
    taken: set[nn.Module] = set()
    writing = {module for module in paths if isinstance(module, (*_WRITERS, nn.MultiheadAttention))}
    for path in order:
        root = model.get_submodule(path)
        if isinstance(root, _WRITERS) and root not in taken and root in graph.module2node:
            walk = _Walk(graph, root)
            written = {node.module for node, side in walk.labels if _is_out(graph, side)} & writing
            taken |= written
            writers = sorted((paths[module] for module in written), key=order.index)
            groups.append(_group(model, walk, outputs, tuple(writers)))
    return groups


def _dependency_graph(model: nn.Module, example: Tensor) -> tuple[Any, set[Any]]:
    """Torch-Pruning's graph, and the autograd nodes of the network's outputs."""
    import torch_pruning

    outputs: list[Tensor] = []

    def forward(model: nn.Module, example: Tensor) -> list[Tensor]:
        # Left to itself the library first calls model(*example): a batch of one as an input without its first axis.
        outputs.extend(t for t in tensors_of(model(example)) if t.grad_fn is not None)
        if not outputs:
            raise ValueError("no output depends on the weights by operations that autograd records")
        return outputs

    graph = torch_pruning.DependencyGraph()
    graph.build_dependency(model, example, forward_fn=forward, verbose=False)
    for node in graph.module2node.values():
        _follow_padding(graph, node)
    return graph, {tensor.grad_fn for tensor in outputs}


class _Pair(NamedTuple):
    """An index, and the index of the walk's first layer that led to it; named as the library's mappings need it."""

    idx: int
    root_idx: int


class _PadMapping(NamedTuple):
    """Of indices before zeros were put around the channels to those after, or back; -1 for a channel of zeros."""

    left: int
    width: int
    reverse: bool

    def __call__(self, pairs: Sequence[_Pair]) -> list[_Pair]:
        if not self.reverse:
            return [_Pair(idx + self.left, root) for idx, root in pairs]
        return [_Pair(idx - self.left if 0 <= idx - self.left < self.width else -1, root) for idx, root in pairs]


def _follow_padding(graph: Any, node: Any) -> None:
    """Lets indices follow ``functional.pad`` of the channels, which the library takes for one that keeps them."""
    if not hasattr(node.grad_fn, "_saved_pad"):
        return
    shape, pad = node.grad_fn._input_metadata[0].shape, node.grad_fn._saved_pad
    after_channels = 2 * (len(shape) - 2)
    if len(pad) < after_channels + 2 or not any(pad[after_channels:]):
        return
    left, right = pad[after_channels : after_channels + 2]
    width = shape[1] - left - right
    if left < 0 or right < 0 or _width_before(graph, node) != width:
        return  # the second axis is not that of the channels
    for before in node.inputs:
        for source, target, reverse in ((node, before, True), (before, node, False)):
            for dependency in source.dependencies:
                if dependency.target is target and dependency.index_mapping[0] is None:
                    dependency.index_mapping[0] = _PadMapping(left, width, reverse)


def _width_before(graph: Any, node: Any) -> int | None:
    """Output channels of the nearest layer before a node."""
    queue = list(node.inputs)
    for before in queue:  # which grows meanwhile
        width = graph.get_out_channels(before)
        if width is not None:
            return int(width)
        queue += [other for other in before.inputs if other not in queue]
    return None


class _Walk:
    """All that the output channels of one layer reach: which index of which layer, and which channels are coupled.

    The library's own walk gives a set of indices for a set of indices. Which of them belong together it says only of
    one at a time, and that would take as many walks as there are channels.

    Attributes:
        labels: (node, side) -> index -> channel of the first layer. A side is the library's function that cuts it.
        lost: why indices could not be followed; None if they were.
    """

    def __init__(self, graph: Any, root: nn.Module) -> None:
        self.graph = graph
        self.labels: dict[tuple[Any, Any], dict[int, int]] = {}
        self.lost: str | None = None
        pruner = graph.get_pruner_of_module(root)
        self._parent = list(range(pruner.get_out_channels(root)))
        self._frozen: set[int] = set()
        stack: list[tuple[Any, Any, Sequence[_Pair]]]
        stack = [(graph.module2node[root], pruner.prune_out_channels, [_Pair(i, i) for i in self._parent])]
        while stack:
            node, side, pairs = stack.pop()
            fresh = self._note(node, side, pairs)
            ways = [way for way in node.dependencies if fresh and way.is_triggered_by(side)]
            stack += [(way.target, way.handler, self._mapped(way, fresh)) for way in ways]

    def units(self) -> list[int]:
        """Of every channel of the first layer the unit; -1 where zeros of a fixed number meet it."""
        frozen = {self._find(label) for label in self._frozen}
        numbers: dict[int, int] = {}
        found = (self._find(label) for label in range(len(self._parent)))
        return [-1 if label in frozen else numbers.setdefault(label, len(numbers)) for label in found]

    def _note(self, node: Any, side: Any, pairs: Sequence[_Pair]) -> list[_Pair]:
        """Enters what is new, joins the channels that meet at one index, and gives what is new."""
        known = self.labels.get((node, side), {})
        fresh: list[_Pair] = []
        for idx, root in pairs:
            if root is None:
                self.lost = "are repeated on their way"
            elif idx < 0:
                self._frozen.add(root)
            elif idx in known:
                self._join(known[idx], root)
            else:
                known[idx] = root
                fresh.append(_Pair(idx, root))
        groups, width = _division(self.graph, node, side)
        if groups > 1 and fresh:
            # Each group of a grouped convolution or normalisation must lose as many: those at one place in it.
            size = width // groups
            places: dict[int, int] = {}
            for idx, root in fresh:
                self._join(places.setdefault(idx % size, root), root)
            for place, root in places.items():
                for idx in range(place, width, size):
                    self._join(known.setdefault(idx, root), root)
            fresh = [_Pair(idx, root) for idx, root in known.items() if idx % size in places]
        if fresh:
            self.labels[node, side] = known
        return fresh

    def _mapped(self, way: Any, pairs: Sequence[_Pair]) -> Sequence[_Pair]:
        for mapping in way.index_mapping:
            try:
                pairs = pairs if mapping is None else mapping(pairs)
            except ArithmeticError:  # the library takes every expansion of five axes for keys shared by queries
                self.lost = "cannot be followed through an expansion"
        return pairs

    def _find(self, label: int) -> int:
        while self._parent[label] != label:
            self._parent[label] = self._parent[self._parent[label]]
            label = self._parent[label]
        return label

    def _join(self, one: int, other: int) -> None:
        one, other = sorted((self._find(one), self._find(other)))
        self._parent[other] = one


_WRITERS = (_ConvNd, nn.Linear, nn.Embedding)


def _is_out(graph: Any, side: Any) -> bool:
    return bool(graph.is_out_channel_pruning_fn(side))


def _depthwise(module: nn.Module) -> bool:
    return isinstance(module, _ConvNd) and module.groups == module.out_channels > 1


def _division(graph: Any, node: Any, side: Any) -> tuple[int, int]:
    """Into how many groups a module divides its channels on that side, and how many channels these are."""
    module = node.module
    if isinstance(module, nn.GroupNorm):
        return module.num_groups, module.num_channels
    if isinstance(module, _ConvNd) and not _depthwise(module):
        return module.groups, module.out_channels if _is_out(graph, side) else module.in_channels
    return 1, 0


def _places(module: nn.Module, writes: bool) -> list[tuple[str, int]] | None:
    """The tensors of a module that hold channels of that side, with the axis; None for a module that is not known."""
    if isinstance(module, _ConvNd):
        if _depthwise(module):
            return [("weight", 0), ("bias", 0)]
        outward, inward = (1, 0) if module.transposed else (0, 1)
        return [("weight", outward), ("bias", 0)] if writes else [("weight", inward)]
    if isinstance(module, nn.Linear):
        return [("weight", 0), ("bias", 0)] if writes else [("weight", 1)]
    if isinstance(module, nn.Embedding):
        return [("weight", 1)]
    if isinstance(module, nn.MultiheadAttention):
        # Only what reads and writes the stream of tokens. The library would take as much from the heads inside.
        reads = [(f"{name}_proj_weight", 1) for name in ("in", "q", "k", "v")]
        return [*reads, ("out_proj.weight", 0), ("out_proj.bias", 0)]
    if isinstance(module, (_BatchNorm, _InstanceNorm)):
        return [(name, 0) for name in ("weight", "bias", "running_mean", "running_var")]
    if isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
        return [("weight", -1), ("bias", -1)]
    if isinstance(module, nn.PReLU):
        return [("weight", 0)]
    return None


class _Refused(Exception):
    """What the channels of a walk are or do that forbids a cut."""


def _group(model: nn.Module, walk: _Walk, outputs: set[Any], writers: tuple[str, ...]) -> Group:
    units = np.array(walk.units(), dtype=np.int64)
    count = int(units.max()) + 1
    try:
        if any(node.grad_fn in outputs and _is_out(walk.graph, side) for node, side in walk.labels):
            raise _Refused("are the network's outputs")
        if walk.lost:
            raise _Refused(walk.lost)
        if count < 2:
            raise _Refused("can only go all at once" if count else "meet a fixed number of zeros")
        found = _Assembly(model, walk, units)
        for (tensor, _), owners in found.owners.items():
            if len(set(np.bincount(owners[owners >= 0], minlength=count))) > 1:
                raise _Refused(f"come to {tensor} only in part")
    except _Refused as refusal:
        return Group(writers=writers, problem=str(refusal))
    return Group(
        writers=writers,
        readers=tuple(found.readers),
        cuts=tuple(Cut(tensor, axis, owners) for (tensor, axis), owners in found.owners.items()),
        units=count,
        channels=int((units >= 0).sum()),
        operations=frozenset(node.grad_fn.name() for node, _ in walk.labels if hasattr(node.grad_fn, "name")),
    )


class _Assembly:
    """The tensors that a walk came to: (name, axis) -> units. Raises ``_Refused``."""

    def __init__(self, model: nn.Module, walk: _Walk, units: Owners) -> None:
        self.owners: dict[tuple[str, int], Owners] = {}
        self.readers: list[str] = []
        self._graph, self._units = walk.graph, units
        self._names = names_of_tensors(model)
        paths = {module: path for path, module in model.named_modules()}
        for (node, side), labels in walk.labels.items():
            if isinstance(node.module, nn.Parameter):
                name, axis = self._names[id(node.module)], node.pruning_dim % node.module.ndim
                self._enter(name, axis, self._expanded(labels, node.module.shape[axis], name))
            elif node.module in paths:  # else it is an operation
                self._add_module(node, side, labels, paths[node.module])

    def _add_module(self, node: Any, side: Any, labels: Mapping[int, int], path: str) -> None:
        module, writes = node.module, _is_out(self._graph, side)
        places = _places(module, writes)
        if places is None:
            raise _Refused(f"come to {path}, a {type(module).__name__}, which cannot be cut")
        width = self._graph.get_out_channels(node) if writes else self._graph.get_in_channels(node)
        if width is None:  # one slope for all channels
            return
        owners = self._expanded(labels, width, path)
        if isinstance(module, (_ConvNd, nn.Linear)) and not writes:
            self.readers.append(path)
        for place, axis in places:
            holder, _, attribute = place.rpartition(".")
            tensor = getattr(module.get_submodule(holder), attribute, None)
            if tensor is None:
                continue
            if id(tensor) not in self._names:
                raise _Refused(f"come to {path}, which computes its {place} from others")
            # The weight of a grouped convolution has one axis for the channels of all groups: those at one place.
            length = tensor.shape[axis]
            if width % length:
                raise _Refused(f"cannot be followed to {path}")
            self._enter(self._names[id(tensor)], axis % tensor.ndim, owners.reshape(-1, length)[0])

    def _expanded(self, labels: Mapping[int, int], width: int, where: str) -> Owners:
        if max(labels, default=0) >= width:
            raise _Refused(f"cannot be followed to {where}")
        owners = np.full(width, -1, dtype=np.int64)
        owners[list(labels)] = self._units[list(labels.values())]
        return owners

    def _enter(self, name: str, axis: int, owners: Owners) -> None:
        before = self.owners.get((name, axis), owners)
        if ((before >= 0) & (owners >= 0) & (before != owners)).any():
            raise _Refused(f"meet each other in {name}")
        self.owners[name, axis] = np.maximum(before, owners)


class Trials:
    """Runs of a network with tensors given for its own, which show whether groups are what they seem.

    The weights are disturbed, so that none is by chance equal to another, or zero as initialised.

    Args:
        model: in evaluation mode, on the CPU; of single or double precision.
        example: what it takes.

    Raises:
        ValueError: the model gives numbers that are not finite.
    """

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        self._model, self._example = model, example
        for strength in (0.3, 0.0):  # without, where a parameter must keep its sign
            self._tensors = _disturbed(model, strength)
            self._whole = self._run(self._tensors)
            if all(t.isfinite().all() for t in self._whole):
                return
        raise ValueError("gives numbers that are not finite")

    def misaligned(self, groups: Sequence[Group]) -> list[Group]:
        """Those whose units cannot change places, the first with the last and so on, without changing the outputs.

        A network is a function of its channels in no order, whatever normalises or adds them up, as long as every
        tensor orders them alike. An index followed wrongly puts one tensor into another order.
        """
        return _guilty(groups, self._indifferent_to_order)

    def uncuttable(self, groups: Sequence[Group]) -> list[Group]:
        """Those without one of whose units the network fails, or gives outputs of another shape."""
        return _guilty(groups, self._runs_without)

    def _indifferent_to_order(self, groups: Sequence[Group]) -> bool:
        tensors = dict(self._tensors)
        for group in groups:
            for cut in group.cuts:
                places = np.argsort(cut.owners, kind="stable")[(cut.owners < 0).sum() :].reshape(group.units, -1)
                order = np.arange(len(cut.owners))
                order[places] = places[::-1]
                tensors[cut.tensor] = tensors[cut.tensor].index_select(cut.axis, torch.from_numpy(order))
        outputs = zip(self._whole, self._run(tensors), strict=True)
        return all((one - other).norm() <= _SAME * one.norm() for one, other in outputs)

    def _runs_without(self, groups: Sequence[Group]) -> bool:
        kept: dict[tuple[str, int], NDArray[np.bool_]] = defaultdict(lambda: np.array(True))
        for group in groups:
            for cut in group.cuts:
                kept[cut.tensor, cut.axis] = kept[cut.tensor, cut.axis] & (cut.owners != group.units // 2)
        tensors = dict(self._tensors)
        for (name, axis), keep in kept.items():
            tensors[name] = tensors[name].index_select(axis, torch.from_numpy(np.flatnonzero(keep)))
        holders = {name.rpartition(".")[0]: tensors[name] for name, _ in kept if name.endswith("weight")}
        before: list[tuple[nn.Module, str, Any]] = []
        try:
            for path, weight in holders.items():
                module = self._model.get_submodule(path)
                for attribute, value in _sizes(module, weight).items():
                    before.append((module, attribute, getattr(module, attribute)))
                    setattr(module, attribute, value)
            outputs = self._run(tensors)
        except Exception:  # whatever the model says to sizes that it does not take
            return False
        finally:
            for module, attribute, value in before:
                setattr(module, attribute, value)
        return [t.shape for t in outputs] == [t.shape for t in self._whole]

    def _run(self, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        with torch.no_grad():
            output = torch.func.functional_call(self._model, dict(tensors), (self._example.clone(),))
        return [t for t in tensors_of(output) if t.is_floating_point()]


_SAME = 1e-5
"""Relative distance of outputs that rounding explains. In 14 networks of timm it gave 1.5e-6, wrong indices 2e-4."""


def _disturbed(model: nn.Module, strength: float) -> dict[str, Tensor]:
    """Parameters with noise of so many times their spread (1 where they are all equal), and buffers as they are."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, tensor in model.named_parameters():
        spread = tensor.detach().std(correction=0)
        noise = torch.randn(tensor.shape, generator=generator).to(tensor)
        tensors[name] = tensor.detach() + strength * noise * torch.where(spread > 0, spread, 1)
    return tensors | dict(model.named_buffers())


def _guilty(groups: Sequence[Group], innocent: Callable[[Sequence[Group]], bool]) -> list[Group]:
    """Those that fail a test which all of the others pass together."""
    if not groups or innocent(groups):
        return []
    if len(groups) == 1:
        return list(groups)
    half = len(groups) // 2
    return _guilty(groups[:half], innocent) + _guilty(groups[half:], innocent)


def _sizes(module: nn.Module, weight: Tensor) -> dict[str, Any]:
    """The attributes by which a module knows the size of its weight, for another one."""
    if isinstance(module, _ConvNd):
        if _depthwise(module):
            return dict.fromkeys(("in_channels", "out_channels", "groups"), len(weight))
        sides = ("in_channels", "out_channels") if module.transposed else ("out_channels", "in_channels")
        return dict(zip(sides, (len(weight), weight.shape[1] * module.groups), strict=True))
    if isinstance(shape := getattr(module, "normalized_shape", None), tuple):
        return {"normalized_shape": (*shape[:-1], weight.shape[-1])}
    return {"num_features": len(weight)} if isinstance(module, _InstanceNorm) else {}
