"""A user's own ``--plugin`` files: loaded from source, recorded by digest, sent to workers as source."""

from __future__ import annotations

import hashlib
import sys
import types
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from archfront.errors import InputError, suggestion
from archfront.evaluators.registry import EVALUATORS
from archfront.registry import Registry
from archfront.search.strategies.registry import STRATEGIES
from archfront.spaces.registry import SPACES

FAMILIES: dict[str, Registry[Any]] = {"spaces": SPACES, "evaluators": EVALUATORS, "strategies": STRATEGIES}
_VARIABLE = "ARCHFRONT_PLUGINS"


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


def load_plugins(plugins: Sequence[Plugin]) -> None:
    """Run the files and enter what their ``ARCHFRONT_PLUGINS`` names.

    Raises:
        InputError: a file fails to run, or names no known family.
    """
    for plugin in plugins:
        module = types.ModuleType(f"archfront_plugin_{plugin.digest}")
        if module.__name__ in sys.modules:
            continue
        module.__file__ = plugin.name
        # Classes look their module up by name: typing.get_type_hints does, for one.
        sys.modules[module.__name__] = module
        try:
            exec(compile(plugin.source, plugin.name, "exec"), module.__dict__)
            _register(plugin, getattr(module, _VARIABLE, None))
        except Exception as error:
            del sys.modules[module.__name__]
            if isinstance(error, InputError):
                raise
            raise InputError("--plugin", plugin.name, f"failed: {error!r}", "Mend the file.") from error


def _register(plugin: Plugin, table: Any) -> None:
    if not isinstance(table, dict):
        raise InputError(
            "--plugin", plugin.name, f"has no {_VARIABLE}", f'Add: {_VARIABLE} = {{"evaluators": {{"mine": Mine}}}}.'
        )
    for family, components in table.items():
        if family not in FAMILIES:
            raise InputError(f"{plugin.name}: {_VARIABLE}", family, "is no family", suggestion(str(family), FAMILIES))
        for name, component in components.items():
            FAMILIES[family].replace(str(name), component)
