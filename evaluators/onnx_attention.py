"""Attention in ONNX files as the one operator that ONNX Runtime has for it. A leaf of numpy and onnx.

Exported, attention is some thirty small operators that cut queries, keys and values out of one tensor and turn them:
half of all operators of a small transformer. What they take from where is found by running them on places instead of
values, so that it does not matter how an exporter wrote it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

_DOMAIN = "com.microsoft"
_MOVING = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Split", "Gather", "Identity")
"""Operators that put values elsewhere and leave them as they are."""
_OF_SHAPES = ("Shape", "Slice", "Gather", "Concat", "Squeeze", "Unsqueeze", "Cast")
"""Operators that calculate where to."""
_SAMPLES = (3, 7)
"""That stand for any number of samples: what holds for both is no coincidence."""
_FLOATS = (1, 10)
"""ONNX's numbers of float32 and float16, which the runtime's operator takes."""

Values = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class _Read:
    """What a product reads.

    Attributes:
        tensor: that its values are cut out of, ``(samples, tokens, features)``.
        places: where each lies in it, flat.
        scale: that they were multiplied by.
    """

    tensor: str
    places: npt.NDArray[np.int64]
    scale: float


@dataclass(frozen=True)
class _Attention:
    """What is merged.

    Attributes:
        tensors: that queries, keys and values are cut out of: three, or one that has them beside each other.
        widths: features of each.
        output: name of the value that is made of them.
    """

    tensors: tuple[str, ...]
    widths: tuple[int, ...]
    heads: int
    scale: float
    output: str


class _File:
    """Operators of a file, and what values they hand on.

    Attributes:
        samples: number of samples where the file leaves it open.
    """

    samples: int

    def __init__(self, model: Any) -> None:
        from onnx import numpy_helper, shape_inference

        self.graph = model.graph
        self.constants: Values = {one.name: numpy_helper.to_array(one) for one in self.graph.initializer}
        self.makers = {output: node for node in self.graph.node for output in node.output}
        self.outputs = {one.name for one in self.graph.output}
        self.readers: dict[str, list[Any]] = {}
        for node in self.graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        inferred = shape_inference.infer_shapes(model).graph
        self.infos = {info.name: info for info in (*inferred.value_info, *inferred.input)}

    def shape(self, name: str) -> tuple[int, ...] | None:
        """None if more than the number of samples is unknown, or it is not of floats."""
        if name not in self.infos or self.infos[name].type.tensor_type.elem_type not in _FLOATS:
            return None
        dims = [dim.dim_value for dim in self.infos[name].type.tensor_type.shape.dim]
        return (dims[0] or self.samples, *dims[1:]) if dims and all(dims[1:]) else None

    def next(self, node: Any, kind: str) -> Any | None:
        """What alone reads an operator's output first of all, if it is of this kind."""
        found = self.readers.get(node.output[0], [])
        if len(found) != 1 or node.output[0] in self.outputs:
            return None
        return found[0] if found[0].op_type == kind and found[0].input[0] == node.output[0] else None

    def scaled(self, name: str) -> tuple[str, float]:
        """A value without the number that it was multiplied by, and that number."""
        node, factor = self.makers.get(name), 1.0
        while node is not None and node.op_type in ("Mul", "Div"):
            known = [one for one in node.input if one in self.constants and self.constants[one].shape in ((), (1,))]
            if len(known) != 1 or (node.op_type == "Div" and known[0] == node.input[0]):
                break
            number = float(self.constants[known[0]].reshape(()))
            if number == 0:
                break
            factor *= number if node.op_type == "Mul" else 1 / number
            name = next(one for one in node.input if one != known[0])
            node = self.makers.get(name)
        return name, factor

    def read(self, name: str) -> _Read | None:
        """What a product's input is cut out of: back over all that only moves or scales."""
        steps: list[tuple[str, str, Any]] = []  # what there is after it, before it, and the operator between
        scale, at = 1.0, name
        while True:
            before, factor = self.scaled(at)
            if before != at:
                steps.append((at, before, None))
                scale, at = scale * factor, before
            node = self.makers.get(at)
            if node is None or node.op_type not in _MOVING or node.input[0] in self.constants:
                break
            steps.append((at, node.input[0], node))
            at = node.input[0]
        shape = self.shape(at)
        if shape is None or len(shape) != 3:
            return None
        values: Values = {at: np.arange(np.prod(shape), dtype=np.int64).reshape(shape)}
        for after, before, node in reversed(steps):
            found = values[before] if node is None else self.run(node, after, values)
            if found is None:
                return None
            values[after] = found
        return _Read(at, values[name], scale)

    def run(self, node: Any, output: str, values: Values) -> npt.NDArray[Any] | None:
        """An operator's output, if its inputs are known or follow from shapes of known values."""
        from onnx.reference import ReferenceEvaluator

        given: Values = {}
        for name in node.input:
            found = values.get(name, self.constants.get(name))
            if found is None and name in self.makers and self.makers[name].op_type in _OF_SHAPES:
                found = self.run(self.makers[name], name, values)
            if found is None and name:
                return None
            if found is not None:
                given[name] = found
        try:
            made: Any = ReferenceEvaluator(node).run(None, given)
        except Exception:  # whatever numpy says of so many samples: then it is not what is sought
            return None
        return np.asarray(made[list(node.output).index(output)])


