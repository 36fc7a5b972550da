"""Times of calls: on a GPU by graphs of many of them, cold and interleaved; on a CPU by its clock, to try everything.

A graph has no gaps between launches, which would hide what small kernels differ in. Its calls rotate over distinct
inputs, of three times L2 together, so that none finds its operands in the cache; with fewer the row says "warm".
Outputs are not rotated: the memory that a call frees is the next one's.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

_TIMES_L2 = 3
_MAX_SETS = 512
_MAX_CALLS = 4096
_SPIN_CYCLES = 2_000_000
_TUNING_MS = 2.0


class Loop(NamedTuple):
    """What is timed as one sample: ``calls`` of a variant, over ``sets`` inputs.

    ``kept`` is all that the calls read: a graph has the addresses alone.
    """

    run: Callable[[], None]
    kept: Any
    calls: int
    sets: int
    cache: str
    method: str


class Times(NamedTuple):
    """Of one call, in microseconds, over ``samples`` samples."""

    median_us: float
    p20_us: float
    p80_us: float
    samples: int


@dataclass(frozen=True)
class Timer:
    """How calls are timed on a device.

    Attributes:
        device: a GPU or a CPU.
        rounds: samples of each loop.
        sample_ms: about how long one takes.
        l2_bytes: of the device's last cache; of a CPU a pretended one, since its times are of no account.
    """

    device: torch.device
    rounds: int
    sample_ms: float
    l2_bytes: int

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def inputs(self, make: Callable[[int], Any], *, warm: bool = False) -> list[Any]:
        """As many as are three times L2 together; one where warm."""
        first = make(0)
        wanted = math.ceil(_TIMES_L2 * self.l2_bytes / max(tensor_bytes(first), 1))
        count = 1 if warm else min(max(wanted, 1), _MAX_SETS)
        return [first, *(make(seed) for seed in range(1, count))]

    def loop(self, call: Callable[[Any], Any], make: Callable[[int], Any], *, warm: bool = False) -> Loop:
        """Compiles whatever ``call`` compiles, makes its inputs, and captures its graph."""
        sets = self.inputs(make, warm=warm)
        cache = "cold" if sum(map(tensor_bytes, sets)) >= _TIMES_L2 * self.l2_bytes else "warm"
        for _ in range(3 if self.on_gpu else 1):
            call(sets[0])
        if not self.on_gpu:
            calls = max(2, len(sets))
            return Loop(_repeated(call, sets, calls), sets, calls, len(sets), cache, "perf_counter")
        torch.cuda.synchronize(self.device)
        # The first guess contains launches, the second one does not.
        run, method, calls = _repeated(call, sets, 3), "events", 3
        for _ in range(2):
            each_ms = self._gpu_samples({"": Loop(run, sets, calls, len(sets), cache, method)}, 1)[""][0]
            needed = min(_MAX_CALLS, math.ceil(self.sample_ms / max(each_ms, 1e-4)))
            if calls >= needed and method == "graph":
                break
            calls = len(sets) * math.ceil(needed / len(sets))
            run, method = _captured(call, sets, calls)
        return Loop(run, (call, sets), calls, len(sets), cache, method)

    def samples(self, loops: Mapping[str, Loop]) -> dict[str, list[float]]:
        """Milliseconds of a call for each loop, one of each in every round, so that drifts of clocks meet all alike."""
        if self.on_gpu:
            # Replayed once before, for uploads and clocks.
            self._gpu_samples(loops, 1)
            return self._gpu_samples(loops, self.rounds)
        found: dict[str, list[float]] = {name: [] for name in loops}
        for _ in range(self.rounds):
            for name, loop in loops.items():
                begun = time.perf_counter()
                loop.run()
                found[name].append((time.perf_counter() - begun) * 1e3 / loop.calls)
        return found

    def once(self, call: Callable[[], Any], sets: int) -> float:
        """Milliseconds of a call that is warmed up and rotates ``sets`` inputs by itself; what tuning compares."""

        def sample(run: Callable[[], None], calls: int, rounds: int) -> float:
            loop = Loop(run, None, calls, sets, "", "")
            return statistics.median(self._gpu_samples({"": loop}, rounds)[""])

        each_ms = sample(_repeated(lambda _: call(), [None], 2), 2, 1)
        calls = max(sets, min(64, max(4, math.ceil(_TUNING_MS / each_ms))))
        return sample(_captured(lambda _: call(), [None], calls)[0], calls, 3)

    def _gpu_samples(self, loops: Mapping[str, Loop], rounds: int) -> dict[str, list[float]]:
        found: dict[str, list[float]] = {name: [] for name in loops}
        for number in range(rounds):
            order = list(loops)
            # Who follows whom changes.
            order = order[number % len(order) :] + order[: number % len(order)]
            events = {name: [torch.cuda.Event(enable_timing=True) for _ in range(2)] for name in order}  # type: ignore[no-untyped-call]
            # The GPU is kept busy while the CPU launches, or the first sample would have the launch in it.
            torch.cuda._sleep(_SPIN_CYCLES)  # type: ignore[no-untyped-call]
            for name in order:
                events[name][0].record()
                loops[name].run()
                events[name][1].record()
            torch.cuda.synchronize(self.device)
            for name, (start, end) in events.items():
                found[name].append(float(start.elapsed_time(end)) / loops[name].calls)
        return found


def timer_for(device: torch.device, *, quick: bool) -> Timer:
    """Twenty-five samples of five milliseconds; fewer where quick, and hardly any on a CPU."""
    if device.type != "cuda":
        return Timer(device, 3, 0.0, 2**12)
    l2_bytes = int(torch.cuda.get_device_properties(device).L2_cache_size)
    return Timer(device, 7 if quick else 25, 2.0 if quick else 5.0, l2_bytes)


def summary(samples_ms: list[float]) -> Times:
    """Median and the percentiles 20 and 80."""
    ordered = [sample * 1e3 for sample in samples_ms]
    fifths = statistics.quantiles(ordered, n=5, method="inclusive")
    return Times(statistics.median(ordered), fifths[0], fifths[3], len(ordered))


def tensor_bytes(value: Any) -> int:
    """Of all distinct tensors in nested tuples, lists and dicts."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in _tensors(value)}.values())


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        # Of sparse ones the numbers are nearly all; torch's 2:4 calls them packed.
        packed = getattr(value, "packed", None)
        yield value.values() if value.layout == torch.sparse_bsr else value if packed is None else packed
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from _tensors(one)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _repeated(call: Callable[[Any], Any], sets: list[Any], calls: int) -> Callable[[], None]:
    def run() -> None:
        for number in range(calls):
            call(sets[number % len(sets)])

    return run


def _captured(call: Callable[[Any], Any], sets: list[Any], calls: int) -> tuple[Callable[[], None], str]:
    """A graph of the calls; where capture fails, the calls themselves, with launches in their time."""
    plain = _repeated(call, sets, calls)
    graph = torch.cuda.CUDAGraph()
    try:
        # Of this thread alone: others may be compiling.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            plain()
    except RuntimeError:
        torch.cuda.synchronize()
        return plain, "events"
    return graph.replay, "graph"
