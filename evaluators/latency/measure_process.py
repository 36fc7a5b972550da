"""The process that measures: one JSON request on standard input, one JSON response on standard output.

Run as ``python -m archfront.evaluators.latency.measure_process``. It imports the spaces and torch, and no other part
of archfront, no data and no database. The request:

    {"space": {"name": ..., ...} | null, "device": "local-cpu", "threads": 1, "settings": {...},
     "items": [{"genotype": [...]} | {"block": "<descriptor>"} | {"model": "timm:resnet18"} | {"operator": "<call>"},
               ...]}

where an item may also have ``batch``, ``backend`` and ``channels_last``. The response: ``{"items": [Timing, ...],
"environment": {...}}``.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import psutil
import torch
import torch._dynamo.config
from torch import nn

from archfront.evaluators.deployment.half_precision import in_half
from archfront.evaluators.deployment.student_files import KERNEL_BACKENDS
from archfront.evaluators.latency.device import LOCAL_CPU, fingerprint
from archfront.evaluators.latency.energy import find_meter
from archfront.evaluators.latency.measurement import Settings, Timing, add_energy, failed, measure, peak_memory
from archfront.evaluators.latency.onnx_backend import onnx_call
from archfront.evaluators.latency.operators import runnable
from archfront.evaluators.latency.pinning import pin
from archfront.evaluators.latency.quietness import processor_probe
from archfront.evaluators.onnx_files import RUNTIMES, drawn_feed, file_call
from archfront.plugins import Plugin, load_into
from archfront.spaces.blocks import BlockSpace
from archfront.spaces.models.registry import MODELS
from archfront.spaces.named_models import build_model, input_shape
from archfront.spaces.policies.quantised import without_input_quantisers
from archfront.spaces.registry import SPACES
from archfront.spaces.space import Space

_NO_LIMIT = 2**31
_HALVES = {"half": "eager", "half-compile": "compile", "half-graph": "cuda-graph"}
"""Backends in half precision, and how the network then runs."""
_OF_GPUS = ("cuda-graph", *_HALVES, *KERNEL_BACKENDS)
SLOWED_CLOCK = 0.9
"""A clock that ends below this share of what it was has slowed down."""


def respond(request: dict[str, Any]) -> dict[str, Any]:
    """Measure what a request asks for."""
    threads = int(request["threads"])
    torch.set_num_threads(threads)
    load_into({"spaces": SPACES, "models": MODELS}, [Plugin(**plugin) for plugin in request.get("plugins", [])])
    space = None if request["space"] is None else SPACES.build(request["space"], "space")
    load_before, clock_before = _load(), _clock_mhz()
    functions: list[Callable[[], object]] = []
    places: list[int] = []
    results: dict[int, Timing] = {}
    device = "cpu" if request.get("device", LOCAL_CPU) == LOCAL_CPU else str(request["device"])
    if device != "cpu":
        torch.cuda.set_device(device)  # CUDA graphs are captured on the current one
    meter = find_meter(device)
    with torch.inference_mode():
        for place, item in enumerate(request["items"]):
            if "problem" in item:  # which kept it from being made
                results[place] = failed(item["problem"])
                continue
            try:
                functions.append(_finished(_call(space, item, device, threads), device))
                places.append(place)
            except Exception as error:
                results[place] = failed(f"{type(error).__name__}: {error}")
        settings = Settings(**request.get("settings", {}))
        timings, probe_ms = measure(functions, settings, processor_probe() if device == "cpu" else None)
        for place, function, timing in zip(places, functions, timings, strict=True):
            # Of blocks and operators there are hundreds, and nobody asks for their energy.
            priced = request["items"][place].keys() & {"block", "operator"}
            results[place] = timing if meter is None or priced else add_energy(timing, function, meter, settings)
        rates = _add_layers(request["items"], results, threads)
    clock_after = _clock_mhz()
    return {
        "items": [asdict(results[place]) for place in range(len(request["items"]))],
        "environment": {
            "device": fingerprint(threads, request.get("device", LOCAL_CPU)).to_json(),
            "threads": torch.get_num_threads(),
            "load_before": load_before,
            "load_after": _load(),
            "clock_mhz_before": clock_before,
            "clock_mhz_after": clock_after,
            "probe_ms": probe_ms if math.isfinite(probe_ms) else None,
            "rates": rates,
            "cpus": sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
            "python": sys.version.split()[0],
            "peak_memory_bytes": peak_memory(),
            "energy": meter.source if meter else None,
            "notes": notes(load_before, threads, clock_before, clock_after),
        },
    }


def _add_layers(items: list[dict[str, Any]], results: dict[int, Timing], threads: int) -> dict[str, float] | None:
    """Give files that were asked for them the times of their layers; returns what the processor can do at most."""
    asked = [place for place, item in enumerate(items) if "layers" in item and results[place].error is None]
    if not asked:
        return None
    from archfront.evaluators.deployment.layer_times import layer_times  # loads ONNX Runtime
    from archfront.evaluators.deployment.processor_rates import processor_rates

    for place in asked:
        item = items[place]
        feed = drawn_feed(item["file"], int(item.get("batch", 1)), item["shape"])
        results[place] = replace(results[place], layers=layer_times(item["file"], item["layers"], feed, threads))
    return processor_rates(threads)


def _load() -> float | None:
    """Processes that wanted to run, averaged over the last minute."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def _clock_mhz() -> float | None:
    """The clock of the processors that this process is bound to; virtual machines often hide it."""
    # Absent on some systems, where psutil also lacks the function.
    clocks = psutil.cpu_freq(percpu=True) if hasattr(psutil, "cpu_freq") else []
    mine = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    # Some systems tell one clock for all.
    found = [float(clock.current) for cpu, clock in enumerate(clocks) if len(clocks) == 1 or not mine or cpu in mine]
    return sum(found) / len(found) if found else None


