"""`archfront supervise`: a command is kept running, and nothing of it stays behind."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

SCRIPT = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
with open(sys.argv[1], "a") as file:
    file.write(f"{os.getpid()} {child.pid}\\n")
time.sleep(float(sys.argv[2]))
sys.exit(3)
"""


def supervised(log: Path, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SCRIPT, str(log), str(seconds)]
    supervise = [sys.executable, "-m", "archfront", "supervise", "--", *command]
    return subprocess.Popen(supervise, stdout=subprocess.PIPE, text=True)


def until(reached: Callable[[], bool], timeout_s: float = 30) -> None:
    end = time.monotonic() + timeout_s
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.05)


def starts(log: Path) -> list[list[int]]:
    return [[int(word) for word in line.split()] for line in log.read_text().splitlines()] if log.exists() else []


def test_a_command_is_started_again_and_its_orphans_end(tmp_path: Path) -> None:
    log = tmp_path / "starts"
    process = supervised(log, 0.1)
    until(lambda: len(starts(log)) >= 2)
    first = starts(log)[0]
    # Before the second start the first one's child was ended, though it had a session of its own.
    assert not psutil.pid_exists(first[1])
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "ended with 3; again in 2 s" in printed
    assert not any(psutil.pid_exists(pid) for pair in starts(log) for pid in pair)


def test_sigterm_ends_the_whole_family(tmp_path: Path) -> None:
    log = tmp_path / "starts"
    process = supervised(log, 600)
    until(lambda: len(starts(log)) == 1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 0
    assert not any(psutil.pid_exists(pid) for pid in starts(log)[0])
    assert process.stdout is not None
    process.stdout.close()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux gives orphans to a supervisor")
def test_orphans_that_ended_are_reaped_while_the_command_runs(tmp_path: Path) -> None:
    log = tmp_path / "log"
    # Its child leaves three orphans, which end at once.
    script = """
import subprocess, sys, time
child = "import subprocess, sys; [subprocess.Popen([sys.executable, '-c', '']) for _ in range(3)]"
subprocess.run([sys.executable, "-c", child])
time.sleep(1)
open(sys.argv[1], "a").write("gone\\n")
while not __import__("os").path.exists(sys.argv[1] + ".end"):
    time.sleep(0.05)
sys.exit(7)
"""
    supervise = [sys.executable, "-m", "archfront", "supervise", "--", sys.executable, "-c", script, str(log)]
    process = subprocess.Popen(supervise, stdout=subprocess.PIPE, text=True)
    until(log.exists)
    until(lambda: len(psutil.Process(process.pid).children()) == 1)
    # The command's own status stays its own.
    Path(f"{log}.end").touch()
    until(lambda: log.read_text().count("gone") == 2)
    process.send_signal(signal.SIGTERM)
    assert "ended with 7; again in 2 s" in process.communicate(timeout=30)[0]


def test_a_command_that_does_not_exist_is_named() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "archfront", "supervise", "--", "no-such-command"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "no-such-command" in done.stderr
