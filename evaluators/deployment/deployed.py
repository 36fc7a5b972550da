"""What a network under a policy becomes on a processor: files for each backend, and what is true of each file."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import nn

from archfront.evaluators.compression.compressible import Compressible, judged_outputs
from archfront.evaluators.datasets.dataset import SplitName
from archfront.evaluators.deployment.int8_files import write_dynamic, write_static
from archfront.evaluators.onnx_files import export_onnx, outputs
from archfront.spaces.policies.quantised import bake, input_bits, weight_quantiser, without_input_quantisers
from archfront.spaces.policies.quantiser import ActivationQuantiser

Form = Literal["float", "static", "dynamic"]


class FileBackend(NamedTuple):
    """A backend that executes a file.

    Attributes:
        form: ``float``; ``static``: layers in int8, in ranges that are fixed; ``dynamic``: linear layers in int8, in
            the ranges of each batch.
        runtime: see ``onnx_files``.
    """

    form: Form
    runtime: str


FILE_BACKENDS = {
    "onnx": FileBackend("float", "onnx"),
    "onnx-int8": FileBackend("static", "onnx"),
    "onnx-int8-dynamic": FileBackend("dynamic", "onnx"),
    "openvino": FileBackend("float", "openvino"),
    "openvino-int8": FileBackend("static", "openvino"),
}

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
        self._ranges = int8_layers(student)
        self._plain = bake(without_input_quantisers(copy.deepcopy(student))).eval()
        self._files: dict[Form, Path] = {}

    def file(self, form: Form) -> Path:
        """The file, made when it is first asked for.

        Raises:
            MissingExtraError: onnx or onnxruntime is not installed.
            LayerNotFoundError: a layer of the policy is none in the file.
            ValueError: the policy has no layer for int8.
        """
        if form not in self._files:
            path = self._folder / f"{self._name}-{form}.onnx"
            if form == "float":
                export_onnx(self._plain, self._network.space.source.example(), path, any_batch=True)
            elif not self._ranges:
                raise ValueError("the policy has no layer of 8 bits or fewer in weights and inputs")
            elif form == "static":
                batches = [batch.numpy() for batch in self._network.calibration]
                write_static(self.file("float"), path, batches, self._ranges)
            else:
                write_dynamic(self.file("float"), path, list(self._ranges))
            self._files[form] = path
        return self._files[form]

    def facts(self, backend: FileBackend, threads: int) -> dict[str, Any]:
        """Of a file: its bytes, how many layers are in int8, and how accurate it is on validation and test data,
        against the network itself."""
        path = self.file(backend.form)
        found: dict[str, Any] = {
            "file_bytes": sum(file.stat().st_size for file in self._folder.glob(f"{path.name}*")),
            "int8_layers": 0 if backend.form == "float" else len(self._ranges),
        }
        network = self._network
        count = min(_JUDGED, len(network.data.split["validation"]))
        parts: list[tuple[str, SplitName, int | None]] = [("", "validation", count), ("test_", "test", None)]
        for prefix, part, some in parts:
            batches, labels = network.inputs(part, some)
            own = network.own_logits(part, some, 0, batches)
            judged = judged_outputs(labels, own, outputs(path, backend.runtime, batches, threads))
            found |= {
                f"{prefix}accuracy": judged.accuracy,
                f"{prefix}accuracy_drop": judged.drop,
                f"{prefix}accuracy_drop_std": judged.drop_std,
                f"{prefix}divergence": judged.divergence,
            }
        return found


def deployed_items(
    network: Compressible, items: Sequence[Mapping[str, Any]], folder: Path, threads: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Items for the measuring process, in which files stand for what file backends shall execute, and what is known of
    each file.

    Args:
        items: see ``measurement.measured_elsewhere``; policies by ``genotype``, or ``untouched``.
        folder: for the files, which must stay until they are measured.
    """
    made: dict[str, Deployment] = {}
    known: dict[tuple[str, str], dict[str, Any]] = {}
    to_measure: list[dict[str, Any]] = []
    facts: list[dict[str, Any]] = []
    shape = list(network.space.source.example().shape[1:])
    for item in items:
        backend = FILE_BACKENDS.get(item.get("backend", "eager"))
        if backend is None:
            to_measure.append(dict(item))
            facts.append({})
            continue
        key = "untouched" if item.get("untouched") else json.dumps(item["genotype"])
        try:
            if key not in made:
                policy = network.space.untouched() if item.get("untouched") else network.space.variant(item["genotype"])
                student = network.model if item.get("untouched") else network.prepared(policy)
                made[key] = Deployment(network, student, folder, f"network-{len(made)}")
            place = made[key].file(backend.form)
            if (key, item["backend"]) not in known:
                known[key, item["backend"]] = made[key].facts(backend, threads)
        except Exception as error:  # of one network on one backend; the others are measured
            to_measure.append({"problem": f"{type(error).__name__}: {error}", "batch": item.get("batch", 1)})
            facts.append({})
            continue
        to_measure.append(
            {"file": str(place), "runtime": backend.runtime, "shape": shape, "batch": item.get("batch", 1)}
        )
        facts.append(known[key, item["backend"]])
    return to_measure, facts
