"""From a trained network to a faster or smaller one as a file: an ordinary job, and what is made of its finalists."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from archfront.client import Job
from archfront.db.queries import find_evaluation
from archfront.errors import InputError
from archfront.plugins import Plugin

_LOCAL_CPU = "local-cpu"
_FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_WIDTHS = {"latency": [8, 32], "size": [2, 3, 4, 6, 8]}
_PREDICTED = "onnx-int8"
"""Backend whose times of layers the search goes by; finalists are measured on all."""
_JUDGED = 1000
_KEPT_BACK = 0.25
"""Part of the allowed drop by which validation data must be better, as it chooses among many."""


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What is wanted of the network.

    Attributes:
        max_drop: points of accuracy that may be lost.
        latency_ms: at most, for one sample; the fastest is wanted if None.
        model_mb: at most, in MiB of packed weights; then the fastest of those that fit.
    """

    max_drop: float
    latency_ms: float | None = None
    model_mb: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("latency_ms", self.latency_ms), ("model_mb", self.model_mb)):
            if value is not None and not value > 0:
                raise InputError(f"--{name.replace('_', '-')}", value, "is not positive", "Give more than 0.")
        if not 0 <= self.max_drop < 100:
            raise InputError("--max-drop", self.max_drop, "is no number of points", "Give 0 or more, below 100.")


def optimising_job(
    model: str,
    data: str,
    wish: Wish,
    *,
    weights: str | None = None,
    backends: Sequence[str],
    evaluations: int,
    workers: int,
    device: str = _LOCAL_CPU,
) -> tuple[dict[str, Any], list[Plugin]]:
    """The job, and the plug-in that it needs for a factory of the user's own.

    Args:
        model: a timm name, a file of weights that ``archfront export`` wrote, ``package.module:function``, or a mapping
            as in a job file, in YAML.
        data: a data set's name, or a mapping.
        weights: a checkpoint of the model.
        backends: that finalists are measured with.
        device: that they are measured on.

    Raises:
        InputError: one of these cannot be used.
    """
    from archfront.search.recipes.seeding import read_mapping

    given = read_mapping("--data", data, None)
    source, plugins = _source(model, weights, given)
    size = wish.model_mb is not None
    widths = _WIDTHS["size" if size else "latency"]
    limits = [f"accuracy_drop <= {wish.max_drop:g}"] + ([f"model_mb <= {wish.model_mb:g}"] if size else [])
    judge: dict[str, Any] = {"name": "compression"}
    if size:
        judge["recovery"] = [{"name": "gptq"}]
    # Times of layers tell what int8 gains here; elsewhere operations have to do.
    timed = not size and _PREDICTED in backends
    spec = {
        "name": "optimize-"
        + re.sub(r"[^\w.-]+", "-", str(source.get("build") or source.get("model") or source["name"])),
        "space": {"name": "bits", "model": source, "weights": widths, "activations": "follow"},
        "data": given,
        "evaluators": [judge, {"name": "latency", "mode": "layers", "backend": _PREDICTED}] if timed else [judge],
        "objectives": [
            {"metric": "divergence", "direction": "min"},
            {"metric": "model_mb" if size else "latency_ms" if timed else "gbops", "direction": "min"},
        ],
        "constraints": limits,
        "strategy": {"name": "surrogate-nsga2", "population": 20},
        "budget": {"evaluations": evaluations},
        "workers": {"executor": "process", "count": workers},
        "finalists": {
            "count": 3,
            "where": f"accuracy_drop <= {wish.max_drop:g}",
            "backends": list(backends),
            "batches": [1],
            "device": device,
        },
    }
    return _with_extremes(spec, plugins), plugins


