"""A child process of ours behind a pipe: how it is started, what it said last, and that it ends with its parent."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection

_PR_SET_PDEATHSIG = 1


class Child:
    """``python -m module FD``, with a pipe on the file descriptor FD and its output kept for a last look.

    Attributes:
        process: the running process, in a session of its own: a terminal's Ctrl-C is for the driver alone.
        connection: our end of the pipe.
    """

    def __init__(self, module: str, environment: Mapping[str, str]) -> None:
        self.connection, theirs = Pipe()
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the child
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=self._output,
            start_new_session=True,
        )
        theirs.close()

    def last_words(self, length: int = 2000) -> str:
        """The end of what it printed."""
        self._output.seek(max(0, self._output.seek(0, os.SEEK_END) - length))
        return self._output.read().decode(errors="replace").strip()

    def kill(self) -> None:
        """End the child and whatever it has started itself: they share a session."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def close(self, grace_s: float = 0.0) -> None:
        """Close the pipe, which a child takes as the order to end; kill it if it has not within ``grace_s``."""
        self.connection.close()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=grace_s)
        self.kill()
        self.process.wait()
        self._output.close()


def parent_connection() -> Connection:
    """In the child: its end of the pipe, from the command line."""
    return Connection(int(sys.argv[1]))


def signal_with_parent(number: int) -> None:
    """In the child: get this signal when the parent dies (on Linux; nothing elsewhere)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def end_with_parent() -> None:
    """In the child: end when the parent does, however that ends; no orphan works for nobody."""
    parent = os.getppid()
    signal_with_parent(signal.SIGKILL)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
