"""Tokens in ONNX files that nothing reads. A leaf of numpy and onnx.

A classifier that reads its class token alone needs of its last block what that token needs: keys and values of all
tokens, but one query, and one token in all that follows. A runtime computes the others too, and drops them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from archfront.evaluators.onnx_attention import has_bodies

_ALONE = ("LayerNormalization", "Gelu", "Relu", "Sigmoid", "Tanh", "Erf", "Identity")
_OF_NUMBERS = ("Add", "Sub", "Mul", "Div")
_TOKENS = 1
"""The axis of tokens in ``(samples, tokens, features)``."""


def drop_unread_tokens(model: Any) -> int:
    """Compute the one token that is taken at the end as early as can be, and no other, in place.

    Files with branches or loops stay as they are.

    Args:
        model: a float file.

    Returns:
        How many operators compute one token alone since then.
    """
    if has_bodies(model.graph):
        return 0
    file = _File(model)
    wanted: dict[str, int | None] = {one.name: None for one in file.graph.output}  # a token, or None: all
    narrow: dict[str, int] = {}
    for node in reversed(file.graph.node):  # whoever reads a value comes before it
        token = wanted.get(node.output[0])
        through = file.through(node) if token is not None else []
        if token is not None and through:
            narrow[node.output[0]] = token
        if (taken := file.taken(node)) is not None:
            _want(wanted, node.input[:1], taken)
        else:
            _want(wanted, through, token)
            _want(wanted, [name for name in node.input if name not in through], None)
    if narrow:
        file.rewrite(narrow)
    return len(narrow)


def _want(wanted: dict[str, int | None], names: Iterable[str], token: int | None) -> None:
    for name in names:
        wanted[name] = token if wanted.get(name, token) == token else None


class _File:
    def __init__(self, model: Any) -> None:
        from onnx import numpy_helper, shape_inference

        self.graph = model.graph
        self.constants = {one.name: numpy_helper.to_array(one) for one in self.graph.initializer}
        inferred = shape_inference.infer_shapes(model).graph
        self.shapes = {
            one.name: tuple(dim.dim_value for dim in one.type.tensor_type.shape.dim)
            for one in (*inferred.value_info, *inferred.input)
        }

    def taken(self, node: Any) -> int | None:
        """Which token an operator takes of what it reads."""
        axis = next((one.i for one in node.attribute if one.name == "axis"), 0)
        if node.op_type != "Gather" or axis != _TOKENS or len(self.shapes.get(node.input[0], ())) != 3:
            return None
        index = self.constants.get(node.input[1])
        return int(index) if index is not None and index.ndim == 0 else None

    def through(self, node: Any) -> list[str]:
        """What an operator needs a token of, to compute that token; nothing if it needs more of all that it reads."""
        if len(node.output) != 1 or not node.input:
            return []
        known = self.shapes.get(node.input[0], ())
        read = [name for name in node.input if name and name not in self.constants]
        if node.op_type in _ALONE:
            axis = next((one.i for one in node.attribute if one.name == "axis"), -1)
            return read[:1] if len(known) == 3 and axis in (-1, 2) else []
        if node.op_type == "MatMul":
            weight = self.constants.get(node.input[1])
            return read if weight is not None and weight.ndim == 2 and len(known) == 3 else []
        if node.op_type == "MultiHeadAttention":
            return read[:1] if len(read) == 3 and len(set(read)) == 3 else []
        if node.op_type in _OF_NUMBERS:
            tokens = {self.shapes.get(name, ())[_TOKENS:-1] for name in read}
            same = [self.constants[name].shape for name in node.input if name in self.constants]
            alike = len(tokens) == 1 and all(len(found) == 1 and found[0] for found in tokens)
            return read if alike and all(np.prod(shape[:-1]) == 1 for shape in same) else []
        return []

    def rewrite(self, narrow: dict[str, int]) -> None:
        """Let operators compute one token whose output is of one."""
        from onnx import helper, numpy_helper

        nodes: list[Any] = []
        cut: dict[tuple[str, int], str] = {}

        def constant(name: str, value: int) -> str:
            if name not in self.constants:
                self.constants[name] = np.array([value], dtype=np.int64)
                self.graph.initializer.append(numpy_helper.from_array(self.constants[name], name))
            return name

        def one(name: str, token: int) -> str:
            if name in narrow:
                return name
            if (name, token) not in cut:
                cut[name, token] = f"{name}_token_of_{token}"
                index = constant(f"archfront_token_{token}", token)
                nodes.append(
                    helper.make_node("Gather", [name, index], [cut[name, token]], cut[name, token], axis=_TOKENS)
                )
            return cut[name, token]

        for node in self.graph.node:
            token = narrow.get(node.output[0])
            if token is not None:
                through = self.through(node)
                inputs = [one(name, token) if name in through else name for name in node.input]
                del node.input[:]
                node.input.extend(inputs)
            elif node.op_type == "Gather" and node.input[0] in narrow:
                axes = constant("archfront_tokens", _TOKENS)
                node = helper.make_node("Squeeze", [node.input[0], axes], list(node.output), node.name)
            nodes.append(node)
        del self.graph.node[:]
        self.graph.node.extend(nodes)
        for info in self.graph.value_info:
            if info.name in narrow:
                info.type.tensor_type.shape.dim[_TOKENS].dim_value = 1
