"""Many policies of one network at once: what two of them compute alike is computed once.

The network is traced (torch.fx) and run node by node. Policies are taken in the order of the bits of their layers, as
these run; the values that are alive at each layer are kept while the next policy may need them, and a policy that
changes only late layers begins there.
"""

from __future__ import annotations

import copy
import operator
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from archfront.errors import InputError

Variant = Any
"""What one layer is under a policy: anything that is equal for the same layer, and orders with others as text."""

_OUT_OF_PLACE = {
    operator.iadd: operator.add, operator.isub: operator.sub, operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}  # fmt: skip


@dataclass(frozen=True)
class Sharing:
    """How much was computed.

    Attributes:
        layers: that all policies have together.
        computed: of them really run.
    """

    layers: int
    computed: int


class SharedPrefixes:
    """A network's outputs under many policies.

    Args:
        model: in evaluation mode; a copy of it is traced.
        paths: of the layers that a policy may change, in the order in which they run.
        run: computes a layer: path, the layer, its variant and its input to its output.
    """

    def __init__(
        self, model: nn.Module, paths: Sequence[str], run: Callable[[str, nn.Module, Variant, Tensor], Tensor]
    ) -> None:
        self._run = run
        self._paths = list(paths)
        network = copy.deepcopy(model).eval()
        for module in network.modules():
            # What is written in place would change the values that other policies begin from.
            if getattr(module, "inplace", False) is True:
                module.inplace = False  # type: ignore[assignment]
        self._graph = _traced(network, self._paths)
        self._network = network
        self.sharing = Sharing(0, 0)

    @property
    def shares(self) -> bool:
        """Whether the network could be traced; else every policy is run as a whole."""
        return self._graph is not None

    def outputs(self, inputs: Tensor, policies: Sequence[Mapping[str, Variant]]) -> list[Tensor]:
        """Outputs ``(n, ...)`` of each policy, path -> variant, without gradients.

        Raises:
            InputError: a policy lacks a layer.
        """
        rows = []
        for policy in policies:
            if missing := [path for path in self._paths if path not in policy]:
                raise InputError("policy", dict(policy), f"lacks {missing[0]}", "Name every layer.")
            rows.append([policy[path] for path in self._paths])
        with torch.no_grad():
            if self._graph is None:
                return [self._whole(inputs, row) for row in rows]
            return self._shared(self._graph, inputs, rows)

    def _shared(self, graph: _Graph, inputs: Tensor, rows: Sequence[Sequence[Variant]]) -> list[Tensor]:
        order = sorted(range(len(rows)), key=lambda i: [repr(rows[i][k]) for k in graph.order])
        found: list[Tensor | None] = [None] * len(rows)
        # For each layer that has been reached: the values that were alive before it.
        before: list[dict[fx.Node, Any]] = [graph.start(inputs)]
        previous: Sequence[Variant] | None = None
        computed = 0
        for position, i in enumerate(order):
            mine = [rows[i][k] for k in graph.order]
            alike = 0 if previous is None else _common(previous, mine)
            if previous is not None and alike == len(mine):
                found[i] = found[order[position - 1]]
                continue
            del before[alike + 1 :]
            values = dict(before[alike])
            for stage in range(alike, len(mine)):
                node = graph.layers[stage]
                path = str(node.target)
                layer = self._network.get_submodule(path)
                values[node] = self._run(path, layer, mine[stage], values[node.args[0]])
                computed += 1
                graph.finish(stage, values)
                if stage + 1 < len(mine):
                    before.append(dict(values))
            found[i] = values[graph.output]
            previous = mine
        self.sharing = Sharing(len(rows) * len(graph.layers), computed)
        return [output for output in found if output is not None]

    def _whole(self, inputs: Tensor, row: Sequence[Variant]) -> Tensor:
        layers = [self._network.get_submodule(path) for path in self._paths]
        called: set[str] = set()
        for path, layer, variant in zip(self._paths, layers, row, strict=True):

            def replaced(x: Tensor, path: str = path, layer: nn.Module = layer, variant: Variant = variant) -> Tensor:
                called.add(path)
                return self._run(path, layer, variant, x)

            layer.forward = replaced
        # torch's fast path of attention reads its layers' weights without running them.
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            output: Tensor = self._network(inputs)
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
            for layer in layers:
                del layer.forward
        if bypassed := [path for path in self._paths if path not in called]:
            warnings.warn(f"{', '.join(bypassed)} did not run: a policy has no effect there", stacklevel=3)
        self.sharing = Sharing(len(row), len(row))
        return output


