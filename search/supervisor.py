"""Keeping a command running: what a host of a cluster runs around ``ray start --block``.

Ray ends a host's processes when the host was cut off for longer than its head waits, or when the head was lost; nobody
starts them again. A supervisor does, once what was left of them is gone.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

import psutil

_PR_SET_CHILD_SUBREAPER = 36
_STEADY_S = 60.0
_LONGEST_PAUSE_S = 15.0
_GRACE_S = 10.0


def supervise(command: Sequence[str], log: Callable[[str], None]) -> int:
    """Run a command, again each time it ends, until this process gets SIGTERM or SIGINT.

    Whatever the command started and left behind is ended before it is started again, and at the end.

    Returns:
        0.

    Raises:
        OSError: there is no such command.
    """
    if sys.platform == "linux":
        # Orphans of the command become our children, so that none escapes.
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    ending = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ending.set())
    environment = {"RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"} | os.environ
    pause = 1.0
    while not ending.is_set():
        started = time.monotonic()
        process = subprocess.Popen(list(command), env=environment, start_new_session=True)
        log(f"started {command[0]} as process {process.pid}")
        while process.poll() is None and not ending.is_set():
            ending.wait(0.2)
            _reap_orphans(process.pid)
        clear_children()
        if ending.is_set():
            break
        pause = 1.0 if time.monotonic() - started > _STEADY_S else min(2 * pause, _LONGEST_PAUSE_S)
        log(f"{command[0]} ended with {process.returncode}; again in {pause:g} s")
        ending.wait(pause)
    log("ended")
    return 0


def _reap_orphans(command: int) -> None:
    """Take the exit statuses of orphans that ended; nobody else does, and each would keep its process number.

    Args:
        command: the process whose status is left to who started it.
    """
    if sys.platform == "linux":
        with suppress(ChildProcessError):
            while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) and ended.si_pid != command:
                os.waitpid(ended.si_pid, 0)


def clear_children() -> None:
    """End all descendants of this process: politely, then not."""
    for number, wait_s in ((signal.SIGTERM, _GRACE_S), (signal.SIGKILL, _GRACE_S)):
        family = psutil.Process().children(recursive=True)
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        _, alive = psutil.wait_procs(family, timeout=wait_s)
        if not alive:
            break
    # Orphans that ended as our children wait to be asked how.
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