def _with_extremes(spec: dict[str, Any], plugins: Sequence[Plugin]) -> dict[str, Any]:
    """The job with policies of one width everywhere as first candidates, judged by no more samples than there are."""
    from archfront.evaluators.training import load_for
    from archfront.search.plugins import load_plugins
    from archfront.spaces.registry import SPACES

    load_plugins(plugins)
    space: Any = SPACES.build(spec["space"], "space")
    uniform = [space.genotype({s.id: max(w, s.domain[0]) for s in space.sites}) for w in (8, 4)]
    there = len(load_for(space, spec["data"]).split["validation"])
    judge, *others = spec["evaluators"]
    return {
        **spec,
        "seeds": [json.loads(text) for text in dict.fromkeys(map(json.dumps, uniform))],
        "evaluators": [{**judge, "fidelities": [min(there, _JUDGED)]}, *others],
    }


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One finalist on one backend.

    Attributes:
        row: as ``benching.measured`` gives it.
        speedup: over the network itself on its fastest float32 backend.
        model_mb: MiB of packed weights.
    """

    row: Mapping[str, Any]
    speedup: float
    model_mb: float

    @property
    def certain(self) -> bool:
        """Whether it is faster beyond the uncertainty of measuring."""
        return bool(self.row["high_ms"] < self.row["baseline"]["median_ms"])


def best(rows: Sequence[Mapping[str, Any]], sizes: Mapping[int, float], wish: Wish) -> Choice | None:
    """The fastest of what holds the limits on validation data, in float32 or int8; None if nothing does.

    Args:
        rows: figures of one batch size.
        sizes: evaluation -> MiB of packed weights.
    """
    found = []
    for row in rows:
        if row.get("error") or not row.get("baseline") or "accuracy_drop" not in row:
            continue
        choice = Choice(
            row=row, speedup=row["baseline"]["median_ms"] / row["median_ms"], model_mb=sizes[row["evaluation"]]
        )
        if row["accuracy_drop"] > wish.max_drop * (1 - _KEPT_BACK):
            continue
        if wish.latency_ms is not None and row["median_ms"] > wish.latency_ms:
            continue
        if wish.model_mb is not None:
            if choice.model_mb > wish.model_mb:
                continue
        elif not choice.certain:
            continue
        found.append(choice)
    return max(found, key=lambda choice: choice.speedup, default=None)


def write_files(job: Job, choice: Choice, folder: Path) -> dict[str, str]:
    """``model.onnx`` as it was measured (of backends that execute none: ``model.pt2``, in float), ``policy.json`` and
    ``weights.safetensors``: what -> file."""
    import shutil

    from archfront.evaluators.deployment.deployed import FILE_BACKENDS, Deployment
    from archfront.export import export_candidate, policy_network, space_of

    folder.mkdir(parents=True, exist_ok=True)
    evaluation = int(choice.row["evaluation"])
    with job.ledger.engine.connect() as connection:
        row = find_evaluation(connection, job.id, str(evaluation))
    others = {"policy": "policy.json", "weights": "weights.safetensors"}
    files: dict[str, str] = {}
    backend = FILE_BACKENDS.get(choice.row["backend"])
    if backend is None:
        others["model"] = "model.pt2"
    else:
        network, student = policy_network(job, row, space_of(job))
        made = Deployment(network, student, folder, "made").file(backend.form)
        files["model"] = str(folder / f"model{made.suffix}")
        shutil.move(made, files["model"])
        for left in folder.glob("made-*"):
            left.unlink()
    for what, name in others.items():
        export_candidate(job, str(evaluation), folder / name)
        files[what] = str(folder / name)
    return files


def _source(model: str, weights: str | None, data: Mapping[str, Any]) -> tuple[dict[str, Any], list[Plugin]]:
    """A job file's ``model``, and the plug-in that it needs."""
    from archfront.evaluators.datasets.registry import DATASETS
    from archfront.search.recipes.seeding import read_mapping
    from archfront.spaces.torchvision_compat import import_timm

    own = {} if weights is None else {"weights": weights}
    factory = bool(_FACTORY.fullmatch(model)) and not model.startswith("timm:")
    name = model.removeprefix("timm:")
    if not factory and not (name != model or import_timm().is_model(name)):
        found = {**read_mapping("MODEL", model, "network"), **own}
        return found, [_factory()] if found["name"] == "factory" else []
    raw = DATASETS.build(data, "data").read(32, 3)
    if factory:
        images = {"resolution": raw.images.shape[-1], "in_channels": raw.images.shape[1], "classes": len(raw.classes)}
        return {"name": "factory", "build": model, **images, **own}, [_factory()]
    if weights is None:
        remedy = "Give --weights FILE, a checkpoint of this network for this data."
        raise InputError("MODEL", model, "has fresh weights, of which nothing can be lost", remedy)
    return {"name": "timm", "model": name, "classes": len(raw.classes), **own}, []


def _factory() -> Plugin:
    """Where the user stands her own modules are importable; in workers only if this says so."""
    source = (
        "import sys\n\n"
        f"sys.path.insert(0, {str(Path.cwd())!r})\n"
        "from archfront.spaces.models.factory import Factory\n\n"
        'ARCHFRONT_PLUGINS = {"models": {"factory": Factory}}\n'
    )
    return Plugin("factory.py", source)