class _Graph:
    """A traced network, cut behind each of its layers.

    Attributes:
        layers: their nodes, in the order in which they run.
        order: for each of them its index among the paths.
        output: the node whose value the network gives.
    """

    def __init__(self, network: nn.Module, graph: fx.Graph, paths: Sequence[str]) -> None:
        self._interpreter = fx.Interpreter(fx.GraphModule(network, graph), garbage_collect_values=False)
        nodes = list(graph.nodes)
        known = set(paths)
        self.layers = [n for n in nodes if n.op == "call_module" and str(n.target) in known]
        self.order = [paths.index(str(n.target)) for n in self.layers]
        [end] = [n for n in nodes if n.op == "output"]
        self.output: fx.Node = end.args[0]
        cuts = [nodes.index(n) for n in self.layers]
        # The nodes between two layers run with the one before them.
        self._head = nodes[: cuts[0]]
        self._tails = [nodes[a + 1 : b] for a, b in zip(cuts, [*cuts[1:], nodes.index(end)], strict=True)]
        last = {n: max([nodes.index(u) for u in n.users], default=-1) for n in nodes}
        self._dead = [
            [n for n in nodes[: cut + 1] if n is not self.output and last[n] <= cut - 1]
            for cut in [*cuts[1:], len(nodes)]
        ]

    def start(self, inputs: Tensor) -> dict[fx.Node, Any]:
        """All values before the first layer."""
        values: dict[fx.Node, Any] = {}
        for node in self._head:
            if node.op == "placeholder":  # what follows the images has a default
                values[node] = node.args[0] if node.args else inputs
            else:
                values[node] = self._value(node, values)
        return values

    def finish(self, stage: int, values: dict[fx.Node, Any]) -> None:
        """Run what stands between this layer and the next, and forget what nothing behind it reads."""
        for node in self._tails[stage]:
            values[node] = self._value(node, values)
        for node in self._dead[stage]:
            values.pop(node, None)

    def _value(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        self._interpreter.env = values  # type: ignore[assignment]
        return self._interpreter.run_node(node)


class _Tracer(fx.Tracer):
    """Keeps whole the layers, and whatever torch itself offers as a module."""

    def __init__(self, paths: Sequence[str]) -> None:
        super().__init__()
        self._kept = set(paths)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name in self._kept or super().is_leaf_module(m, module_qualified_name)


def _traced(network: nn.Module, paths: Sequence[str]) -> _Graph | None:
    try:
        graph = _Tracer(paths).trace(network)
    except Exception as error:  # tracing fails in as many ways as there are models
        warnings.warn(
            f"{type(network).__name__} cannot be traced ({type(error).__name__}: {str(error).splitlines()[0]}): each "
            "policy is run as a whole, which is slower",
            stacklevel=3,
        )
        return None
    for node in graph.nodes:
        if node.op == "call_function" and node.target in _OUT_OF_PLACE:
            node.target = _OUT_OF_PLACE[node.target]
        if node.kwargs.get("inplace") is True:
            node.kwargs = {**node.kwargs, "inplace": False}
        name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
        in_place = node.op in ("call_method", "call_function") and name.endswith("_") and not name.endswith("__")
        if in_place or "out" in node.kwargs:
            warnings.warn(f"{name} works in place: each policy is run as a whole", stacklevel=3)
            return None
    [end] = [n for n in graph.nodes if n.op == "output"]
    if not isinstance(end.args[0], fx.Node):
        raise InputError("model", type(network).__name__, "gives something else than one tensor", "Give its logits.")
    called = [str(n.target) for n in graph.nodes if n.op == "call_module" and str(n.target) in set(paths)]
    if sorted(called) != sorted(paths):
        warnings.warn("layers run more than once, or not as modules: each policy is run as a whole", stacklevel=3)
        return None
    return _Graph(network, graph, paths)


def _common(first: Sequence[Variant], second: Sequence[Variant]) -> int:
    """How many they have in common at the beginning."""
    for i, (one, other) in enumerate(zip(first, second, strict=True)):
        if one != other:
            return i
    return len(first)