def notes(load: float | None, threads: int, clock_before: float | None, clock_after: float | None) -> list[str]:
    """What speaks against the figures: load that others put on the machine, and a clock, in MHz, that fell."""
    found = []
    processors = os.cpu_count() or 1
    if load is not None and load + threads > processors + 0.5:
        found.append(
            f"load average {load:.1f} on {processors} processors before measuring: other work disturbs the figures"
        )
    if clock_before and clock_after and clock_after < SLOWED_CLOCK * clock_before:
        found.append(f"the clock fell from {clock_before:.0f} to {clock_after:.0f} MHz while measuring: throttling")
    return found


def _finished(call: Callable[[], object], device: str) -> Callable[[], object]:
    """A call that returns when its work is done, as ``measure`` asks."""
    if device == "cpu":
        return call

    def run() -> None:
        call()
        torch.cuda.synchronize(device)

    return run


def _call(space: Space | None, item: dict[str, Any], device: str, threads: int) -> Callable[[], object]:
    """One forward pass of an item, its weights and input drawn from a fixed seed."""
    torch.manual_seed(0)
    if "operator" in item:
        return runnable(item["operator"], device)
    backend = item.get("backend", "eager")
    if device == "cpu" and backend in _OF_GPUS:
        raise ValueError(f"backend {backend!r} needs a CUDA device")
    if device != "cpu" and ("file" in item or backend == "onnx"):
        raise ValueError("files run on processors alone; name backends of GPUs")
    if "file" in item:
        return _file_call(item, threads)
    if "student" in item and space is not None:
        from archfront.evaluators.deployment.kernel_run import student_call  # loads triton, and what judges

        graph = _graph if backend == "triton-graph" else None
        return student_call(space, item, device, finished=lambda call: _finished(call, device), graph=graph)
    model, shape = _model(space, item)
    if backend == "onnx" and item.get("channels_last"):
        raise ValueError("backend 'onnx' chooses its memory layout itself: leave out channels_last")
    layout = torch.channels_last if item.get("channels_last") else torch.contiguous_format
    model = model.eval().to(device=device, memory_format=layout)  # type: ignore[call-overload]
    # Inside a network a block's input is what a ReLU or a batch norm left: no denormals, about unit size.
    example = _example(space, int(item.get("batch", 1)), shape).to(device).contiguous(memory_format=layout)
    if backend in _HALVES:
        # Quantising what layers read only simulates; here it would cost time.
        (model, example), backend = in_half(without_input_quantisers(model), example), _HALVES[backend]
    if backend == "compile":
        # All items are compiled in one process, and after 8 of one class torch would run the others eagerly, unasked.
        torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = _NO_LIMIT
        model = torch.compile(model)  # type: ignore[assignment]
    elif backend == "cuda-graph":
        return _graph(model, example)
    elif backend == "onnx":
        return onnx_call(model, example, threads)
    elif backend != "eager":
        raise ValueError(f"unknown backend {backend!r}; known: eager, compile, onnx, cuda-graph, {', '.join(_HALVES)}")

    def call() -> object:
        return model(example)

    return call


