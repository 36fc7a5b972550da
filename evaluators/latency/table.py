"""Per-block latency tables: every distinct block measured once, and the sum corrected by whole networks.

The sum of blocks measured alone is not a network's time: caches, allocation and the chain itself differ. So a dozen
whole networks are measured in the same process, spread from the lightest to the heaviest, and a line is fitted. It
minimises relative errors, because those are about the same for light and heavy networks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from archfront.errors import InputError
from archfront.evaluators.latency.chains import chain_sums, population_sums
from archfront.evaluators.latency.device import LOCAL_CPU
from archfront.evaluators.latency.digests import json_digest
from archfront.evaluators.latency.measurement import Settings, quiet_elsewhere
from archfront.plugins import Plugin
from archfront.spaces.blocks import BlockSpace
from archfront.spaces.space import Population

FORMAT = "archfront-latency-table-1"
NETWORKS = 16
PROCESSES = 3
LEAST_NETWORKS = 4
_POOL = 512


@dataclass(frozen=True, kw_only=True)
class Correction:
    """From the table's sum to a network's time: ``intercept_ms + slope * sum``.

    Attributes:
        intercept_ms: 0 or more: a chain cannot take less than nothing.
        slope: positive.
        relative_std: standard deviation of measured / predicted - 1, over the fitted networks and over processes.
        networks: how many were fitted.
    """

    intercept_ms: float
    slope: float
    relative_std: float
    networks: int


@dataclass(frozen=True, kw_only=True)
class LatencyTable:
    """A device's times of a space's blocks.

    Attributes:
        space: digest of the space.
        device: fingerprint as JSON, with its digest.
        batch, threads, backend: what was measured.
        blocks: ms of each descriptor.
        correction: from sums to networks.
        fitted: ``[sum, measured]`` ms of the networks behind the correction.
    """

    space: str
    device: Mapping[str, Any]
    batch: int
    threads: int
    backend: str
    blocks: Mapping[str, float]
    correction: Correction
    fitted: Sequence[Sequence[float]]

    def predict(self, space: BlockSpace, population: Population) -> tuple[npt.NDArray[np.float64], ...]:
        """Latency in ms and its standard deviation of each genotype: two arrays ``(n,)``.

        Raises:
            InputError: the table is of another space.
        """
        if space.digest != self.space:
            raise InputError("latency.table", self.space, "is of another space", f"Make one for {space.digest}.")
        descriptors = [spec.descriptor for spec in space.block_catalogue()]
        sums = population_sums(space, np.array([self.blocks[d] for d in descriptors]), population)
        fit = self.correction
        latency = fit.intercept_ms + fit.slope * sums
        return latency, fit.relative_std * latency

    @cached_property
    def digest(self) -> str:
        return json_digest(self.to_json())

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "space": self.space,
            "device": dict(self.device),
            "batch": self.batch,
            "threads": self.threads,
            "backend": self.backend,
            "blocks": [[name, ms] for name, ms in self.blocks.items()],
            "correction": vars(self.correction),
            "fitted": [list(pair) for pair in self.fitted],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LatencyTable:
        """The inverse of ``to_json``.

        Raises:
            InputError: it is not a latency table of this format.
        """
        try:
            if data["format"] != FORMAT:
                raise InputError("latency.table", data["format"], "is another format", f"Give one of {FORMAT}.")
            return cls(
                space=data["space"],
                device=data["device"],
                batch=data["batch"],
                threads=data["threads"],
                backend=data["backend"],
                blocks={name: float(ms) for name, ms in data["blocks"]},
                correction=Correction(**data["correction"]),
                fitted=data["fitted"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                "latency.table", sorted(data), f"is not a latency table ({error!r})", "Make it again."
            ) from None


def make_table(
    space: BlockSpace,
    *,
    batch: int = 1,
    threads: int = 1,
    backend: str = "eager",
    networks: int = NETWORKS,
    processes: int = PROCESSES,
    settings: Settings | None = None,
    timeout_s: float | None = 600,
    plugins: Sequence[Plugin] = (),
    place: str = LOCAL_CPU,
) -> LatencyTable:
    """Measure a table in fresh processes.

    The first measures the blocks alone, so that networks can be chosen by their sums. Each further one measures blocks
    and networks together. Memory layout and other load shift all figures of a process. Load only ever adds, so the
    least of the processes' times is taken; how far the two quickest disagree is part of the correction's deviation.

    Args:
        space: whose blocks.
        batch, threads, backend: what to measure.
        networks: how many whole networks to fit the correction to, 4 or more.
        processes: how many measure blocks and networks.
        settings: how long each measures.
        timeout_s: of each process.
        plugins: files that may hold the space.
        place: the device, ``local-cpu`` or ``cuda:<number>``.

    Raises:
        MeasurementError: a process failed, or a block cannot run.
    """
    catalogue = space.block_catalogue()
    block_items = [{"block": spec.descriptor} for spec in catalogue]

    def timed(
        items: list[dict[str, Any]], probe_ms: float | None = None
    ) -> tuple[npt.NDArray[np.float64], dict[str, Any]]:
        """``(items,)`` ms, undisturbed, and the environment."""
        return quiet_elsewhere(
            {"name": space.name, **space.config},
            [{**item, "batch": batch, "backend": backend} for item in items],
            threads=threads,
            settings=settings,
            timeout_s=timeout_s,
            plugins=plugins,
            device=place,
            probe_ms=probe_ms,
        )

    first, environment = timed(block_items)
    chosen = spread_networks(space, first, max(LEAST_NETWORKS, networks), np.random.default_rng(0))
    every = block_items + [{"genotype": genotype} for genotype in space.to_json(chosen)]
    times = np.stack([timed(every, environment.get("probe_ms"))[0] for _ in range(max(1, processes))])
    blocks = np.concatenate([first[None], times[:, : len(first)]])
    medians, whole = blocks.min(axis=0), times[:, len(first) :]
    pairs = list(zip(chain_sums(medians, space.block_indices(chosen)), whole.min(axis=0), strict=True))
    descriptors = [spec.descriptor for spec in catalogue]
    return LatencyTable(
        space=space.digest,
        device=environment["device"],
        batch=batch,
        threads=threads,
        backend=backend,
        blocks=dict(zip(descriptors, medians.tolist(), strict=True)),
        correction=fit_correction([(float(s), float(t)) for s, t in pairs], process_deviation(whole)),
        fitted=[[float(s), float(t)] for s, t in pairs],
    )


def process_deviation(times: npt.NDArray[np.float64]) -> float:
    """Relative standard deviation of what the two quickest processes find for the same networks.

    Slower ones were disturbed, and say nothing about how well the least time is known.

    Args:
        times: ``(processes, networks)`` in ms.
    """
    if len(times) < 2:
        return 0.0
    # Deviations are common to all networks of a process, so the networks are averaged and the processes compared.
    return float(np.sort(np.log(times).mean(axis=1))[:2].std(ddof=1))


def fit_correction(pairs: Sequence[tuple[float, float]], process_std: float = 0.0) -> Correction:
    """The line from sums to measured times with the least squared relative errors and no negative intercept.

    Args:
        pairs: ``(sum, measured)`` in ms, at least three.
        process_std: relative deviation between measuring processes, joined with that of the residuals.
    """
    sums, measured = np.array(pairs, dtype=np.float64).T
    # Divided by the measured time, so that every residual is a relative one.
    design = np.stack([1 / measured, sums / measured], axis=1)
    target = np.ones(len(measured))
    intercept, slope = np.linalg.lstsq(design, target, rcond=None)[0]
    if intercept < 0 or slope <= 0:
        intercept = 0.0
        slope = float(design[:, 1] @ target / (design[:, 1] @ design[:, 1]))
    residuals = measured / (intercept + slope * sums) - 1
    std = float(np.hypot(np.sqrt((residuals**2).sum() / max(1, len(measured) - 2)), process_std))
    return Correction(intercept_ms=float(intercept), slope=float(slope), relative_std=std, networks=len(measured))


def spread_networks(
    space: BlockSpace, medians: npt.NDArray[np.float64], count: int, rng: np.random.Generator
) -> Population:
    """Genotypes whose sums lie evenly from about the lightest to about the heaviest of the space.

    Uniform draws are all about alike, and a line fitted to them would say nothing of the light networks that a search
    ends at. So draws are crossed with the extremes that a short climb finds.
    """
    pool = space.sample(rng, _POOL)
    ends = []
    for sign in (1.0, -1.0):
        best = pool[:64]
        for _ in range(40):
            both = np.concatenate([best, space.mutate(rng, best)])
            best = both[np.argsort(sign * chain_sums(medians, space.block_indices(both)), kind="stable")[:64]]
        ends.append(best[:1])
    crossed = [space.crossover(rng, pool, end[np.zeros(len(pool), dtype=np.int64)]) for end in ends]
    twice = [
        space.crossover(rng, one, end[np.zeros(len(one), dtype=np.int64)])
        for one, end in zip(crossed, ends, strict=True)
    ]
    every = np.concatenate([pool, *crossed, *twice, *ends])
    sums = chain_sums(medians, space.block_indices(every))
    wanted = np.linspace(sums.min(), sums.max(), count)
    chosen: Population = every[np.unique([int(np.abs(sums - value).argmin()) for value in wanted])]
    return chosen
