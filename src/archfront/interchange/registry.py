"""The table of what a whole job can be exported to, by the scheme that ``--to`` begins with."""

from __future__ import annotations

import importlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from archfront.client import Job
from archfront.db.connection import without_password
from archfront.errors import InputError, suggestion


@dataclass(frozen=True, kw_only=True)
class Written:
    """What an export wrote: ``what`` in words, with the numbers that matter."""

    what: str
    to: str


Exporter = Callable[[Job, str], Written]
"""Writes a job to what stands behind the scheme; InputError if that cannot be written."""

SCHEMES: dict[str, str] = {
    "optuna": "archfront.interchange.optuna_export:export_study",
    "tensorboard": "archfront.interchange.tensorboard:export_events",
    "csv": "archfront.interchange.dump:export_csv",
    "parquet": "archfront.interchange.dump:export_parquet",
}
FORMS = "optuna:URL, tensorboard:FOLDER, csv:FOLDER, parquet:FOLDER"


def scheme_of(to: str) -> str | None:
    """The scheme of a ``--to``, or None where it is a file's name.

    Raises:
        InputError: it looks like a scheme that is none.
    """
    scheme, colon, rest = to.partition(":")
    if not colon or not scheme.isalpha() or Path(to).suffix in (".json", ".safetensors", ".pt2", ".onnx"):
        return None
    if scheme not in SCHEMES:
        raise InputError("--to", without_password(to), "begins with an unknown scheme", suggestion(scheme, SCHEMES))
    if not rest:
        raise InputError("--to", to, "names no place", f"Write one of {FORMS}.")
    return scheme


def export_job(job: Job, to: str) -> Written:
    """Write a whole job to ``SCHEME:PLACE``.

    Raises:
        InputError: an unknown scheme, a place that cannot be written or is taken.
    """
    scheme = scheme_of(to)
    if scheme is None:
        raise InputError("--to", to, "is no place for a whole job", f"Write one of {FORMS}, or name a CANDIDATE.")
    module, _, name = SCHEMES[scheme].partition(":")
    exporter: Exporter = getattr(importlib.import_module(module), name)
    return exporter(job, to.partition(":")[2])


@contextmanager
def new_folder(to: str) -> Iterator[Path]:
    """A folder to fill, which takes its place once the block ends well: nobody meets half an export.

    Raises:
        InputError: something is there already, or the parent folder is missing.
    """
    place = Path(to).absolute()
    if not place.parent.is_dir():
        raise InputError("--to", to, "lies in a folder that does not exist", "Make the folder first.")
    if place.exists() and not (place.is_dir() and not any(place.iterdir())):
        raise InputError("--to", to, "is there already", "Name a new folder, or remove this one.")
    draft = Path(tempfile.mkdtemp(prefix=f".{place.name}-", dir=place.parent))
    try:
        yield draft
        # mkdtemp's folder is for its owner alone.
        umask = os.umask(0)
        os.umask(umask)
        draft.chmod(0o777 & ~umask)
        draft.replace(place)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
