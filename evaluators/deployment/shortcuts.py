"""Shortcuts of residual networks without weights (He et al., 2016, option A), as convolutions that compute the same.

Every second pixel and channels of zeros beside: a runtime has no such operators for codes, and would take the sum that
reads them out of int8. As a convolution of one pixel whose weights are 0 and 1 it stays in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from archfront.evaluators.deployment.layer_times import NO_LAYER

_END = 2**31 - 1
"""From here on an index means the end of an axis."""


@dataclass
class _Shortcut:
    """Operators in their order, and what they do together.

    Attributes:
        steps: of the spatial axes.
        pads: channels of zeros before and after.
    """

    nodes: list[Any] = field(default_factory=list)
    steps: dict[int, int] = field(default_factory=lambda: {2: 1, 3: 1})
    pads: tuple[int, int] = (0, 0)


def merge_shortcuts(model: Any, within: Sequence[Any]) -> list[Any]:
    """Replace shortcuts in a float file by convolutions, in place.

    Args:
        model: the file.
        within: operators that may be part of one.

    Returns:
        ``within``, with a convolution in place of each shortcut.
    """
    import onnx
    from onnx import helper, numpy_helper

    graph = model.graph
    constants = {one.name: numpy_helper.to_array(one) for one in graph.initializer}
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    inferred = onnx.shape_inference.infer_shapes(model).graph
    channels = {
        info.name: info.type.tensor_type.shape.dim[1].dim_value
        for info in (*inferred.value_info, *inferred.input)
        if len(info.type.tensor_type.shape.dim) == 4
    }
    allowed = {node.name for node in within}
    left, made = list(within), 0
    for node in list(graph.node):
        found = _followed(node, constants, readers, allowed)
        width = channels.get(node.input[0], 0) if found else 0
        if found is None or not width:
            continue
        before, after = found.pads
        weight = np.zeros((before + width + after, width, 1, 1), dtype=np.float32)
        weight[before + np.arange(width), np.arange(width)] = 1.0
        name = f"{NO_LAYER}shortcut_{made}"
        made += 1
        graph.initializer.append(numpy_helper.from_array(weight, f"{name}.weight"))
        convolution = helper.make_node(
            "Conv", [node.input[0], f"{name}.weight"], list(found.nodes[-1].output), name,
            kernel_shape=[1, 1], strides=[found.steps[2], found.steps[3]],
        )  # fmt: skip
        gone = {one.name for one in found.nodes}
        place = next(i for i, one in enumerate(graph.node) if one.name == found.nodes[-1].name)
        graph.node.insert(place, convolution)
        for one in found.nodes:
            graph.node.remove(one)
        left = [one for one in left if one.name not in gone] + [convolution]
        allowed -= gone
    read = {name for node in graph.node for name in node.input}
    unread = [one for one in graph.initializer if one.name not in read]
    for one in unread:
        graph.initializer.remove(one)
    return left


def _followed(
    node: Any, constants: dict[str, Any], readers: dict[str, list[Any]], allowed: set[str]
) -> _Shortcut | None:
    """The shortcut that begins with an operator, to its end: each is read by the next alone."""
    found = _Shortcut()
    while node.name in allowed and node.op_type == "Slice" and _sliced(node, constants, found.steps):
        found.nodes.append(node)
        following = readers.get(node.output[0], [])
        if len(following) != 1:
            break
        node = following[0]
    if not found.nodes:
        return None
    pads = _padded(node, constants) if node.name in allowed and node.op_type == "Pad" else None
    if pads is not None and node.input[0] == found.nodes[-1].output[0]:
        found.nodes.append(node)
        found.pads = pads
    return found


def _sliced(node: Any, constants: dict[str, Any], steps: dict[int, int]) -> bool:
    """Whether it takes every so many rows or columns from the first on; notes how many."""
    if len(node.input) < 5 or any(name not in constants for name in node.input[1:5]):
        return False
    starts, ends, axes, by = (constants[name].tolist() for name in node.input[1:5])
    if any(start != 0 for start in starts) or any(end < _END for end in ends):
        return False
    if any(axis not in (2, 3) or step < 1 for axis, step in zip(axes, by, strict=True)):
        return False
    for axis, step in zip(axes, by, strict=True):
        steps[axis] *= step
    return True


def _padded(node: Any, constants: dict[str, Any]) -> tuple[int, int] | None:
    """Channels of zeros before and after, if it adds nothing else."""
    if any(a.name == "mode" and a.s != b"constant" for a in node.attribute):
        return None
    if len(node.input) > 3 or node.input[1] not in constants:
        return None
    if len(node.input) > 2 and node.input[2] and np.any(constants.get(node.input[2], 1.0)):
        return None
    pads = constants[node.input[1]].tolist()
    if len(pads) != 8 or min(pads) < 0 or any(pads[i] for i in (0, 2, 3, 4, 6, 7)):
        return None
    return pads[1], pads[5]
