"""What spaces that hold other spaces share: how an inner one is made, named in errors, and shows through."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from archfront.errors import InputError, InputErrors
from archfront.spaces.product import ColumnSpace
from archfront.spaces.registry import SPACES
from archfront.spaces.space import Space

SHAPES = ("resolution", "in_channels", "classes")
BLOCKS = ("block_catalogue", "block_indices", "build_block")


def inner_space(config: Mapping[str, Any], field: str) -> Space:
    """The space of a mapping inside a job's ``space``.

    Raises:
        InputError: as of any space, the field with its whole path.
    """
    with inside("space", field):
        return SPACES.build(config, field)


def written(space: Space) -> dict[str, Any]:
    """A space as a job file has it."""
    return {"name": space.name, **space.config}


@contextmanager
def inside(outer: str, inner: str) -> Iterator[None]:
    """Errors about the field ``outer`` become errors about ``inner``, where the inner space stands."""
    try:
        yield
    except InputErrors as errors:
        raise InputErrors([_moved(error, outer, inner) for error in errors.errors]) from errors
    except InputError as error:
        raise _moved(error, outer, inner) from error


def _moved(error: InputError, outer: str, inner: str) -> InputError:
    if error.field.startswith(inner) or not error.field.startswith(outer):
        return error
    return InputError(inner + error.field[len(outer) :], error.value, error.problem, error.remedy)


def show_through(space: Space, inner: Space, names: tuple[str, ...]) -> None:
    """Give a space those of the named attributes that the inner one has.

    They become attributes of the instance: evaluators ask by ``isinstance`` of a protocol, and since Python 3.12
    that looks past ``__getattr__``.
    """
    for name in names:
        if hasattr(inner, name):
            setattr(space, name, getattr(inner, name))


def decisions(space: Space) -> int | None:
    """How many decisions with more than one choice a genotype has, where that is fixed."""
    if isinstance(space, ColumnSpace):
        return sum(len(column.choices) > 1 for column in space.columns)
    known: int | None = getattr(space, "decisions", None)
    return known