def merge_attention(model: Any) -> int:
    """Put ONNX Runtime's operator in the place of attention, in place.

    Attention without a mask, whose heads lie one after another in the features of a token, as timm has it; other
    attention stays as it is, and so does every file with branches or loops.

    Args:
        model: a float file.

    Returns:
        How many were merged.
    """
    if has_bodies(model.graph):
        return 0
    file = _File(model)
    merged = 0
    for node in [node for node in file.graph.node if node.op_type == "Softmax"]:
        found = set()
        for file.samples in _SAMPLES:
            found.add(_attention(file, node))
        [one, *others] = found
        if one is not None and not others:
            _merge(file, one)
            merged += 1
    if merged:
        _drop_unread(file.graph)
        if all(one.domain != _DOMAIN for one in model.opset_import):
            from onnx import helper

            model.opset_import.append(helper.make_opsetid(_DOMAIN, 1))
    return merged


def has_bodies(graph: Any) -> bool:
    """Whether operators have graphs of their own, which read values of this one without saying so."""
    return any(one.HasField("g") or one.graphs for node in graph.node for one in node.attribute)


def _attention(file: _File, softmax: Any) -> _Attention | None:
    """The attention that a softmax is part of."""
    scores, scale = file.scaled(softmax.input[0])
    product = file.makers.get(scores)
    weighted = file.next(softmax, "MatMul")
    turned = weighted and file.next(weighted, "Transpose")
    joined = turned and file.next(turned, "Reshape")
    if product is None or product.op_type != "MatMul" or weighted is None or joined is None or not _over_last(softmax):
        return None
    query, key, value = (file.read(name) for name in (*product.input, weighted.input[1]))
    if query is None or key is None or value is None or value.scale != 1 or key.places.ndim != 4:
        return None
    reads = (query, _Read(key.tensor, key.places.swapaxes(-1, -2), key.scale), value)
    if not _beside_each_other(file, reads):
        return None
    if not _joins_heads(file, turned, joined, (*query.places.shape[:3], value.places.shape[3])):
        return None
    tensors = tuple(dict.fromkeys(one.tensor for one in reads))
    return _Attention(
        tensors if len(tensors) == 1 else tuple(one.tensor for one in reads),
        tuple(one.places.shape[1] * one.places.shape[3] for one in reads),
        query.places.shape[1],
        scale * query.scale * key.scale,
        joined.output[0],
    )


def _merge(file: _File, found: _Attention) -> None:
    from onnx import helper, numpy_helper

    new, inputs, name = [], list(found.tensors), f"{found.output}_attention"
    if len(inputs) == 1:
        inputs = [f"{name}_{part}" for part in ("query", "key", "value")]
        widths = np.array(found.widths, dtype=np.int64)
        file.graph.initializer.append(numpy_helper.from_array(widths, f"{name}_widths"))
        new.append(helper.make_node("Split", [*found.tensors, f"{name}_widths"], inputs, f"{name}_split", axis=-1))
    new.append(
        helper.make_node(
            "MultiHeadAttention", inputs, [found.output], name, domain=_DOMAIN,
            num_heads=found.heads, scale=found.scale,
        )
    )  # fmt: skip
    if found.output in file.infos and all(one.name != found.output for one in file.graph.value_info):
        file.graph.value_info.append(file.infos[found.output])  # no shape is inferred over the new operator
    joined = file.makers[found.output]
    place = list(file.graph.node).index(joined)
    file.graph.node.remove(joined)
    for one in reversed(new):
        file.graph.node.insert(place, one)


def _over_last(softmax: Any) -> bool:
    return all(a.i in (-1, 3) for a in softmax.attribute if a.name == "axis")


def _beside_each_other(file: _File, reads: Sequence[_Read]) -> bool:
    """Whether queries, keys and values have heads beside each other, in whole tensors of their own, or one after the
    other in one."""
    one = len({read.tensor for read in reads}) == 1
    query, key, value = (read.places.shape for read in reads)
    if {len(query), len(key), len(value)} != {4} or not query[:2] == key[:2] == value[:2]:
        return False
    if query[3] != key[3] or key[2] != value[2]:
        return False
    start, length = 0, 0
    for read in reads:
        samples, heads, tokens, width = read.places.shape
        shape, features = file.shape(read.tensor), heads * width
        if shape is None or shape[:2] != (samples, tokens) or start + features > shape[2]:
            return False
        every = np.arange(np.prod(shape), dtype=np.int64).reshape(shape)[:, :, start : start + features]
        if not np.array_equal(read.places, every.reshape(samples, tokens, heads, width).transpose(0, 2, 1, 3)):
            return False
        start, length = (start + features if one else 0), shape[2]
        if not one and features != length:
            return False
    return not one or start == length


def _joins_heads(file: _File, turned: Any, joined: Any, shape: tuple[int, ...]) -> bool:
    """Whether heads get beside each other in the features of a token."""
    places = np.arange(np.prod(shape), dtype=np.int64).reshape(shape)
    values = {turned.input[0]: places}
    found = file.run(turned, turned.output[0], values)
    if found is None:
        return False
    joint = file.run(joined, joined.output[0], {**values, turned.output[0]: found})
    samples, heads, tokens, width = shape
    return joint is not None and np.array_equal(
        joint, places.transpose(0, 2, 1, 3).reshape(samples, tokens, heads * width)
    )


def _drop_unread(graph: Any) -> None:
    """Remove operators and constants that nothing reads any more."""
    while True:
        read = {name for node in graph.node for name in node.input} | {one.name for one in graph.output}
        unread = [node for node in graph.node if read.isdisjoint(node.output)]
        if not unread:
            break
        for node in unread:
            graph.node.remove(node)
    for one in [one for one in graph.initializer if one.name not in read]:
        graph.initializer.remove(one)
