"""Named plug-in tables, and the construction of a component from a job file's mapping.

A leaf beside ``errors``. A family (spaces, evaluators, strategies, data sets) has one table ``name -> "module:Class"``;
installed distributions extend it by the entry-point group ``archfront.<family>``, a user's ``--plugin`` file by its
``ARCHFRONT_PLUGINS`` mapping. A job file can only name what stands in a table.
"""

from __future__ import annotations

import importlib
import inspect
import typing
from collections.abc import Iterator, Mapping
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

import pydantic

from archfront.errors import InputError, InputErrors, suggestion

T = TypeVar("T")


class Registry(Generic[T]):
    """One family of components: a readable table of names, each bound to a class or to ``"module:Class"``."""

    def __init__(self, family: str, table: Mapping[str, str | type[T]]) -> None:
        self.family = family
        self._table: dict[str, str | type[T]] = dict(table)
        self._entry_points_read = False

    def names(self) -> list[str]:
        self._read_entry_points()
        return sorted(self._table)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def register(self, name: str, component: type[T]) -> None:
        """Add a component.

        Raises:
            InputError: the name is taken by something else.
        """
        present = self._table.get(name)
        if present is not None and present is not component:
            raise InputError(self.family, name, "is registered already", "Choose another name.")
        self._table[name] = component

    def replace(self, name: str, component: type[T]) -> None:
        """Bind a name anew: a plug-in file that is loaded again after an edit."""
        self._table[name] = component

    def get(self, name: str, field: str) -> type[T]:
        """The class behind a name.

        Raises:
            InputError: unknown name; the message suggests the nearest.
        """
        self._read_entry_points()
        if name not in self._table:
            raise InputError(field, name, f"is not a known {_singular(self.family)}", suggestion(name, self._table))
        target = self._table[name]
        if isinstance(target, str):
            module, _, attribute = target.partition(":")
            target = typing.cast("type[T]", getattr(importlib.import_module(module), attribute))
            self._table[name] = target
        return target

    def build(self, config: Mapping[str, Any], field: str, **extra: Any) -> T:
        """Construct the component that ``config["name"]`` names from the other keys of the mapping.

        Args:
            config: ``{"name": ..., <keyword arguments of the class>}``.
            field: path of the mapping in the job file, for messages.
            extra: arguments that the job file may not give.
        """
        if "name" not in config:
            raise InputError(field, dict(config), "has no 'name'", f"Give one of: {', '.join(self.names())}.")
        cls = self.get(str(config["name"]), f"{field}.name")
        arguments = {key: value for key, value in config.items() if key != "name"}
        return cls(**validated_arguments(cls, arguments, field), **extra)

    def _read_entry_points(self) -> None:
        if self._entry_points_read:
            return
        self._entry_points_read = True
        for point in entry_points(group=f"archfront.{self.family}"):
            if point.name not in self._table:
                self._table[point.name] = point.value


def _singular(family: str) -> str:
    return f"{family[:-3]}y" if family.endswith("ies") else family[:-1]


def arguments_model(cls: type[Any]) -> type[pydantic.BaseModel]:
    """A pydantic model of the keyword arguments of ``cls``: the typed signature is the configuration's schema.

    Arguments whose name starts with ``_`` are not open to job files.
    """
    hints = typing.get_type_hints(cls.__init__, include_extras=True)
    fields: dict[str, Any] = {}
    for parameter in inspect.signature(cls.__init__).parameters.values():
        if parameter.name == "self" or parameter.name.startswith("_"):
            continue
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        default = ... if parameter.default is parameter.empty else parameter.default
        fields[parameter.name] = (hints.get(parameter.name, Any), default)
    config = pydantic.ConfigDict(extra="forbid", arbitrary_types_allowed=True, protected_namespaces=())
    return pydantic.create_model(cls.__name__, __config__=config, **fields)


def validated_arguments(cls: type[Any], arguments: Mapping[str, Any], field: str) -> dict[str, Any]:
    """Arguments of ``cls`` from a job file, checked against its signature.

    Raises:
        InputErrors: every wrong, missing or misspelt argument, each with its path.
    """
    model = arguments_model(cls)
    try:
        checked = model.model_validate(dict(arguments))
    except pydantic.ValidationError as error:
        raise InputErrors(input_errors(error, field, model)) from None
    return {name: getattr(checked, name) for name in model.model_fields}


def input_errors(
    error: pydantic.ValidationError, field: str, model: type[pydantic.BaseModel] | None = None
) -> list[InputError]:
    """Pydantic's findings in the words of this project: path, value, problem, remedy."""
    found = []
    for item in error.errors(include_url=False):
        inner = [str(part) for part in item["loc"]]
        path = ".".join(part for part in [field, *inner] if part)
        if item["type"] == "extra_forbidden":
            known = _fields_at(model, item["loc"][:-1])
            found.append(InputError(path, item["input"], "is given for an unknown key", suggestion(inner[-1], known)))
        elif item["type"] == "missing":
            found.append(InputError(path, None, "is missing", "Give it a value."))
        else:
            message = item["msg"].removeprefix("Value error, ")
            found.append(InputError(path, item["input"], "cannot be used", message.rstrip(".") + "."))
    return found


def _fields_at(model: type[pydantic.BaseModel] | None, path: tuple[int | str, ...]) -> list[str]:
    """Names of the fields at a path inside a model, for suggestions; empty where it is no model."""
    for part in path:
        if model is None:
            return []
        if isinstance(part, int) or part not in model.model_fields:
            continue
        annotation = model.model_fields[part].annotation
        candidates = [annotation, *typing.get_args(annotation)]
        model = next((c for c in candidates if isinstance(c, type) and issubclass(c, pydantic.BaseModel)), None)
    return list(model.model_fields) if model is not None else []
