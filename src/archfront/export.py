"""Writing one candidate to a file: genotype and metrics, weights, an exported program, or ONNX."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from archfront.client import Job
from archfront.db.queries import find_evaluation
from archfront.errors import InputError
from archfront.spaces.space import Layer, Space


def export_candidate(job: Job, candidate: str, to: Path) -> dict[str, Any]:
    """Write a candidate in the format that the file's suffix names.

    Raises:
        InputError: unknown candidate or format, no weights kept.
        MissingExtraError: the format's package is not installed.
    """
    writers: dict[str, Callable[[Job, dict[str, Any], Path], str]] = {
        ".json": _write_json,
        ".safetensors": _write_weights,
        ".pt2": _write_program,
        ".onnx": _write_onnx,
    }
    if to.suffix not in writers:
        raise InputError("--to", str(to), "has an unknown format", f"End it with {', '.join(writers)}.")
    if not to.absolute().parent.is_dir():
        raise InputError("--to", str(to), "lies in a folder that does not exist", "Make the folder first.")
    with job.ledger.engine.connect() as connection:
        row = find_evaluation(connection, job.id, candidate)
    what = writers[to.suffix](job, row, to)
    return {"job": job.id, "evaluation": row["evaluation"], "key": row["key"], "what": what, "file": str(to)}


def space_of(job: Job) -> Space:
    """The space of a job, its plug-ins loaded."""
    from archfront.plugins import read_plugins
    from archfront.search.plugins import load_plugins
    from archfront.spaces.registry import SPACES

    load_plugins(read_plugins(job.plugins))
    return SPACES.build(job.spec["space"], "space")


def _write_json(job: Job, row: dict[str, Any], to: Path) -> str:
    layers = [_plain(layer) for layer in space_of(job).describe(row["genotype"])]
    document = {
        key: row[key] for key in ("evaluation", "key", "genotype", "fidelity", "metrics", "std", "provenance", "origin")
    }
    to.write_text(json.dumps({"space": job.spec["space"], **document, "layers": layers}, indent=2), encoding="utf-8")
    return "genotype, metrics and layers"


def _plain(layer: Layer) -> dict[str, Any]:
    own = {"name": layer.name, "kind": layer.kind, "shape": list(layer.shape)}
    return own | (
        {"branches": [[_plain(inner) for inner in lane] for lane in layer.branches]} if layer.branches else {}
    )


def _trained_model(job: Job, row: dict[str, Any]) -> tuple[Any, str]:
    """The module with its best kept weights, and where these came from."""
    from archfront.evaluators.checkpoints import UnreadableCheckpointError, read_model
    from archfront.spaces.policies.policy_chain import has_policies, policies_of

    space = space_of(job)
    if has_policies(space):  # a policy is applied to weights that were there before the job
        return _compressed_model(job, row, space), policies_of(space, "the export").source.name
    final = [b for b in job.ledger.benchmarks(job.id) if b["number"] == row["evaluation"] and b["kind"] == "training"]
    uris = [str(b["content"]["checkpoint"]) for b in final if b["content"].get("checkpoint")]
    uris += [row["checkpoint"]] if row["checkpoint"] else []
    for uri in uris:
        try:
            return read_model(space, row["genotype"], uri), uri
        except UnreadableCheckpointError:
            continue
    raise InputError(
        "CANDIDATE", row["evaluation"], "has no weights any more", "Export it as .json, or keep more with `keep: all`."
    )


def policy_network(job: Job, row: dict[str, Any], space: Space) -> tuple[Any, Any]:
    """The network under a policy, calibrated, recovered and fine-tuned as the job did it: once more, to the same end.
    The ``Compressible`` and the module, whose float weights stay behind the quantised ones."""
    from archfront.evaluators.compression.evaluator import Compression
    from archfront.evaluators.evaluator import EvaluationContext
    from archfront.search.job import JobSpec
    from archfront.search.resolve import build_evaluators

    spec = JobSpec.model_validate(job.spec)
    judges = [one for _, one in build_evaluators(spec) if isinstance(one, Compression)]
    if not judges or spec.data is None:
        return None, None
    network = judges[0].network(EvaluationContext(space=space, data=spec.data))
    return network, network.prepared(network.space.variant(row["genotype"]), row["repeat"])


def _compressed_model(job: Job, row: dict[str, Any], space: Space) -> Any:
    """The network under a policy; what is quantised has its values in float."""
    from archfront.spaces.policies.quantised import bake

    _, made = policy_network(job, row, space)
    return space.build(row["genotype"]).eval() if made is None else bake(copy.deepcopy(made)).eval()


def _write_weights(job: Job, row: dict[str, Any], to: Path) -> str:
    from safetensors.torch import save_file

    model, uri = _trained_model(job, row)
    metadata = {"space": json.dumps(job.spec["space"]), "genotype": json.dumps(row["genotype"]), "from": uri}
    # Copies: tensors that two layers share are stored twice.
    save_file({name: tensor.clone().contiguous() for name, tensor in model.state_dict().items()}, to, metadata)
    return "weights"


def _write_program(job: Job, row: dict[str, Any], to: Path) -> str:
    from archfront.evaluators.torch_files import export_program

    model, _ = _trained_model(job, row)
    export_program(model.eval(), _example(job), to, any_batch=True)
    return "the exported program"


def _write_onnx(job: Job, row: dict[str, Any], to: Path) -> str:
    from archfront.evaluators.onnx_files import export_onnx

    model, _ = _trained_model(job, row)
    export_onnx(model.eval(), _example(job), to, any_batch=True)
    return "the network in float32"


def _example(job: Job) -> Any:
    """Two samples of what the job's networks take."""
    import torch

    from archfront.spaces.policies.policy_chain import has_policies, policies_of

    space: Any = space_of(job)
    if has_policies(space):
        return policies_of(space, "the export").source.example(2)
    return torch.zeros(2, space.in_channels, space.resolution, space.resolution)
