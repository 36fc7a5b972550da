"""The job file: what may vary, what counts, what must hold, and how much may be spent."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import yaml
from pydantic import BaseModel, ConfigDict, Field

from archfront.errors import InputError, InputErrors
from archfront.registry import input_errors

Named = dict[str, Any]
"""A component: its ``name`` and the keyword arguments of its class."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=(), allow_inf_nan=False)


class Objective(_Section):
    """A metric to improve."""

    metric: str
    direction: Literal["max", "min"]


class Budget(_Section):
    """When to stop. Whatever is reached first."""

    evaluations: Annotated[int, Field(ge=1, le=10**9, description="evaluations to make, all fidelities counted")]
    hours: Annotated[float | None, Field(gt=0, description="driver hours, summed over resumes")] = None


class WorkerNeeds(_Section):
    """What each worker of a class takes, and how many there are."""

    count: Annotated[int, Field(ge=1, le=100_000, description="evaluations (or batches) made at the same time")] = 1
    cpus: Annotated[float, Field(gt=0, description="cores, and threads, of each")] = 1
    gpus: Annotated[float, Field(ge=0, description="GPUs of each; 0.25 lets four share one")] = 0
    memory_mb: Annotated[int | None, Field(ge=64, description="of each; one that grows larger is stopped")] = None
    resources: Annotated[
        dict[str, Annotated[float, Field(gt=0)]], Field(description="custom resources of Ray that each takes")
    ] = {}
    device: Annotated[
        str | None,
        Field(min_length=1, description="only on hosts that declare Ray's resource device:NAME, one at a time there"),
    ] = None


class WorkerClass(WorkerNeeds):
    """Workers of another kind for some of the evaluators."""

    evaluators: Annotated[list[str], Field(min_length=1, description="names of those that run there")]


class Workers(WorkerNeeds):
    """Who evaluates."""

    executor: Annotated[
        Literal["ray", "process", "inline"],
        Field(description="ray: actors of a Ray cluster; process: child processes; inline: this process"),
    ] = "ray"
    timeout_s: Annotated[float, Field(gt=0, description="an evaluation that takes longer is stopped")] = 600
    attempts: Annotated[int, Field(ge=1, description="how often an evaluation is tried before it is failed")] = 3
    batch: Annotated[int | None, Field(ge=1, description="evaluations a call; the evaluators' own if not set")] = None
    classes: Annotated[
        dict[str, WorkerClass], Field(description="further kinds of workers by name, and the evaluators they run")
    ] = {}

    def class_of(self, evaluator: str) -> str | None:
        """The class that runs an evaluator; None for the workers that the section itself describes."""
        return next((name for name, kind in self.classes.items() if evaluator in kind.evaluators), None)

    def needs_of(self, evaluator: str) -> WorkerNeeds:
        """What the workers of an evaluator take."""
        name = self.class_of(evaluator)
        return self if name is None else self.classes[name]


Backend = Literal[
    "eager", "compile", "cuda-graph", "onnx", "onnx-int8", "onnx-int8-dynamic", "openvino", "openvino-int8",
    "pt2e", "torch-int8-dynamic", "half", "half-compile", "half-graph", "triton", "triton-graph",
]  # fmt: skip
COMPILED_BACKENDS = ("compile", "half-compile", "pt2e")
"""Those that compile each network, which takes from seconds to minutes."""
GPU_BACKENDS = ("cuda-graph", "half", "half-compile", "half-graph", "triton", "triton-graph")
"""Those that need a GPU; on one there are ``eager`` and ``compile`` besides."""
FLOAT_BACKENDS = ("eager", "compile", "cuda-graph", "onnx", "openvino", "half", "half-compile", "half-graph")
"""Those that the network itself, uncompressed, is measured with, to compare policies with the fastest."""


class Finalists(_Section):
    """Front members that are trained longer and measured on the device at the end."""

    count: Annotated[int, Field(ge=0)] = 0
    backends: list[Backend] = ["eager"]
    batches: list[Annotated[int, Field(ge=1)]] = [1]
    epochs: Annotated[int | None, Field(ge=1, description="epochs of the final training; none if not set")] = None
    compiled: Annotated[
        int | None, Field(ge=0, description="how many of them to compile, for pt2e too; all if not set")
    ] = None
    device: Annotated[
        str | None,
        Field(pattern=r"^(local-cpu|cuda:\d+)$", description="local-cpu or cuda:N; the latency's if not set"),
    ] = None
    where: Annotated[str | None, Field(description="what members must hold to be chosen, e.g. accuracy >= 90")] = None


