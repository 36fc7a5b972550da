"""What each layer of an ONNX file takes on the processor, as ONNX Runtime's own profiler tells. A leaf of numpy."""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

_CONVOLUTIONS = ("Conv", "FusedConv", "NhwcFusedConv", "QLinearConv", "NhwcQLinearConv", "QGemmConv", "ConvInteger")
_PRODUCTS = (
    "MatMul", "FusedMatMul", "QLinearMatMul", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "Gemm",
    "FusedGemm", "QGemm",
)  # fmt: skip
_BYTES = {"float": 4, "int32": 4, "int64": 8, "uint8": 1, "int8": 1, "bool": 1, "double": 8, "float16": 2}
NO_LAYER = "archfront_"
"""Names of convolutions begin so that stand for other operators of the network."""

_QUIET = 0.25
"""Of the runs of a layer that many are faster than its figure: neighbours and the profiler itself only add."""


class LayerNode(NamedTuple):
    """A layer's operator in the float file, from which all other files of the network were made.

    Attributes:
        path: of the layer in the network.
        node: name of its operator.
        convolution: or else a matrix product.
        weights: elements of its weight.
        channels: of its output.
    """

    path: str
    node: str
    convolution: bool
    weights: int
    channels: int


@dataclass(frozen=True, kw_only=True)
class LayerTime:
    """One layer in one file.

    Attributes:
        layer: its path in the network; empty for all that is in no layer, together.
        kernel: the operator of ONNX Runtime that computes it.
        ms: of one pass.
        macs: multiply-adds.
        bytes: of input, weight and output, each once.
        elements: of input and output.
        int8: whether the product is of integers.
    """

    layer: str
    kernel: str
    ms: float
    macs: int = 0
    bytes: int = 0
    elements: int = 0
    int8: bool = False


def layer_times(
    path: Path | str, layers: Sequence[Sequence[Any]], feed: npt.NDArray[Any], threads: int, runs: int = 40
) -> list[dict[str, Any]]:
    """Run a file under the profiler.

    Args:
        path: the file.
        layers: ``LayerNode`` of each layer, in the order of the float file.
        feed: a batch.
        threads: that an operator may use.
        runs: passes that are counted.

    Returns:
        ``LayerTime`` of each layer that was found, as dictionaries, and last of the rest together.
    """
    import onnxruntime

    with tempfile.TemporaryDirectory(prefix="archfront-profile-") as folder:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3  # errors
        options.enable_profiling, options.profile_file_prefix = True, str(Path(folder) / "run")
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        for _ in range(runs + 5):
            session.run(None, {name: feed})
        events = json.loads(Path(session.end_profiling()).read_text())
    return [asdict(found) for found in attributed(events, [LayerNode(*layer) for layer in layers])]


def attributed(events: Sequence[Mapping[str, Any]], layers: Sequence[LayerNode]) -> list[LayerTime]:
    """The profiler's events by layer.

    Products keep their names. Convolutions lose them where they are fused with what follows, so they are told by their
    order; if some are gone or new, none is told.
    """
    durations: dict[str, list[float]] = defaultdict(list)
    first: dict[str, Mapping[str, Any]] = {}
    for event in events:
        if event.get("cat") == "Node" and str(event["name"]).endswith("_kernel_time"):
            name = str(event["name"]).removesuffix("_kernel_time")
            durations[name].append(float(event["dur"]) / 1e3)
            first.setdefault(name, event["args"])
    ms = {name: float(np.quantile(values, _QUIET)) for name, values in durations.items()}
    convolutions = [name for name in first if first[name]["op_name"] in _CONVOLUTIONS and not name.startswith(NO_LAYER)]
    wanted = [layer for layer in layers if layer.convolution]
    places = dict(zip(wanted, convolutions, strict=True)) if len(wanted) == len(convolutions) else {}
    products = {name: args for name, args in first.items() if args["op_name"] in _PRODUCTS}
    for layer in layers:
        if not layer.convolution and (found := _named(products, layer.node)) is not None:
            places[layer] = found
    rows = [
        LayerTime(
            layer=layer.path,
            kernel=(kernel := str(first[place]["op_name"])),
            ms=ms[place],
            macs=_output(first[place]) * layer.weights // layer.channels,
            bytes=sum(b * n for b, n in _ends(first[place])) + layer.weights * (1 if _integers(kernel) else 4),
            elements=sum(n for _, n in _ends(first[place])),
            int8=_integers(kernel),
        )
        for layer, place in places.items()
    ]
    rest = sum(ms.values()) - sum(row.ms for row in rows)
    return [*rows, LayerTime(layer="", kernel="", ms=rest)]


def _named(products: Mapping[str, Any], node: str) -> str | None:
    """What became of an operator: optimisers append to names."""
    ends = ("", "_quant", "_MatMul", "_MatMul_quant", "/MatMulScaleFusion/")
    for name in products:
        if name.split("_token_")[0] in [node + end for end in ends]:
            return name
    return None


def _integers(kernel: str) -> bool:
    return "Integer" in kernel or kernel.startswith(("Q", "Dynamic", "NhwcQ"))


def _output(args: Mapping[str, Any]) -> int:
    return sum(prod(shape) for entry in args.get("output_type_shape", ())[:1] for shape in entry.values())


def _ends(args: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Bytes of an element, and elements, of the first input and the output: the profiler does not tell of weights that
    were packed."""
    both = (*args.get("input_type_shape", ())[:1], *args.get("output_type_shape", ())[:1])
    return [(_BYTES.get(kind, 4), prod(shape)) for entry in both for kind, shape in entry.items()]
