"""What a network under a policy becomes on a processor: files for each backend, and what is true of each file."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from archfront.errors import ArchfrontError
from archfront.evaluators.compression.compressible import JUDGED_TOGETHER, Compressible, judged_outputs
from archfront.evaluators.datasets.dataset import SplitName
from archfront.evaluators.deployment.int8_files import file_layers, write_dynamic, write_static
from archfront.evaluators.deployment.layer_times import LayerNode
from archfront.evaluators.deployment.student_files import (
    KERNEL_BACKENDS,
    accuracy_facts,
    write_samples,
    write_student,
)
from archfront.evaluators.deployment.torch_int8_files import write_pt2e, write_torchscript
from archfront.evaluators.onnx_files import RUNTIMES, export_onnx, runner
from archfront.evaluators.torch_files import runner as torch_runner
from archfront.spaces.policies.quantised import bake, input_bits, weight_quantiser, without_input_quantisers
from archfront.spaces.policies.quantiser import ActivationQuantiser

Form = Literal[
    "float", "float-onnxruntime", "static", "static-onnxruntime", "dynamic-onnxruntime", "torch-static", "torch-dynamic"
]


class AllFloatError(ArchfrontError):
    """A file in int8 was asked for of a policy that leaves everything in float."""


class FileBackend(NamedTuple):
    """A backend that executes a file.

    Attributes:
        form: ``float``; ``static``: layers in int8, in ranges that are fixed; ``dynamic``: linear layers in int8, in
            the ranges of each batch. As ONNX, with operators that ONNX Runtime alone has, or as files of torch's own.
        runtime: see ``onnx_files`` and ``torch_files``.
    """

    form: Form
    runtime: str


FILE_BACKENDS = {
    "onnx": FileBackend("float-onnxruntime", "onnx"),
    "onnx-int8": FileBackend("static-onnxruntime", "onnx"),
    "onnx-int8-dynamic": FileBackend("dynamic-onnxruntime", "onnx"),
    "openvino": FileBackend("float", "openvino"),
    "openvino-int8": FileBackend("static", "openvino"),
    "pt2e": FileBackend("torch-static", "inductor"),
    "torch-int8-dynamic": FileBackend("torch-dynamic", "torchscript"),
}

_SUFFIXES: dict[Form, str] = {"torch-static": ".pt2", "torch-dynamic": ".pt"}
"""Of files that are no ONNX."""
_OF_LINEAR_LAYERS: tuple[Form, ...] = ("dynamic-onnxruntime", "torch-dynamic")

_MOST_THREADS = 8
_INT8 = 8
_JUDGED = 2000
"""Samples of the validation part that a file is judged by."""


def int8_layers(model: nn.Module) -> dict[str, tuple[float, float] | None]:
    """Layers whose weights and inputs have 8 bits or fewer, so that int8 carries them, with the range of their inputs;
    None where it is each batch's own."""
    found: dict[str, tuple[float, float] | None] = {}
    for path, layer in model.named_modules():
        quantiser = weight_quantiser(layer)
        if quantiser is None or quantiser.bits > _INT8 or input_bits(layer) > _INT8:
            continue
        made = layer.input_quantiser
        found[path] = None
        if isinstance(made, ActivationQuantiser) and made.frozen and made.scale.numel() == 1:
            scale, zero = float(made.scale), float(made.zero_point)
            found[path] = (-zero * scale, (2**made.bits - 1 - zero) * scale)
    return found


class Deployment:
    """One network as files.

    Args:
        network: whose policy it is: gives calibration and judges.
        student: the network under the policy, as ``Compressible.prepared`` makes it.
        folder: where the files lie.
        name: that they begin with.
    """

    def __init__(self, network: Compressible, student: nn.Module, folder: Path, name: str) -> None:
        self._network, self._folder, self._name = network, folder, name
        self._student, self._ranges = student, int8_layers(student)
        self._plain = bake(without_input_quantisers(copy.deepcopy(student))).eval()
        self._files: dict[Form, Path] = {}
        self._int8: dict[Form, list[str]] = {}

    def file(self, form: Form) -> Path:
        """The file, made when it is first asked for.

        Raises:
            MissingExtraError: onnx, onnxruntime or torchao is not installed.
            LayerNotFoundError: a layer of the policy is none in the file.
            AllFloatError: the policy has no layer for int8.
        """
        if form not in self._files:
            path = self._folder / f"{self._name}-{form}{_SUFFIXES.get(form, '.onnx')}"
            self._int8[form] = self._write(form, path)
            self._files[form] = path
        return self._files[form]

    def _write(self, form: Form, path: Path) -> list[str]:
        """Paths of the layers that the file has in int8."""
        batches = self._network.calibration
        linear = form in _OF_LINEAR_LAYERS
        paths = [p for p in self._ranges if not linear or isinstance(self._plain.get_submodule(p), nn.Linear)]
        own = form.endswith("-onnxruntime")
        if form in ("float", "float-onnxruntime"):
            example = self._network.space.source.example()
            export_onnx(self._plain, example, path, any_batch=True, for_onnxruntime=own)
            return []
        if not paths:
            kind = "linear layer" if linear else "layer"
            raise AllFloatError(f"not run: the policy has no {kind} of 8 bits or fewer in weights and inputs")
        if form in ("static", "static-onnxruntime"):
            given = [batch.numpy() for batch in batches]
            source = self.file("float-onnxruntime" if own else "float")
            return write_static(source, path, given, self._ranges, channels_last=own)
        if form == "dynamic-onnxruntime":
            write_dynamic(self.file("float-onnxruntime"), path, paths)
        elif form == "torch-static":
            write_pt2e(self._plain, path, batches, self._ranges)
        else:
            write_torchscript(self._plain, path, batches[0][:2], paths)
        return paths

    def facts(self, backend: FileBackend, threads: int) -> dict[str, Any]:
        """Of a file: its bytes, how many layers are in int8, and how accurate it is on validation and test data,
        against the network itself."""
        path = self.file(backend.form)
        found: dict[str, Any] = {
            "file_bytes": sum(file.stat().st_size for file in self._folder.glob(f"{path.name}*")),
            "int8_layers": len(self._int8[backend.form]),
        }
        parts = judged_parts(self._network)
        most = max(len(batch) for batches, _, _ in parts.values() for batch in batches)
        run = _runner(path, backend.runtime, threads, most)
        for prefix, (batches, labels, own) in parts.items():
            judged = judged_outputs(labels, own, torch.cat([run(batch) for batch in batches]))
            found |= accuracy_facts(prefix, judged)
        return found

    def layers(self) -> list[LayerNode]:
        """The operators of ONNX files whose times are told apart."""
        kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
        paths = [path for path, layer in self._plain.named_modules() if isinstance(layer, kinds)]
        return file_layers(self.file("float-onnxruntime"), paths)

    def student(self) -> Path:
        """The network's state and the policy's codes, for backends of kernels; made when it is first asked for."""
        from archfront.evaluators.deployment.kernel_layers import layer_plans  # triton is not everywhere

        path = self._folder / f"{self._name}-student.safetensors"
        if not path.exists():
            write_student(path, self._plain, layer_plans(self._student))
        return path


