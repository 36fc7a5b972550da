"""Training checkpoints: safetensors with a JSON header, on local paths or any fsspec URI, never half a file.

A file holds ``final/<name>``, the trained weights, and, where training can go on from it, ``model/<name>`` and
``optimizer/...``, the state before the learning rate fell.
"""

from __future__ import annotations

import errno
import json
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import fsspec
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from archfront.spaces.space import Genotype, Space

FORMAT = "archfront-checkpoint-1"
FINAL = "final/"
FULL_DISK_S = 120.0
"""How long a full disk is waited for."""

_LOOK_S = 1.0
_HEADER_BYTES = 8


class UnreadableCheckpointError(Exception):
    """A checkpoint is missing, damaged or another one's. Never a user's concern: training starts from scratch."""


def join(folder: str, name: str) -> str:
    """A file's path or URI inside a folder's."""
    return f"{folder.rstrip('/')}/{name}"


def write(uri: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a checkpoint; whoever reads finds the old file, the whole new one, or none.

    A disk that is full is waited for: somebody may free it, and the evaluation has cost more than the wait.

    Args:
        uri: local path or fsspec URI; missing folders are made.
        tensors: contiguous.
        metadata: text to find again by ``read``.

    Raises:
        OSError: it cannot be written, or the disk stayed full.
    """
    content = save(dict(tensors), {"format": FORMAT, **metadata})
    until = time.monotonic() + FULL_DISK_S
    while True:
        try:
            _write_whole(uri, content)
            return
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT) or time.monotonic() > until:
                raise
        time.sleep(_LOOK_S)


def _write_whole(uri: str, content: bytes) -> None:
    path = _local(uri)
    if path is None:
        # Object stores make a file visible when it is complete.
        with fsspec.open(uri, "wb", auto_mkdir=True) as file:
            file.write(content)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read(uri: str, metadata: Mapping[str, str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a checkpoint.

    Args:
        uri: local path or fsspec URI.
        metadata: what its metadata must say.

    Raises:
        UnreadableCheckpointError: it is missing, damaged, or says otherwise.
    """
    try:
        path = _local(uri)
        if path is not None:
            content = path.read_bytes()
        else:
            with fsspec.open(uri, "rb") as file:
                content = file.read()
        length = int.from_bytes(content[:_HEADER_BYTES], "little")
        found = json.loads(content[_HEADER_BYTES : _HEADER_BYTES + length]).get("__metadata__", {})
        tensors = load(content)
    except (OSError, SafetensorError, ValueError, AttributeError) as error:
        raise UnreadableCheckpointError(f"{uri}: {error}") from error
    wanted = {"format": FORMAT, **metadata}
    differing = [name for name, value in wanted.items() if found.get(name) != value]
    if differing:
        raise UnreadableCheckpointError(f"{uri}: differs in {', '.join(differing)}")
    return tensors, found


def write_model(uri: str, state_dict: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write trained weights alone, as of a finalist; ``read_model`` reads them."""
    write(uri, {FINAL + name: tensor.contiguous() for name, tensor in state_dict.items()}, metadata)


def read_model(space: Space, genotype: Genotype, uri: str) -> nn.Module:
    """The network of a genotype with the trained weights of a checkpoint, in evaluation mode.

    Raises:
        UnreadableCheckpointError: the file is missing, damaged, or of another network.
        InputError: the genotype is not of the space.
    """
    tensors, _ = read(uri, {})
    weights = {name.removeprefix(FINAL): tensor for name, tensor in tensors.items() if name.startswith(FINAL)}
    model = space.build(genotype)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise UnreadableCheckpointError(f"{uri}: {error}") from error
    return model.eval()


def _local(uri: str) -> Path | None:
    if uri.startswith("file://"):
        return Path(uri.removeprefix("file://"))
    return None if "://" in uri or "::" in uri else Path(uri)
