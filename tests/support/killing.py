"""A power cut for a driver: SIGKILL to it and everything below it, at once."""

import subprocess

import psutil


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """Nobody of the family gets to see another one die."""
    family = [psutil.Process(process.pid)]
    family += family[0].children(recursive=True)
    for member in family:
        member.suspend()
    for member in family:
        member.kill()
    process.wait()
    psutil.wait_procs(family, timeout=10)