def _processors() -> int:
    """How many judge a file together: nothing is measured meanwhile, and what it computes does not depend on them."""
    return min(len(os.sched_getaffinity(0)), _MOST_THREADS) if hasattr(os, "sched_getaffinity") else 1


def _runner(path: Path, runtime: str, threads: int, most: int) -> Callable[[Tensor], Tensor]:
    """What computes a file's first output, for batches of so many samples or fewer."""
    if runtime not in RUNTIMES:
        return torch_runner(path, runtime, threads, most)
    run = runner(path, runtime, _processors())
    return lambda batch: torch.from_numpy(run(np.ascontiguousarray(batch.numpy())))


def judged_parts(network: Compressible) -> dict[str, tuple[list[Tensor], Tensor, Tensor]]:
    """What a network is judged on where it runs: beginning of the figures' names -> batches, labels, and the logits of
    the network itself."""
    count = min(_JUDGED, len(network.data.split["validation"]))
    parts: list[tuple[str, SplitName, int | None]] = [("", "validation", count), ("test_", "test", None)]
    found = {}
    for prefix, part, some in parts:
        batches, labels = network.inputs(part, some, JUDGED_TOGETHER)
        found[prefix] = (batches, labels, network.own_logits(part, some, 0, batches))
    return found


def _for_kernels(network: Compressible, deployment: Deployment, folder: Path, name: str) -> dict[str, str]:
    """Files of an item that gets its kernels, and is judged, in the measuring process."""
    samples = folder / "samples.safetensors"
    if not samples.exists():
        write_samples(samples, judged_parts(network))
    return {"student": str(deployment.student()), "samples": str(samples), "record": str(folder / f"{name}.json")}


def deployed_items(
    network: Compressible, items: Sequence[Mapping[str, Any]], folder: Path, threads: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Items for the measuring process, in which files stand for what file backends shall execute, and what is known of
    each file. Items of ``KERNEL_BACKENDS`` get files that the process reads, and one for what it finds out.

    Args:
        items: see ``measurement.measured_elsewhere``; policies by ``genotype``, or ``untouched``.
        folder: for the files, which must stay until they are measured.
    """
    made: dict[str, Deployment] = {}
    known: dict[tuple[str, str], dict[str, Any]] = {}
    to_measure: list[dict[str, Any]] = []
    facts: list[dict[str, Any]] = []
    example = network.space.source.example()
    given = {"shape": list(example.shape[1:]), "dtype": str(example.dtype).removeprefix("torch.")}
    for item in items:
        backend = FILE_BACKENDS.get(item.get("backend", "eager"))
        if backend is None and item.get("backend") not in KERNEL_BACKENDS:
            to_measure.append(dict(item))
            facts.append({})
            continue
        key = "untouched" if item.get("untouched") else json.dumps(item["genotype"])
        try:
            if key not in made:
                policy = network.space.untouched() if item.get("untouched") else network.space.variant(item["genotype"])
                student = network.model if item.get("untouched") else network.prepared(policy)
                made[key] = Deployment(network, student, folder, f"network-{len(made)}")
            if backend is None:
                to_measure.append({**item, **_for_kernels(network, made[key], folder, f"item-{len(to_measure)}")})
                facts.append({})
                continue
            place = made[key].file(backend.form)
            if (key, item["backend"]) not in known:
                known[key, item["backend"]] = made[key].facts(backend, threads)
        except Exception as error:  # of one network on one backend; the others are measured
            words = str(error) if isinstance(error, ArchfrontError) else f"{type(error).__name__}: {error}"
            to_measure.append({"problem": words, "batch": item.get("batch", 1)})
            facts.append({})
            continue
        file = {"file": str(place), "runtime": backend.runtime, "batch": item.get("batch", 1), **given}
        to_measure.append(file | ({"layers": made[key].layers()} if backend.runtime == "onnx" else {}))
        facts.append(known[key, item["backend"]])
    return to_measure, facts
