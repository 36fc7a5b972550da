"""ONNX files of networks, and the runtimes that execute them: ONNX Runtime and OpenVINO. A leaf of torch and these."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from archfront.errors import MissingExtraError
from archfront.evaluators.onnx_attention import merge_attention
from archfront.evaluators.onnx_tokens import drop_unread_tokens

RUNTIMES = ("onnx", "openvino")

_PROTOBUF_BYTES = 2**31
"""No message holds more, and shapes are inferred of one."""

_TYPES = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(uint8)": np.uint8}

Run = Callable[[npt.NDArray[Any]], npt.NDArray[Any]]


def export_onnx(
    model: nn.Module, example: Tensor, path: Path, *, any_batch: bool = False, for_onnxruntime: bool = False
) -> None:
    """Write a network.

    Args:
        model: in evaluation mode, on the processor.
        example: its one input, ``(batch, ...)``.
        any_batch: serve every batch size, not only the example's.
        for_onnxruntime: with its own operator for attention, which others do not know, and without tokens that nothing
            reads. The network computes the same. Networks of 2 GiB and more stay as they are.

    Raises:
        MissingExtraError: onnx or onnxscript is not installed.
        torch.onnx.OnnxExporterError: the network cannot be exported.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401  torch.onnx.export needs it
    except ImportError:
        raise MissingExtraError("Exporting to ONNX", "onnx") from None
    shapes: Any = ({0: torch.export.Dim("batch", min=1, max=65536)},) if any_batch else None
    # Two, for an example of one would be taken for a network that serves nothing else.
    given = example.clone().contiguous() if not any_batch or len(example) > 1 else torch.cat([example, example])
    # Tensors made in inference mode cannot be traced outside of it, nor a graph inside: copies can.
    with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\)", FutureWarning)  # torch's own, of torch
        program = torch.onnx.export(
            copy.deepcopy(model), (given.clone(),), dynamo=True, verbose=False, optimize=True, dynamic_shapes=shapes
        )
    if program is None:
        raise RuntimeError("torch.onnx.export gave no program")
    program.save(path)
    if for_onnxruntime and sum(one.nbytes for one in model.state_dict().values()) < _PROTOBUF_BYTES:
        written = onnx.load(str(path))
        if merge_attention(written) + drop_unread_tokens(written):
            onnx.save(written, str(path))


def onnx_session(path: Path | str, threads: int) -> Any:
    """ONNX Runtime's session of a file on the processor.

    Args:
        threads: that an operator may use; operators run one after another.

    Raises:
        MissingExtraError: onnxruntime is not installed.
    """
    try:
        import onnxruntime
    except ImportError:
        raise MissingExtraError("ONNX Runtime", "onnx") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3  # errors
    # Its threads wait busily for the next call; between calls that would slow the items measured in turn with this.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def runner(path: Path | str, runtime: str, threads: int) -> Run:
    """What computes a file's first output.

    Raises:
        MissingExtraError: the runtime is not installed.
        ValueError: an unknown runtime.
    """
    if runtime == "onnx":
        session = onnx_session(path, threads)
        name = session.get_inputs()[0].name

        def run(batch: npt.NDArray[Any]) -> npt.NDArray[Any]:
            return np.asarray(session.run(None, {name: batch})[0])

        return run
    if runtime != "openvino":
        raise ValueError(f"unknown runtime {runtime!r}; known: {', '.join(RUNTIMES)}")
    try:
        import openvino
    except ImportError:
        raise MissingExtraError("OpenVINO", "openvino") from None
    # In float32, for it would take bfloat16 unasked where the processor has it.
    settings = {
        "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32",
    }  # fmt: skip
    compiled = openvino.Core().compile_model(str(path), "CPU", settings)
    request = compiled.create_infer_request()

    def infer(batch: npt.NDArray[Any]) -> npt.NDArray[Any]:
        # A copy: the next call writes into the same place.
        return np.array(request.infer([batch], share_inputs=True)[0])

    return infer


def file_call(path: Path | str, runtime: str, batch: int, shape: Sequence[int], threads: int) -> Callable[[], object]:
    """A call of a file on a batch drawn from torch's global generator, for measuring.

    Args:
        shape: of one sample.
    """
    run, feed = runner(path, runtime, threads), drawn_feed(path, batch, shape)
    return lambda: run(feed)


def drawn_feed(path: Path | str, batch: int, shape: Sequence[int]) -> npt.NDArray[Any]:
    """A batch for a file, drawn from torch's global generator."""
    kind = onnx_session(path, 1).get_inputs()[0].type
    drawn = torch.randn(batch, *shape).numpy()
    return np.ascontiguousarray(drawn if kind == "tensor(float)" else np.abs(drawn), dtype=_TYPES[kind])


def outputs(path: Path | str, runtime: str, batches: Sequence[Tensor], threads: int) -> Tensor:
    """A file's first output over batches."""
    run = runner(path, runtime, threads)
    return torch.cat([torch.from_numpy(run(np.ascontiguousarray(batch.numpy()))) for batch in batches])
