"""The profile of a device: the time of each operator that networks call, measured alone; it grows and stays."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from archfront.errors import InputError
from archfront.evaluators.latency.device import LOCAL_CPU
from archfront.evaluators.latency.digests import json_digest
from archfront.evaluators.latency.measurement import Settings, measured_elsewhere, pace
from archfront.evaluators.latency.operators import Operator, call_bytes

FORMAT = "archfront-operator-profile-1"
OPERATOR_SETTINGS = Settings(rounds=12, sample_ms=0.7, lead_ms=0.0, warmup_ms=4.0, warmup_limit_ms=60.0)

_CHUNK_OPERATORS = 200
_CHUNK_BYTES = 2**30
"""A process holds the tensors of all its operators at once."""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Times of operators on one device.

    Attributes:
        device: its fingerprint as JSON, with the digest.
        threads: of each call.
        ms: undisturbed time of each call, by its canonical text.
        std_ms: standard deviation of its median.
        facts: of each call: multiply-adds, and bytes read, written and of weights.
        failed: calls that cannot run alone, with the reason.
        probe_ms: what the probe of the first process took, whose pace all times are brought to; see ``quietness``.
    """

    device: Mapping[str, Any]
    threads: int
    ms: Mapping[str, float] = field(default_factory=dict)
    std_ms: Mapping[str, float] = field(default_factory=dict)
    facts: Mapping[str, tuple[int, int, int, int]] = field(default_factory=dict)
    failed: Mapping[str, str] = field(default_factory=dict)
    probe_ms: float | None = None

    @property
    def operators(self) -> list[Operator]:
        """What was measured, as operators of no module."""
        names = ("macs", "read_bytes", "written_bytes", "weight_bytes")
        return [Operator(call=c, module="", **dict(zip(names, self.facts[c], strict=True))) for c in self.ms]

    @cached_property
    def digest(self) -> str:
        """The profile's version: two of one digest predict the same."""
        return json_digest(self.to_json())

    def missing(self, calls: Iterable[str]) -> list[str]:
        """Those that were neither measured nor found to fail, each once, in the order given."""
        return [call for call in dict.fromkeys(calls) if call not in self.ms and call not in self.failed]

    def to_json(self) -> dict[str, Any]:
        rows = [[call, ms, self.std_ms[call], *self.facts[call]] for call, ms in self.ms.items()]
        return {
            "format": FORMAT,
            "device": dict(self.device),
            "threads": self.threads,
            "operators": rows,
            "failed": dict(self.failed),
            "probe_ms": self.probe_ms,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Profile:
        """The inverse of ``to_json``.

        Raises:
            InputError: it is not a profile of this format.
        """
        if data.get("format") != FORMAT:
            raise InputError("latency.profile", data.get("format"), "is no profile", f"Give one of {FORMAT}.")
        return cls(
            device=data["device"],
            threads=data["threads"],
            ms={row[0]: float(row[1]) for row in data["operators"]},
            std_ms={row[0]: float(row[2]) for row in data["operators"]},
            facts={row[0]: (row[3], row[4], row[5], row[6]) for row in data["operators"]},
            failed=data["failed"],
            probe_ms=data.get("probe_ms"),
        )


@dataclass(frozen=True, kw_only=True)
class ProfileProgress:
    """How far a profile is.

    Attributes:
        done, total: operators.
        left_s: about how long the rest takes; None before the first were measured.
    """

    done: int
    total: int
    left_s: float | None


def profile_operators(
    operators: Iterable[Operator],
    known: Profile,
    *,
    settings: Settings = OPERATOR_SETTINGS,
    timeout_s: float | None = 900,
    keep: Callable[[Profile], None] = lambda _: None,
    observe: Callable[[ProfileProgress], None] = lambda _: None,
) -> Profile:
    """Measure what a profile lacks, in fresh processes of some hundred operators each.

    Args:
        operators: that are needed; known ones cost nothing.
        known: of this device and number of threads.
        settings: how long each is measured.
        timeout_s: of one process.
        keep: called with the profile so far after each process, so that a killed profiling goes on from there.
        observe: called as often.

    Returns:
        ``known`` with what was missing.

    Raises:
        MeasurementError: a process failed.
        InputError: ``known`` is of another device.
    """
    facts = {o.call: (o.macs, o.read_bytes, o.written_bytes, o.weight_bytes) for o in operators}
    missing = known.missing(facts)
    start, done = time.monotonic(), 0
    observe(ProfileProgress(done=0, total=len(missing), left_s=None if missing else 0.0))
    for chunk in _chunks(missing):
        timings, environment = measured_elsewhere(
            None,
            [{"operator": call} for call in chunk],
            threads=known.threads,
            settings=settings,
            timeout_s=timeout_s,
            device=_device(known),
        )
        check_device(known, environment["device"])
        good = [(call, t) for call, t in zip(chunk, timings, strict=True) if t.error is None]
        if known.probe_ms is None:
            known = replace(known, probe_ms=environment.get("probe_ms"))
        share = pace(environment, known.probe_ms)
        known = replace(
            known,
            ms={**known.ms, **{call: share * t.quiet_ms for call, t in good}},
            std_ms={**known.std_ms, **{call: t.std_ms for call, t in good}},
            facts={**known.facts, **{call: facts[call] for call, _ in good}},
            failed={**known.failed, **{c: t.error for c, t in zip(chunk, timings, strict=True) if t.error is not None}},
        )
        keep(known)
        done += len(chunk)
        left = (time.monotonic() - start) / done * (len(missing) - done)
        observe(ProfileProgress(done=done, total=len(missing), left_s=left))
    return known


def check_device(profile: Profile, device: Mapping[str, Any]) -> None:
    """Refuse a profile of another device.

    Raises:
        InputError: names what differs.
    """
    if profile.device["digest"] == device["digest"]:
        return
    names = [name for name in device if name != "digest" and profile.device.get(name) != device[name]]
    differs = ", ".join(f"{name} {profile.device.get(name)!r} there, {device[name]!r} here" for name in names)
    problem = f"is of another device or setting ({differs})"
    raise InputError("latency.profile", profile.device["digest"], problem, "Run `archfront profile` on this one.")


def _device(profile: Profile) -> str:
    # Of several GPUs of one kind the first serves for all.
    return LOCAL_CPU if profile.device["kind"] == LOCAL_CPU else "cuda:0"


def _chunks(calls: Sequence[str]) -> Iterable[list[str]]:
    chunk: list[str] = []
    size = 0
    for call in calls:
        needs = call_bytes(call)
        if chunk and (len(chunk) == _CHUNK_OPERATORS or size + needs > _CHUNK_BYTES):
            yield chunk
            chunk, size = [], 0
        chunk.append(call)
        size += needs
    if chunk:
        yield chunk
