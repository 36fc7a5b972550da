"""What this host's processor can do at most, as far as ONNX Runtime reaches it: floors of layers are made of these."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from time import perf_counter
from typing import Any

import numpy as np

from archfront.evaluators.latency.quietness import quiet

_SIZE = 384
"""Of square products: large enough for the best kernels, small enough to stay in the caches."""
_COPIED = 2**19
_SAMPLES = 25


def processor_rates(threads: int) -> dict[str, float]:
    """Multiply-adds a second in float32 and int8, by products of square matrices, and bytes a second that a copy
    within the caches moves.

    Args:
        threads: of the products.
    """
    drawn = np.random.default_rng(0)
    left = drawn.standard_normal((_SIZE, _SIZE), dtype=np.float32)
    codes = drawn.integers(0, 255, (_SIZE, _SIZE), dtype=np.uint8)
    source = drawn.integers(0, 255, _COPIED, dtype=np.uint8)
    target = np.empty_like(source)
    weight = (codes.astype(np.int16) - 127).astype(np.int8)
    return {
        "float32": _SIZE**3 / _seconds(_product("MatMul", left, left.copy(), threads)),
        "int8": _SIZE**3 / _seconds(_product("MatMulInteger", codes, weight, threads)),
        "bytes": 2 * _COPIED / _seconds(lambda: np.copyto(target, source)),
    }


def floor_ms(macs: float, moved: float, rates: Mapping[str, float], *, int8: bool) -> float:
    """The least time of a layer at these rates: of its arithmetic, or of its bytes, whichever takes longer."""
    arithmetic = rates["int8"] if int8 else rates["float32"]
    return 1e3 * max(macs / arithmetic, moved / rates["bytes"])


def _product(operator: str, left: Any, right: Any, threads: int) -> Callable[[], object]:
    """A call of ONNX Runtime's product, whose right operand is a weight."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    integer = left.dtype == np.uint8
    kinds = (TensorProto.UINT8, TensorProto.INT32) if integer else (TensorProto.FLOAT, TensorProto.FLOAT)
    ends = [helper.make_tensor_value_info(n, kind, left.shape) for n, kind in zip(("left", "out"), kinds, strict=True)]
    node = helper.make_node(operator, ["left", "right"], ["out"])
    graph = helper.make_graph([node], operator, ends[:1], ends[1:], [numpy_helper.from_array(right, "right")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"left": left})


def _seconds(call: Callable[[], object]) -> float:
    found = []
    for _ in range(_SAMPLES + 3):
        start = perf_counter()
        call()
        found.append(perf_counter() - start)
    return quiet(found[3:])
