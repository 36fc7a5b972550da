"""A checkpoint waits for a full disk, a real one, to be freed."""

import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from archfront.evaluators import checkpoints


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small disk needs root")
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "archfront-test", str(folder)], check=True)
    with (folder / "filler").open("wb", buffering=0) as file:
        while shutil.disk_usage(folder).free:
            file.write(bytes(4096))
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


TENSORS = {"weights": torch.arange(10_000.0)}


def test_a_full_disk_is_waited_for(full_disk: Path) -> None:
    freed = threading.Timer(1.5, (full_disk / "filler").unlink)
    freed.start()
    checkpoints.write(str(full_disk / "a.safetensors"), TENSORS, {})
    assert not freed.is_alive()
    tensors, _ = checkpoints.read(str(full_disk / "a.safetensors"), {})
    assert torch.equal(tensors["weights"], TENSORS["weights"])


def test_one_that_stays_full_is_an_error_and_leaves_nothing(full_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "FULL_DISK_S", 0.5)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.write(str(full_disk / "a.safetensors"), TENSORS, {})
    assert [file.name for file in full_disk.iterdir()] == ["filler"]
