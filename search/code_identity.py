"""What code a run runs: version, source digest, packages, plug-ins; and what changed since another run."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from archfront.plugins import Plugin

_PACKAGES = ("numpy", "optuna", "ray", "scikit-learn", "scipy", "timm", "torch", "triton")
_LAYERS = ("spaces", "evaluators", "search", "db", "kernels")


def code_identity(plugins: Sequence[Plugin]) -> dict[str, Any]:
    """Everything that a result may depend on besides the job and the machine."""
    packages: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    return {
        "archfront": version("archfront"),
        "source": source_digest(),
        "python": platform.python_version(),
        "packages": packages,
        "plugins": {plugin.name: plugin.digest for plugin in plugins},
    }


@cache
def source_digest() -> str:
    """Digest of the source of all layers that decide or compute something."""
    root = Path(__file__).parent.parent
    digest = hashlib.blake2b(digest_size=16)
    for layer in _LAYERS:
        for path in sorted((root / layer).rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def differences(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """What of a worker's code is not the driver's, in words.

    Plug-ins, which travel with the job, make no difference; nor does what ``essence`` leaves out.
    """
    return changes(essence(mine), essence(theirs))


def essence(code: Mapping[str, Any]) -> dict[str, Any]:
    """A code identity without plug-ins, builds of a package for other hardware (``2.13.0+cpu``) and Python's patch
    level."""
    packages = {name: found and str(found).split("+")[0] for name, found in code["packages"].items()}
    python = ".".join(str(code["python"]).split(".")[:2])
    return {**code, "python": python, "packages": packages, "plugins": {}}


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """What differs, in words, one line each."""
    found = [
        f"{name}: {before.get(name)} -> {after.get(name)}"
        for name in ("archfront", "python", "source")
        if before.get(name) != after.get(name)
    ]
    for group in ("packages", "plugins"):
        old, new = before.get(group, {}), after.get(group, {})
        found += [
            f"{group[:-1]} {name}: {old.get(name)} -> {new.get(name)}"
            for name in sorted(set(old) | set(new))
            if old.get(name) != new.get(name)
        ]
    return found
