"""Int8 files of ONNX Runtime whose convolutions keep channels last.

Its int8 convolution wants channels last, and so the runtime turns each one's input and output around. Between two
convolutions these turns cancel, but at a sum they stay. Here convolutions, the sums between them and means over all
places become the runtime's own operators of quantised tensors with channels last, and only what other operators read is
turned.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

_DOMAIN = "com.microsoft"
_LAST, _FIRST = (0, 2, 3, 1), (0, 3, 1, 2)


@dataclass(frozen=True)
class _Codes:
    """A tensor of codes, with the names of its scale and zero point."""

    name: str
    scale: str
    zero: str

    @property
    def inputs(self) -> tuple[str, str, str]:
        return self.name, self.scale, self.zero

    @property
    def turned(self) -> str:
        """The same with channels last."""
        return f"{self.name}_channels_last"


class _Graph:
    """What nodes and initializers of a file are to each other."""

    def __init__(self, model: Any) -> None:
        import onnx

        self.graph = model.graph
        self.constants = {one.name: one for one in self.graph.initializer}
        self.makers = {output: node for node in self.graph.node for output in node.output}
        self.readers: dict[str, int] = {one.name: 1 for one in self.graph.output}
        for node in self.graph.node:
            for name in node.input:
                self.readers[name] = self.readers.get(name, 0) + 1
        inferred = onnx.shape_inference.infer_shapes(model).graph
        self.shapes = {
            info.name: tuple(d.dim_param or d.dim_value for d in info.type.tensor_type.shape.dim)
            for info in (*inferred.value_info, *inferred.input, *inferred.output)
        }

    def array(self, name: str) -> npt.NDArray[Any]:
        import onnx

        return np.asarray(onnx.numpy_helper.to_array(self.constants[name]))

    def codes(self, value: str) -> _Codes | None:
        """What a dequantised value was made of."""
        maker = self.makers.get(value)
        if maker is None or maker.op_type != "DequantizeLinear" or len(maker.input) < 3:
            return None
        return _Codes(*maker.input)

    def lone_maker(self, value: str) -> Any | None:
        """The node that makes a value, if it is read once."""
        return self.makers.get(value) if self.readers.get(value) == 1 else None


def use_channels_last(model: Any) -> int:
    """Rewrite a file of ``quantize_static`` in the format QDQ, in place.

    It computes the same, but that means are rounded to codes from sums of integers, of which none is rounded before.

    Returns:
        How many convolutions keep channels last.
    """
    known = _Graph(model)
    written = _Rewriting(known)
    for node in known.graph.node:
        written.take(node)
    if written.convolutions:
        _replace(model, written.nodes)
    return written.convolutions


class _Rewriting:
    """The nodes of a file as they are written anew, in order.

    Attributes:
        turned: names of codes that stand there with channels last too.
    """

    def __init__(self, known: _Graph) -> None:
        self.known, self.turned = known, set[str]()
        self.nodes: list[Any] = []
        self.convolutions = 0

    def take(self, node: Any) -> None:
        found = _quantised(self.known, node)
        if found is None:
            self.nodes.append(node)
        elif found[0].op_type == "Conv":
            self.convolutions += 1
            self._give(self._convolution(*found), found[1])
        elif not all(operand.name in self.turned for operand in self._operands(found[0])):
            # Neither needs an order of its own: they follow what they read.
            self.nodes.append(node)
        elif found[0].op_type == "Add":
            self._give(self._sum(*found), found[1])
        else:
            self._give(self._mean(*found), found[1], flat=not _keeps_places(found[0]))

    def _operands(self, node: Any) -> list[_Codes]:
        """What a sum or a mean reads."""
        inputs = node.input if node.op_type == "Add" else node.input[:1]
        return [codes for codes in map(self.known.codes, inputs) if codes is not None]

    def _convolution(self, node: Any, codes: _Codes) -> Any:
        from onnx import helper

        given, weight = self.known.codes(node.input[0]), self.known.codes(node.input[1])
        assert given is not None
        assert weight is not None
        inputs = [self._last(given), given.scale, given.zero, *weight.inputs, codes.scale, codes.zero]
        if len(node.input) > 2:
            inputs.append(self.known.makers[node.input[2]].input[0])
        made = helper.make_node("QLinearConv", inputs, [codes.turned], node.name, domain=_DOMAIN, channels_last=1)
        made.attribute.extend(a for a in node.attribute if a.name != "auto_pad")
        return made

    def _sum(self, node: Any, codes: _Codes) -> Any:
        from onnx import helper

        inputs = [name for one in self._operands(node) for name in (one.turned, one.scale, one.zero)]
        return helper.make_node(
            "QLinearAdd", [*inputs, codes.scale, codes.zero], [codes.turned], node.name, domain=_DOMAIN
        )

    def _mean(self, node: Any, codes: _Codes) -> Any:
        from onnx import helper

        [read] = self._operands(node)
        inputs = [read.turned, read.scale, read.zero, codes.scale, codes.zero]
        return helper.make_node(
            "QLinearGlobalAveragePool", inputs, [codes.turned], node.name, domain=_DOMAIN, channels_last=1
        )

    def _give(self, made: Any, codes: _Codes, *, flat: bool = False) -> None:
        """Take a node's codes, also in the former order: what nobody reads goes again in ``_replace``.

        Args:
            flat: the former had no places.
        """
        from onnx import helper

        if flat:
            former = helper.make_node("Flatten", [codes.turned], [codes.name], axis=1)
        else:
            self.turned.add(codes.name)
            former = helper.make_node("Transpose", [codes.turned], [codes.name], perm=_FIRST)
        self.nodes += [made, former]

    def _last(self, codes: _Codes) -> str:
        from onnx import helper

        if codes.name not in self.turned:
            self.turned.add(codes.name)
            self.nodes.append(helper.make_node("Transpose", [codes.name], [codes.turned], perm=_LAST))
        return codes.turned


def _quantised(known: _Graph, node: Any) -> tuple[Any, _Codes] | None:
    """The convolution, sum or mean whose codes a node gives, and these; None where there is none of codes alone."""
    if node.op_type != "QuantizeLinear" or len(node.input) < 3:
        return None
    codes = _Codes(node.output[0], node.input[1], node.input[2])
    scale, zero = known.array(codes.scale), known.array(codes.zero)
    if scale.size != 1 or zero.dtype != np.uint8:
        return None
    main = known.lone_maker(node.input[0])
    if main is not None and main.op_type in ("Relu", "Clip"):
        if not _holds(known, main, float(scale), int(zero)):
            return None
        main = known.lone_maker(main.input[0])
    if main is None or not any(fits(known, main) for fits in (_is_convolution, _is_sum, _is_mean)):
        return None
    return main, codes


def _holds(known: _Graph, node: Any, scale: float, zero: int) -> bool:
    """Whether no code stands for what an activation cuts off."""
    bounds = [0.0, math.inf]
    if node.op_type == "Clip":
        names = [*node.input[1:], "", ""][:2]
        if any(name and name not in known.constants for name in names):
            return False
        bounds = [
            float(known.array(name)) if name else end for name, end in zip(names, (-math.inf, math.inf), strict=True)
        ]
    slack = scale / 2
    return bounds[0] <= -zero * scale + slack and (255 - zero) * scale <= bounds[1] + slack


def _is_convolution(known: _Graph, node: Any) -> bool:
    if node.op_type != "Conv":
        return False
    given, weight = known.codes(node.input[0]), known.codes(node.input[1])
    if given is None or weight is None or weight.name not in known.constants:
        return False
    if known.array(given.zero).dtype != np.uint8 or known.array(given.scale).size != 1:
        return False
    if known.array(weight.name).ndim != 4 or known.array(weight.zero).any():
        return False
    if any(a.name == "auto_pad" and a.s not in (b"", b"NOTSET") for a in node.attribute):
        return False
    if len(node.input) < 3:
        return True
    bias = known.makers.get(node.input[2])
    return bias is not None and bias.op_type == "DequantizeLinear" and bias.input[0] in known.constants


def _is_sum(known: _Graph, node: Any) -> bool:
    if node.op_type != "Add":
        return False
    shapes = [known.shapes.get(name) for name in node.input]
    return shapes[0] is not None and shapes[0] == shapes[1] and all(known.codes(name) for name in node.input)


def _is_mean(known: _Graph, node: Any) -> bool:
    """Over height and width of quantised planes."""
    if node.op_type not in ("GlobalAveragePool", "ReduceMean"):
        return False
    read = known.codes(node.input[0])
    if read is None or known.array(read.zero).dtype != np.uint8 or known.array(read.scale).size != 1:
        return False
    if len(known.shapes.get(node.input[0], ())) != 4:
        return False
    if node.op_type == "GlobalAveragePool":
        return True
    axes = [a.ints for a in node.attribute if a.name == "axes"]
    if len(node.input) > 1:
        axes = [known.array(node.input[1]).tolist()] if node.input[1] in known.constants else []
    return len(axes) == 1 and {axis % 4 for axis in axes[0]} == {2, 3}


def _keeps_places(node: Any) -> bool:
    return node.op_type == "GlobalAveragePool" or all(a.i for a in node.attribute if a.name == "keepdims")


def _replace(model: Any, nodes: Sequence[Any]) -> None:
    """Give a file these nodes, without those that nobody needs, nor constants that nobody reads."""
    from onnx import helper

    graph = model.graph
    kept = list(_needed(nodes, {one.name for one in graph.output}))[::-1]
    read = {name for node in kept for name in node.input}
    constants = [one for one in graph.initializer if one.name in read]
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.node.extend(kept)
    graph.initializer.extend(constants)
    if all(one.domain != _DOMAIN for one in model.opset_import):
        model.opset_import.append(helper.make_opsetid(_DOMAIN, 1))


def _needed(nodes: Sequence[Any], wanted: set[str]) -> Iterator[Any]:
    """The last first."""
    for node in reversed(nodes):
        if wanted & set(node.output):
            wanted |= set(node.input)
            yield node
