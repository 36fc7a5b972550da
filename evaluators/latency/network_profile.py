"""Makes a network predictor for a space: traces it, profiles its operators, and calibrates on whole networks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from archfront.evaluators.latency.device import LOCAL_CPU, Fingerprint
from archfront.evaluators.latency.measurement import Settings, affordable, quiet_elsewhere
from archfront.evaluators.latency.predictors.network import NetworkLatency
from archfront.evaluators.latency.profile import OPERATOR_SETTINGS, Profile, profile_operators
from archfront.evaluators.latency.space_traces import covering_traces, traced_genotypes
from archfront.evaluators.latency.tracing import Trace
from archfront.plugins import Plugin
from archfront.spaces.space import Space

SAMPLES = 200
NETWORKS = 24
LEAST_RANDOM, MOST_RANDOM = 29, 99
"""Uniformly drawn, for the intervals. What nine of ten more stay within is the 27th error of 29: these hold 90 % give
or take 5, by the luck of the draw; of 99 give or take 3."""
RANDOM_S = 45.0
"""What those beyond the least may take a process to measure."""
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
        randoms: further ones, drawn at random, for the intervals; by default 29, more if they are quickly measured,
            and none where each is compiled.
        operator_settings, network_settings: how long to measure.

    Raises:
        MeasurementError: a process failed, or a network of the space cannot run.
    """
    claimed = "cpu" if place == LOCAL_CPU else place
    rng = np.random.default_rng(0)
    genotypes = space.to_json(space.sample_spread(rng, networks))
    traces = list(traced_genotypes(space, genotypes, batch=batch, device=claimed))
    covering = covering_traces(space, samples, batch=batch, device=claimed)
    profile = Profile(device=device.to_json(), threads=device.threads)

    def with_operators(profile: Profile, networks: Sequence[Trace]) -> Profile:
        operators = [operator for found in networks for operator in found.operators]
        return profile_operators(operators, profile, settings=operator_settings, timeout_s=_TIMEOUT_S)

    profile = with_operators(profile, [*covering, *traces])
    if randoms is None and backend == "compile":
        randoms = 0
    elif randoms is None:
        ms = float(NetworkLatency(profile).predict(traces).ms.mean())
        settings = network_settings or Settings()
        randoms = affordable(ms, settings, seconds=RANDOM_S, least=LEAST_RANDOM, most=MOST_RANDOM)
    if randoms:
        drawn = space.to_json(space.sample(rng, randoms))
        genotypes += drawn
        traces += traced_genotypes(space, drawn, batch=batch, device=claimed)
        profile = with_operators(profile, traces)
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
