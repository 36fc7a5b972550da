"""One measurement at a time on a device, whichever job, worker or user takes it."""

from __future__ import annotations

import fcntl
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def device_lock(device: str | None) -> Iterator[None]:
    """Wait until nobody else on this host holds the device, and hold it; nothing for None.

    The lock ends with its process, however that ends.
    """
    if device is None:
        yield
        return
    held = _open(Path(tempfile.gettempdir()) / f"archfront-device-{re.sub(r'[^A-Za-z0-9_.-]', '_', device)}.lock")
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield
    finally:
        os.close(held)


def _open(path: Path) -> int:
    """Everybody's file: workers of several users may share a host."""
    try:
        # Without O_CREAT: in a sticky folder that is refused for a file of somebody else's.
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        held = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        os.fchmod(held, 0o666)
        return held
