"""ONNX files whose chosen layers compute in int8, made of float ones by ONNX Runtime's quantiser."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from archfront.errors import ArchfrontError
from archfront.evaluators.deployment.channels_last import use_channels_last
from archfront.evaluators.deployment.layer_times import LayerNode
from archfront.evaluators.deployment.shortcuts import merge_shortcuts

_LAYERS = ("Conv", "Gemm", "MatMul")
_PASSING = (
    "Relu",
    "Clip",
    "MaxPool",
    "AveragePool",
    "GlobalAveragePool",
    "ReduceMean",
    "Pad",
    "Slice",
    "Concat",
    "Add",
)
"""Operators that stay in int8 between convolutions, where all that they read is in int8 already."""

_FEW_CHANNELS = 4
"""ONNX Runtime gathers what an int8 convolution reads in pieces of so many bytes: of an image's channels that takes
longer than the whole convolution in float."""

_SCOPES = "pkg.torch.onnx.name_scopes"


class LayerNotFoundError(ArchfrontError):
    """A layer of the network has no operator of its own in the exported file."""


def vnni() -> bool:
    """Whether this processor multiplies int8 without saturating sums; where it does not, weights get seven bits."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_vnni" in flags or "avx_vnni" in flags


def write_static(
    source: Path,
    target: Path,
    batches: Sequence[npt.NDArray[Any]],
    ranges: Mapping[str, tuple[float, float] | None],
    *,
    channels_last: bool = False,
) -> list[str]:
    """Weights and activations of layers in int8, in ranges that are fixed.

    Args:
        source: a file of ``export_onnx``.
        batches: that other ranges are observed on: of sums and pools between convolutions, and where none is given.
        ranges: path of each layer that shall compute in int8 -> lowest and highest of what it reads.
        channels_last: in operators of ONNX Runtime's own (``channels_last``), else in ONNX's alone. Convolutions that
            it computes faster in float then stay so, unless there are no other layers.

    Returns:
        Paths of the layers that are in int8.

    Raises:
        LayerNotFoundError: a layer has no operator.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    model = onnx.load(str(source))
    nodes = _found_nodes(model.graph, list(ranges))
    if channels_last:
        shapes = {initializer.name: tuple(initializer.dims) for initializer in model.graph.initializer}
        nodes = {path: found for path, found in nodes.items() if not _reads_few_channels(found, shapes)} or nodes
    name = model.graph.input[0].name
    overrides: dict[str, list[dict[str, Any]]] = {}
    for path, found in nodes.items():
        extent = ranges[path]
        if extent is not None and extent[1] > extent[0]:
            low, high = (np.array(bound, dtype=np.float32) for bound in extent)
            for node in found:
                overrides[node.input[0]] = [{"rmin": low, "rmax": high}]

    class Batches(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime ships no types
        def __init__(self) -> None:
            self._left = iter(batches)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self._left, None)
            return None if batch is None else {name: batch}

    chosen = [node for found in nodes.values() for node in found]
    between = merge_shortcuts(model, _between(model.graph, chosen))
    # A tensor has one range: one that a layer reads keeps the layer's, whatever else reads it.
    with _quiet():
        quantize_static(
            model, str(target), Batches(), quant_format=QuantFormat.QDQ, per_channel=True,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, reduce_range=not vnni(),
            nodes_to_quantize=[node.name for node in [*chosen, *between]],
            op_types_to_quantize=[*_LAYERS, *_PASSING],
            extra_options={"TensorQuantOverrides": overrides, "OpTypesToExcludeOutputQuantization": ["MatMul"]},
        )  # fmt: skip
    if channels_last:
        written = onnx.load(str(target))
        use_channels_last(written)
        onnx.save(written, str(target))
    return list(nodes)


def write_dynamic(source: Path, target: Path, paths: Sequence[str]) -> None:
    """Weights of linear layers in int8, and what they read in int8 in the range of each batch.

    Raises:
        LayerNotFoundError: a layer has no operator.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    nodes = _found_nodes(onnx.load(str(source)).graph, paths)
    names = [node.name for found in nodes.values() for node in found if node.op_type != "Conv"]
    # The quantiser takes Gemm apart first, and names its parts so.
    names += [f"{name}_MatMul" for name in names]
    with _quiet():
        quantize_dynamic(
            str(source), str(target), per_channel=True, weight_type=QuantType.QInt8, reduce_range=not vnni(),
            nodes_to_quantize=names or ["none"], op_types_to_quantize=["MatMul", "Gemm"],
        )  # fmt: skip


def file_layers(path: Path, paths: Sequence[str]) -> list[LayerNode]:
    """Operators of the layers of a float file that have one of their own, in their order.

    Args:
        path: a file of ``export_onnx``.
        paths: of layers of the network.
    """
    import onnx

    graph = onnx.load(str(path)).graph
    places = {node.name: i for i, node in enumerate(graph.node)}
    shapes = {initializer.name: tuple(initializer.dims) for initializer in graph.initializer}
    found = []
    for layer, nodes in _layer_nodes(graph, paths).items():
        for node in nodes:
            shape = shapes[node.input[1]]
            transposed = any(a.name == "transB" and a.i for a in node.attribute)
            channels = shape[0] if node.op_type == "Conv" or transposed else shape[-1]
            found.append(LayerNode(layer, node.name, node.op_type == "Conv", math.prod(shape), channels))
    return sorted(found, key=lambda layer: places[layer.node])


def _layer_nodes(graph: Any, paths: Sequence[str]) -> dict[str, list[Any]]:
    """The operators of layers: by the name of their weight, or the module in which they were traced."""
    known = {initializer.name for initializer in graph.initializer}
    found: dict[str, list[Any]] = {path: [] for path in paths}
    for node in graph.node:
        if node.op_type not in _LAYERS or len(node.input) < 2 or node.input[1] not in known:
            continue
        scopes = next((entry.value for entry in node.metadata_props if entry.key == _SCOPES), "")
        named = node.input[1].removesuffix(".weight")
        for path in paths:
            # Batch norms are folded into convolutions, which then carry the norm's module and their own weight's name.
            if named == path or (named not in found and f"'{path}'" in scopes):
                found[path].append(node)
    return found


def _found_nodes(graph: Any, paths: Sequence[str]) -> dict[str, list[Any]]:
    found = _layer_nodes(graph, paths)
    for path, nodes in found.items():
        if not nodes:
            raise LayerNotFoundError(f"Layer {path!r} has no operator of its own in the exported network.")
    return found


def _reads_few_channels(nodes: Sequence[Any], shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a layer is a convolution of whole images, not depthwise."""
    return all(
        node.op_type == "Conv"
        and shapes[node.input[1]][1] <= _FEW_CHANNELS
        and all(a.i == 1 for a in node.attribute if a.name == "group")
        for node in nodes
    )


def _between(graph: Any, chosen: Sequence[Any]) -> list[Any]:
    """Operators that read nothing but what chosen convolutions read and give, or operators between."""
    constants = {initializer.name for initializer in graph.initializer}
    in_int8 = {name for node in chosen if node.op_type == "Conv" for name in (node.input[0], *node.output)}
    found = []
    for node in graph.node:  # in the order in which they run
        read = [name for name in node.input if name and name not in constants]
        if node.op_type in _PASSING and read and all(name in in_int8 for name in read):
            found.append(node)
            in_int8 |= set(node.output)
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the quantiser's advice to prepare the model, which the export has done."""
    root = logging.getLogger()
    before = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(before)
