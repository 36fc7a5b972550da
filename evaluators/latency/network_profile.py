"""Makes a network predictor for a space: traces it, profiles its operators, and calibrates on whole networks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from archfront.evaluators.latency.device import LOCAL_CPU, Fingerprint
from archfront.evaluators.latency.measurement import Settings, quiet_elsewhere
from archfront.evaluators.latency.predictors.network import NetworkLatency
from archfront.evaluators.latency.profile import OPERATOR_SETTINGS, Profile, profile_operators
from archfront.evaluators.latency.space_traces import covering_traces, traced_genotypes
from archfront.plugins import Plugin
from archfront.spaces.space import Space

SAMPLES = 200
NETWORKS = 24
RANDOM_NETWORKS = 29
"""Uniformly drawn, for the intervals: of so many the 27th error is what nine of ten more will stay within."""
PROCESSES = 2
_TIMEOUT_S = 600.0
_COMPILE_TIMEOUT_S = 3600.0
"""Half a minute to compile a network is no rarity."""


def network_latency(
    space: Space,
    device: Fingerprint,
    place: str = LOCAL_CPU,
    batch: int = 1,
    plugins: Sequence[Plugin] = (),
    *,
    backend: str = "eager",
    samples: int = SAMPLES,
    networks: int = NETWORKS,
    randoms: int | None = None,
    operator_settings: Settings = OPERATOR_SETTINGS,
    network_settings: Settings | None = None,
) -> NetworkLatency:
    """A predictor of the space's networks on a device, from measurements in fresh processes.

    Args:
        space: of torch models.
        device: the fingerprint of ``place``, whose threads are used.
        place: ``local-cpu`` or ``cuda:<number>``.
        batch: images a pass.
        plugins: files that may hold the space.
        backend: that runs whole networks; single operators are measured eagerly.
        samples: genotypes that are traced to learn which operators a space without blocks has.
        networks: whole ones, spread over the space, that the correction is fitted to.
        randoms: further ones, drawn at random, for the intervals; by default 29, and none where each is compiled.
        operator_settings, network_settings: how long to measure.

    Raises:
        MeasurementError: a process failed, or a network of the space cannot run.
    """
    claimed = "cpu" if place == LOCAL_CPU else place
    rng = np.random.default_rng(0)
    genotypes = space.to_json(space.sample_spread(rng, networks))
    if randoms is None:
        randoms = 0 if backend == "compile" else RANDOM_NETWORKS
    genotypes += space.to_json(space.sample(rng, randoms)) if randoms else []
    traces = list(traced_genotypes(space, genotypes, batch=batch, device=claimed))
    covering = covering_traces(space, samples, batch=batch, device=claimed)
    empty = Profile(device=device.to_json(), threads=device.threads)
    operators = [operator for found in (*covering, *traces) for operator in found.operators]
    profile = profile_operators(operators, empty, settings=operator_settings, timeout_s=_TIMEOUT_S)
    times = [
        quiet_elsewhere(
            {"name": space.name, **space.config},
            [{"genotype": genotype, "batch": batch, "backend": backend} for genotype in genotypes],
            threads=device.threads,
            settings=network_settings,
            timeout_s=_COMPILE_TIMEOUT_S if backend == "compile" else _TIMEOUT_S,
            plugins=plugins,
            device=place,
            probe_ms=profile.probe_ms,
        )[0]
        for _ in range(PROCESSES)
    ]
    # Load only ever adds: the least of the processes' times is the truest.
    alike = [place >= len(genotypes) - randoms for place in range(len(genotypes))] if randoms else None
    return NetworkLatency(profile).fit(traces, np.stack(times).min(axis=0), alike)
