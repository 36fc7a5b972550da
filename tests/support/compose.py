"""Reads docker-compose.yml, so that tests run its very commands, environment and health checks without Docker."""

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


class ComposeError(ValueError):
    """The file cannot be used: a variable that must be set is not, or a value has a form that is not known here."""


@dataclass(frozen=True, kw_only=True)
class HealthCheck:
    """A command whose exit status tells whether a service is well."""

    test: tuple[str, ...]
    interval_s: float
    timeout_s: float
    retries: int
    start_period_s: float


@dataclass(frozen=True, kw_only=True)
class Mount:
    """A volume (a name of ``Compose.volumes``, or a path of the host) and where a container sees it."""

    source: str
    target: str
    read_only: bool

    @property
    def is_named(self) -> bool:
        return not self.source.startswith((".", "/", "~"))


@dataclass(frozen=True, kw_only=True)
class Service:
    """What one service runs, and with what.

    The methods take ``substitutions``, of paths in a container by those of this machine, say: a key is replaced
    wherever it stands for itself, the longest key first, but not inside a longer name.
    """

    name: str
    image: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    healthcheck: HealthCheck | None
    user: str | None
    restart: str | None
    profiles: tuple[str, ...]
    volumes: tuple[Mount, ...]
    secrets: Mapping[str, Path]

    def argv(self, substitutions: Mapping[str, str] | None = None) -> list[str]:
        """The command."""
        return [_substituted(word, substitutions or {}) for word in self.command]

    def env(self, substitutions: Mapping[str, str] | None = None) -> dict[str, str]:
        """The environment variables that the file sets."""
        return {name: _substituted(value, substitutions or {}) for name, value in self.environment.items()}

    def health_argv(self, substitutions: Mapping[str, str] | None = None) -> list[str]:
        """The command of the health check."""
        assert self.healthcheck is not None, f"{self.name} has no health check"
        return [_substituted(word, substitutions or {}) for word in self.healthcheck.test]


@dataclass(frozen=True, kw_only=True)
class Compose:
    """A Compose file. ``secrets`` are files by name; ``volumes`` and ``networks`` are the names that it declares."""

    services: Mapping[str, Service]
    secrets: Mapping[str, Path]
    volumes: frozenset[str]
    networks: frozenset[str]


def load_compose(path: Path, variables: Mapping[str, str] | None = None) -> Compose:
    """Read a Compose file.

    Args:
        variables: what ``${NAME}`` stands for; the real environment is not looked at.

    Raises:
        ComposeError: see there.
    """
    document = interpolated(yaml.safe_load(path.read_text(encoding="utf-8")), variables or {})
    secrets = {name: path.parent / entry["file"] for name, entry in document.get("secrets", {}).items()}
    return Compose(
        services={name: _service(name, entry, secrets) for name, entry in document["services"].items()},
        secrets=secrets,
        volumes=frozenset(document.get("volumes", {})),
        networks=frozenset(document.get("networks", {})),
    )


def interpolated(value: Any, variables: Mapping[str, str]) -> Any:
    """A document with its variables filled in, in all values.

    Raises:
        ComposeError: a variable of the form ``${NAME?message}`` is not set.
    """
    if isinstance(value, dict):
        return {key: interpolated(entry, variables) for key, entry in value.items()}
    if isinstance(value, list):
        return [interpolated(entry, variables) for entry in value]
    if isinstance(value, str):
        return _VARIABLE.sub(lambda found: _value_of(found, variables), value)
    return value


# $$, $NAME, ${NAME} and ${NAME:-word} with its kin; what is none of them is taken by the last part, and refused.
_VARIABLE = re.compile(r"\$(?:(?P<dollar>\$)|(?P<plain>\w+)|\{(?P<name>\w+)(?:(?P<how>:?[-?+])(?P<word>[^{}]*))?\}|)")


def _value_of(found: re.Match[str], variables: Mapping[str, str]) -> str:
    name = found["plain"] or found["name"]
    if found["dollar"]:
        return "$"
    if name is None:
        raise ComposeError(f"no variable: {found.string!r}")
    how, word = found["how"] or "", found["word"] or ""
    value = variables.get(name)
    # The colon makes an empty variable count as one that is not set.
    is_set = value is not None and not (how.startswith(":") and not value)
    if how.endswith("+"):
        return word if is_set else ""
    if is_set:
        return str(value)
    if how.endswith("?"):
        raise ComposeError(f"{name}: {word or 'must be set'}")
    return word


def _service(name: str, entry: Mapping[str, Any], secrets: Mapping[str, Path]) -> Service:
    wanted = [secret if isinstance(secret, str) else secret["source"] for secret in entry.get("secrets", [])]
    if unknown := set(wanted) - set(secrets):
        raise ComposeError(f"{name}: secrets that are not declared: {sorted(unknown)}")
    command = entry.get("command", [])
    environment = entry.get("environment", {})
    if isinstance(environment, list):
        environment = dict(line.split("=", 1) for line in environment)
    return Service(
        name=name,
        image=entry["image"],
        command=tuple(shlex.split(command) if isinstance(command, str) else map(str, command)),
        environment={key: str(value) for key, value in environment.items()},
        healthcheck=_health_check(name, entry["healthcheck"]) if "healthcheck" in entry else None,
        user=entry.get("user"),
        restart=entry.get("restart"),
        profiles=tuple(entry.get("profiles", ())),
        volumes=tuple(_mount(volume) for volume in entry.get("volumes", ())),
        secrets={secret: secrets[secret] for secret in wanted},
    )


def _mount(volume: str | Mapping[str, Any]) -> Mount:
    if isinstance(volume, str):
        source, target, *options = volume.split(":")
        return Mount(source=source, target=target, read_only="ro" in options)
    return Mount(source=volume["source"], target=volume["target"], read_only=volume.get("read_only", False))


def _health_check(name: str, entry: Mapping[str, Any]) -> HealthCheck:
    kind, *words = [entry["test"]] if isinstance(entry["test"], str) else entry["test"]
    if kind == "CMD":
        test = tuple(map(str, words))
    elif kind == "CMD-SHELL" or not words:
        test = ("/bin/sh", "-c", words[0] if words else kind)
    else:
        raise ComposeError(f"{name}: a health check of the form {kind!r} is not known")
    return HealthCheck(
        test=test,
        interval_s=_seconds(entry.get("interval", "30s")),
        timeout_s=_seconds(entry.get("timeout", "30s")),
        retries=int(entry.get("retries", 3)),
        start_period_s=_seconds(entry.get("start_period", "0s")),
    )


def _seconds(text: str) -> float:
    parts = re.findall(r"(\d+(?:\.\d+)?)(ms|s|m|h)", text)
    if "".join(number + unit for number, unit in parts) != text:
        raise ComposeError(f"no duration: {text!r}")
    return sum(float(number) * {"ms": 0.001, "s": 1, "m": 60, "h": 3600}[unit] for number, unit in parts)


def _substituted(text: str, substitutions: Mapping[str, str]) -> str:
    if not substitutions:
        return text
    names = "|".join(re.escape(name) for name in sorted(substitutions, key=len, reverse=True))
    return re.sub(rf"(?<![\w./-])(?:{names})(?![\w.-])", lambda found: substitutions[found[0]], text)
