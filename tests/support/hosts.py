"""Several hosts on this machine: network namespaces on a bridge, each with a name, an address, processes that see no
others, and a /tmp of its own."""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

PREFIX = "10.77.31"
BRIDGE = "archfront0"
_NETNS = Path("/etc/netns")


def why_not() -> str | None:
    """Why this machine cannot have such hosts, or None."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [tool for tool in ("ip", "unshare", "nsenter", "setpriv") if shutil.which(tool) is None]
    return f"the commands {', '.join(missing)} are missing (iproute2, util-linux)" if missing else None


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


class Host:
    """One host. Its processes are all that run in its namespace, however they came there."""

    def __init__(self, network: "Network", name: str, number: int) -> None:
        self.name = name
        self.address = f"{PREFIX}.{number}"
        self.folder = network.folder / name
        (self.folder / "tmp").mkdir(parents=True)
        (self.folder / "tmp").chmod(0o1777)
        self._network = network
        self.namespace = f"archfront-{name}"
        self._wire = f"af{number}"
        ip("netns", "add", self.namespace)
        ip("link", "add", self._wire, "type", "veth", "peer", "name", "eth0", "netns", self.namespace)
        ip("link", "set", self._wire, "master", BRIDGE, "up")
        inside = ("-n", self.namespace)
        ip(*inside, "addr", "add", f"{self.address}/24", "dev", "eth0")
        for device in ("eth0", "lo"):
            ip(*inside, "link", "set", device, "up")
        # Ray finds out its address by the way that a packet to the world would take.
        ip(*inside, "route", "add", "default", "via", f"{PREFIX}.254")
        self._inode = os.stat(f"/run/netns/{self.namespace}").st_ino
        self._init: subprocess.Popen[bytes] | None = None

    def popen(self, argv: Sequence[str], env: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
        """Start a command there; what it prints is appended to ``log``. A host that is down is switched on first."""
        if self._init is None or self._init.poll() is not None:
            self._boot()
        assert self._init is not None
        spaces = [f"--target={self._pid_of_init()}", "--mount", "--uts", "--net", "--pid"]
        with log.open("ab") as output:
            return subprocess.Popen(
                ["nsenter", *spaces, "--", *argv],
                env=dict(env),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def _boot(self) -> None:
        # The first process of a host: it reaps orphans, and all others die with it.
        script = f'hostname {self.name} && mount --bind "$0" /tmp && echo up && while :; do sleep 1000 & wait; done'
        alone = ["unshare", "--uts", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]
        # "ip netns exec" brings the hosts file of /etc/netns.
        command = ["ip", "netns", "exec", self.namespace, *alone, "sh", "-c", script, str(self.folder / "tmp")]
        self._init = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
        assert self._init.stdout is not None
        assert self._init.stdout.readline() == b"up\n"

    def _pid_of_init(self) -> int:
        assert self._init is not None
        return psutil.Process(self._init.pid).children()[0].pid

    def run(self, argv: Sequence[str], env: Mapping[str, str], timeout_s: float = 60) -> tuple[int, str]:
        """Run a command there to its end: exit status (124 past the limit) and output."""
        with tempfile.NamedTemporaryFile(dir=self._network.folder) as file:
            process = self.popen(argv, env, Path(file.name))
            try:
                process.wait(timeout=timeout_s)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                return 124, Path(file.name).read_text(errors="replace")
            return process.returncode, Path(file.name).read_text(errors="replace")

    def processes(self) -> list[psutil.Process]:
        """Its processes that are alive."""
        found = []
        for process in psutil.process_iter():
            # Of one that is dead, a zombie too, the namespace cannot be told.
            with suppress(OSError, psutil.Error):
                if os.stat(f"/proc/{process.pid}/ns/net").st_ino == self._inode:
                    found.append(process)
        return found

    def find(self, word: str) -> list[psutil.Process]:
        """Its processes whose command line holds a word."""
        found = []
        for process in self.processes():
            with suppress(psutil.Error):
                if word in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def kill_all(self) -> None:
        """A power cut."""
        if self._init is not None:
            self._init.kill()
            self._init.wait()
            assert self._init.stdout is not None
            self._init.stdout.close()
            self._init = None
        end = time.monotonic() + 20
        while alive := self.processes():
            for process in alive:
                with suppress(psutil.Error):
                    process.kill()
            if time.monotonic() > end:
                raise TimeoutError(f"processes of {self.name} do not die: {alive}")
            time.sleep(0.05)

    def cut(self) -> None:
        """Pull the cable."""
        ip("link", "set", self._wire, "down")

    def join(self) -> None:
        ip("link", "set", self._wire, "up")

    def remove(self) -> None:
        with suppress(psutil.Error, TimeoutError):
            self.kill_all()
        with suppress(subprocess.CalledProcessError):
            ip("netns", "del", self.namespace)
        with suppress(subprocess.CalledProcessError):
            ip("link", "del", self._wire)
        shutil.rmtree(_NETNS / self.namespace, ignore_errors=True)


class Network:
    """A bridge that hosts hang on; this process reaches all of them by address."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.hosts: dict[str, Host] = {}
        self._names: dict[str, str] = {}
        self._numbers = 0
        for stale in Path("/run/netns").glob("archfront-*") if Path("/run/netns").exists() else []:
            subprocess.run(["ip", "netns", "del", stale.name], check=False, capture_output=True)
        subprocess.run(["ip", "link", "del", BRIDGE], check=False, capture_output=True)
        ip("link", "add", BRIDGE, "type", "bridge")
        ip("addr", "add", f"{PREFIX}.254/24", "dev", BRIDGE)
        ip("link", "set", BRIDGE, "up")

    def add(self, name: str) -> Host:
        self._numbers += 1
        host = self.hosts[name] = Host(self, name, self._numbers)
        self._names[name] = host.address
        self._tell_names()
        return host

    def remove(self, name: str) -> None:
        """A host that is gone for good."""
        self.hosts.pop(name).remove()

    def close(self) -> None:
        for host in list(self.hosts.values()):
            host.remove()
        subprocess.run(["ip", "link", "del", BRIDGE], check=False, capture_output=True)

    def _tell_names(self) -> None:
        lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in self._names.items())]
        for host in self.hosts.values():
            folder = _NETNS / host.namespace
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "hosts").write_text("\n".join(lines) + "\n")
            # There is no name server: one that never answers would keep gRPC from what the hosts file says.
            (folder / "resolv.conf").write_text("nameserver 127.0.0.1\n")