def _file_call(item: dict[str, Any], threads: int) -> Callable[[], object]:
    """A call of an item's file by its runtime."""
    path, runtime, batch, shape = item["file"], item["runtime"], int(item.get("batch", 1)), item["shape"]
    if runtime in RUNTIMES:
        return file_call(path, runtime, batch, shape, threads)
    from archfront.evaluators.torch_files import torch_call  # loads torch.export

    return torch_call(path, runtime, batch, shape, threads, item.get("dtype", "float32"))


def _graph(model: nn.Module, example: torch.Tensor) -> Callable[[], object]:
    """A forward pass recorded once as a CUDA graph: its replay launches all kernels at a stroke."""
    if not example.is_cuda:
        raise ValueError("backend 'cuda-graph' needs a CUDA device")
    stream = torch.cuda.Stream(example.device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(example.device))
    with torch.cuda.stream(stream):
        for _ in range(3):  # lazy libraries allocate in their first calls, which a graph may not hold
            model(example)
    torch.cuda.current_stream(example.device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = model(example)

    def replay() -> object:
        graph.replay()
        return kept

    return replay


def _example(space: Space | None, batch: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Random numbers, or the tokens that a language model takes."""
    source = getattr(space, "source", None)
    if source is not None and not (tokens := source.example(batch)).is_floating_point():
        return tokens  # type: ignore[no-any-return]
    return torch.randn(batch, *shape)


def _model(space: Space | None, item: dict[str, Any]) -> tuple[nn.Module, tuple[int, ...]]:
    """The module of an item, and the shape that it takes."""
    if "model" in item:
        model = build_model(item["model"])
        return model, tuple(item.get("shape") or input_shape(model))
    if item.get("untouched"):
        return space.source.build(), tuple(space.source.example().shape[1:])  # type: ignore[union-attr]
    if space is None:
        raise TypeError("genotypes and blocks need a space")
    if "genotype" in item:
        return space.build(item["genotype"]), (space.in_channels, space.resolution, space.resolution)  # type: ignore[attr-defined]
    if not isinstance(space, BlockSpace):
        raise TypeError(f"{space.name} has no blocks")
    block = space.build_block(item["block"])
    return block, next(s.input_shape for s in space.block_catalogue() if s.descriptor == item["block"])


def main() -> None:
    """Answer one request. What the compiler prints goes to standard error, so that the response stays JSON."""
    answer = os.dup(1)
    os.dup2(2, 1)
    request = json.load(sys.stdin)
    # Before torch starts its threads, which inherit it.
    pin(int(request["threads"]))
    response = respond(request)
    with os.fdopen(answer, "w") as file:
        json.dump(response, file)


if __name__ == "__main__":
    main()