class Halving(_Section):
    """Asynchronous successive halving over the evaluators' fidelities."""

    eta: Annotated[int, Field(ge=2, description="one in eta is promoted")] = 3


class Tune(_Section):
    """Ray Tune as the engine: its scheduler decides which candidates go on to the next fidelity."""

    scheduler: Annotated[Named, Field(description="fifo, asha, hyperband or median_stopping_rule, with arguments")] = {
        "name": "fifo"
    }


class WarmStart(_Section):
    """Begin with the best candidates of another job of this database."""

    job: str | int
    count: Annotated[int, Field(ge=1)] = 24


class JobSpec(_Section):
    """A search, as a job file describes it."""

    name: Annotated[str, Field(min_length=1, max_length=200)]
    space: Named
    data: Named | None = None
    evaluators: Annotated[list[Named], Field(min_length=1)]
    objectives: Annotated[list[Objective], Field(min_length=1, max_length=8)]
    constraints: list[str] = []
    strategy: Named
    engine: Annotated[Literal["archfront", "tune"], Field(description="tune: evaluations are trials of Ray Tune")] = (
        "archfront"
    )
    tune: Tune = Tune()
    halving: Halving = Halving()
    budget: Budget
    workers: Workers = Workers()
    finalists: Finalists = Finalists()
    seeds: Annotated[
        list[Any], Field(description="genotypes to evaluate first, or names of members that the space knows")
    ] = []
    warm_start: WarmStart | None = None
    reuse: Annotated[
        bool, Field(description="take results of other jobs of this database that evaluated the same in the same way")
    ] = False
    keep: Annotated[Literal["front", "all", "none"], Field(description="which checkpoints gc leaves")] = "front"
    exact_resume: Annotated[bool, Field(description="refuse a strategy that cannot be replayed")] = True
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0

    @pydantic.field_validator("name")
    @classmethod
    def _no_number(cls, value: str) -> str:
        if value.isdigit() or value == "last":
            raise ValueError("A job's name may be neither a number nor 'last', which mean ids on the command line")
        return value

    @pydantic.field_validator("warm_start", mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        return {"job": value} if isinstance(value, (str, int)) else value

    @pydantic.field_validator("finalists")
    @classmethod
    def _no_empty(cls, value: Finalists) -> Finalists:
        if value.count and not (value.backends and value.batches):
            raise ValueError("Give at least one backend and one batch size")
        return value


def parse_spec(document: Mapping[str, Any] | JobSpec) -> JobSpec:
    """Check a job given as plain data.

    Raises:
        InputErrors: everything that is wrong with its form, each with its path.
    """
    if isinstance(document, JobSpec):
        return document
    try:
        return JobSpec.model_validate(dict(document))
    except pydantic.ValidationError as error:
        raise InputErrors(input_errors(error, "", JobSpec)) from None


def read_spec(path: str | Path) -> JobSpec:
    """Read a job file (YAML; JSON is YAML too).

    Raises:
        InputError: the file is missing, no YAML, or no valid job.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError("JOB.yaml", str(path), f"cannot be read ({error})", "Give the path of a job file.") from None
    try:
        document = yaml.load(text, Loader=_UniqueKeyLoader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        message = " ".join(str(error).split())
        raise InputError("JOB.yaml", str(path), f"is no valid YAML ({message})", "Mend the line it names.") from None
    if not isinstance(document, dict):
        raise InputError("JOB.yaml", str(path), "holds no mapping", "Begin with 'name: ...'; see `archfront schema`.")
    return parse_spec(document)


class _UniqueKeyLoader(yaml.SafeLoader):
    """Safe loading that refuses a key given twice, where plain YAML drops the first value without a word; and that
    reads ``1e-3`` as the number that people mean, where YAML 1.1 reads a string."""


def _mapping(loader: _UniqueKeyLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
    for key in keys:
        if keys.count(key) > 1:
            raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is given twice", node.start_mark)
    return dict(yaml.SafeLoader.construct_mapping(loader, node, deep=True))


_SCIENTIFIC = re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)$")

_UniqueKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
_UniqueKeyLoader.add_implicit_resolver("tag:yaml.org,2002:float", _SCIENTIFIC, list("-+0123456789."))
