"""Profiles of devices in the ledger: what they lack is measured, and each step of it is kept at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from archfront.db.ledger import Ledger
from archfront.evaluators.latency.device import Fingerprint
from archfront.evaluators.latency.operators import Operator
from archfront.evaluators.latency.profile import Profile, ProfileProgress, profile_operators
from archfront.evaluators.latency.tracing import Trace, trace
from archfront.spaces.named_models import build_model, input_shape

KIND = "profile"


def stored_profile(ledger: Ledger, device: Fingerprint) -> Profile:
    """All that the ledger holds of a device; empty if nothing."""
    profile = Profile(device=device.to_json(), threads=device.threads)
    for content in ledger.artifacts(KIND, f"{device.digest}:"):
        part = Profile.from_json(content)
        profile = replace(
            profile,
            ms={**profile.ms, **part.ms},
            std_ms={**profile.std_ms, **part.std_ms},
            facts={**profile.facts, **part.facts},
            failed={**profile.failed, **part.failed},
            probe_ms=profile.probe_ms or part.probe_ms,
        )
    return profile


def extend_profile(
    ledger: Ledger,
    device: Fingerprint,
    operators: Iterable[Operator],
    observe: Callable[[ProfileProgress], None] = lambda _: None,
) -> Profile:
    """The device's profile with these operators measured; a killed run goes on where it stood.

    Raises:
        MeasurementError: a measuring process failed.
    """
    known = stored_profile(ledger, device)
    before = known

    def keep(profile: Profile) -> None:
        nonlocal before
        new = replace(
            profile,
            ms={c: v for c, v in profile.ms.items() if c not in before.ms},
            std_ms={c: v for c, v in profile.std_ms.items() if c not in before.ms},
            facts={c: v for c, v in profile.facts.items() if c not in before.ms},
            failed={c: v for c, v in profile.failed.items() if c not in before.failed},
        )
        ledger.store_artifact(KIND, f"{device.digest}:{new.digest}", new.to_json(), profile.device)
        before = profile

    return profile_operators(operators, known, keep=keep, observe=observe)


def changed_devices(ledger: Ledger, device: Fingerprint) -> list[str]:
    """How devices of the same model that were profiled before differ from this one: ``torch 2.12.0 then, 2.13.0``."""
    now, found = device.to_json(), []
    for then in ledger.devices_of(KIND):
        if then.get("model") == now["model"] and then["digest"] != now["digest"]:
            names = [name for name in now if name != "digest" and then.get(name) != now[name]]
            found.append(", ".join(f"{name} was {then.get(name)!r} and is {now[name]!r}" for name in names))
    return found


def model_traces(names: Sequence[str], batch: int, device: str) -> list[Trace]:
    """Traces of models by name, ``timm:resnet18``.

    Raises:
        InputError: an unknown model.
    """
    found: list[Any] = []
    for name in names:
        with torch.device("meta"):
            model = build_model(name)
        found.append(trace(model, input_shape(model), batch=batch, device=device))
    return found
