"""A user's own ``--plugin`` files: loaded from source, recorded by digest, sent to workers as source. A leaf."""

from __future__ import annotations

import hashlib
import sys
import threading
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from archfront.errors import InputError, suggestion
from archfront.registry import Registry

FAMILIES = ("spaces", "evaluators", "strategies", "models", "scores", "recoveries", "allocators", "recipes")
"""Known to every process; some load the tables of a few of them alone."""

_VARIABLE = "ARCHFRONT_PLUGINS"

_LOADING = threading.RLock()
"""A controller resolves several jobs at once: none may see a file that another has half run."""


@dataclass(frozen=True)
class Plugin:
    """A plug-in file's source, as it travels."""

    name: str
    source: str

    @property
    def digest(self) -> str:
        return hashlib.blake2b(self.source.encode(), digest_size=16).hexdigest()


def read_plugins(paths: Iterable[str | Path]) -> list[Plugin]:
    """The sources of plug-in files.

    Raises:
        InputError: a file cannot be read.
    """
    plugins = []
    for path in paths:
        try:
            plugins.append(Plugin(Path(path).name, Path(path).read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError) as error:
            raise InputError("--plugin", str(path), f"cannot be read ({error})", "Give a Python file.") from None
    return plugins


def load_into(registries: Mapping[str, Registry[Any]], plugins: Sequence[Plugin]) -> None:
    """Run the files and enter what their ``ARCHFRONT_PLUGINS`` names into the tables of the given families.

    Raises:
        InputError: a file fails to run, or names no known family.
    """
    for plugin in plugins:
        with _LOADING:
            _load(registries, plugin)


def _load(registries: Mapping[str, Registry[Any]], plugin: Plugin) -> None:
    module = types.ModuleType(f"archfront_plugin_{plugin.digest}")
    loaded = sys.modules.get(module.__name__)
    if loaded is not None:
        # Another version of the file may have taken its names since.
        _register(registries, plugin, getattr(loaded, _VARIABLE, None))
        return
    module.__file__ = plugin.name
    # Classes look their module up by name: typing.get_type_hints does, for one.
    sys.modules[module.__name__] = module
    try:
        exec(compile(plugin.source, plugin.name, "exec"), module.__dict__)
        _register(registries, plugin, getattr(module, _VARIABLE, None))
    except Exception as error:
        del sys.modules[module.__name__]
        if isinstance(error, InputError):
            raise
        raise InputError("--plugin", plugin.name, f"failed: {error!r}", "Mend the file.") from error


def _register(registries: Mapping[str, Registry[Any]], plugin: Plugin, table: Any) -> None:
    if not isinstance(table, dict):
        raise InputError(
            "--plugin", plugin.name, f"has no {_VARIABLE}", f'Add: {_VARIABLE} = {{"evaluators": {{"mine": Mine}}}}.'
        )
    for family, components in table.items():
        if family not in FAMILIES:
            raise InputError(f"{plugin.name}: {_VARIABLE}", family, "is no family", suggestion(str(family), FAMILIES))
        for name, component in components.items():
            if family in registries:
                registries[family].replace(str(name), component)
