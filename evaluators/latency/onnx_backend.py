"""ONNX Runtime as a backend: a network exported in the measuring process, compared with eager, then called."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn
from torch.utils import _pytree

from archfront.evaluators.onnx_files import export_onnx, onnx_session

TOLERANCE = 1e-3
"""Largest difference from eager that passes, as a share of the output's largest value. Single precision with other
convolution algorithms and fused operators stays some ten times below it, over the depth of a network."""


class OutputsDifferError(RuntimeError):
    """ONNX Runtime computes something else than eager: its time would be that of another network."""


def onnx_call(model: nn.Module, example: Tensor, threads: int) -> Callable[[], object]:
    """A call of ONNX Runtime on a network's example.

    Args:
        model: in evaluation mode, on the processor.
        example: its one input, ``(batch, ...)``.
        threads: that an operator may use; operators run one after another.

    Raises:
        MissingExtraError: onnxruntime, onnx or onnxscript is not installed.
        OutputsDifferError: the outputs differ by more than ``TOLERANCE``.
        torch.onnx.OnnxExporterError: the network cannot be exported.
        ValueError: the example is not on the processor.
    """
    if example.device.type != "cpu":
        raise ValueError("backend 'onnx' measures processors: give device local-cpu")
    # A network may write into its input.
    expected = [leaf.numpy() for leaf in _pytree.tree_leaves(model(example.clone())) if isinstance(leaf, Tensor)]
    with tempfile.TemporaryDirectory(prefix="archfront-onnx-") as folder:
        # By way of a file, as a message of protobuf holds 2 GiB at most.
        path = Path(folder) / "network.onnx"
        export_onnx(model, example, path, for_onnxruntime=True)
        session = onnx_session(path, threads)
    feed = {session.get_inputs()[0].name: np.ascontiguousarray(example.numpy())}
    check_outputs(expected, session.run(None, feed))

    def call() -> object:
        return session.run(None, feed)

    return call


def check_outputs(expected: Sequence[npt.NDArray[Any]], got: Sequence[npt.NDArray[Any]]) -> None:
    """Compare outputs with those of eager.

    Raises:
        OutputsDifferError: by how much they differ.
    """
    shapes, found = [list(map(np.shape, arrays)) for arrays in (expected, got)]
    if shapes != found:
        raise OutputsDifferError(f"ONNX Runtime's outputs have the shapes {found}, eager's {shapes}")
    for right, value in zip(expected, got, strict=True):
        if not right.size:
            continue
        difference = float(np.abs(value.astype(np.float64) - right.astype(np.float64)).max())
        largest = float(np.abs(right.astype(np.float64)).max())
        # Written so that NaN does not pass.
        if not difference <= TOLERANCE * largest:
            share = f", {difference / largest:.2g} of its largest value" if largest else ""
            raise OutputsDifferError(
                f"ONNX Runtime's output differs from eager's by {difference:.3g}{share}; {TOLERANCE:g} of it may be"
            )
