"""What can befall a cluster: each fault strikes, lasts, and is mended by nobody but the cluster itself or the clock."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass

import psutil
from cluster import Cluster, wait_until


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A named fault.

    Attributes:
        strike: does it, mends what a machine's owner would (a new host, a freed disk), and returns.
        in_flight: how many times the evaluations under way may be lost by it at most.
        slow: it takes long to be felt, so its jobs must be long.
    """

    name: str
    strike: Callable[[Cluster, random.Random], None]
    in_flight: int = 1
    slow: bool = False


def _kill_one(cluster: Cluster, rng: random.Random, kind: str, word: str) -> None:
    """Kill a process of some host of a kind, once there is one."""
    hosts = [name for name in cluster.containers if name.startswith(kind)]

    def found() -> list[psutil.Process]:
        return [process for name in hosts for process in cluster.network.hosts[name].find(word)]

    wait_until(lambda: bool(found()), 120, f"no process {word!r} on {hosts}")
    rng.choice(found()).kill()


def _worker_process(cluster: Cluster, rng: random.Random) -> None:
    _kill_one(cluster, rng, "ray-worker", "evaluation_process")


def _actor(cluster: Cluster, rng: random.Random) -> None:
    _kill_one(cluster, rng, "ray-worker", "ray::EvaluationActor")


def _raylet(cluster: Cluster, rng: random.Random) -> None:
    _kill_one(cluster, rng, "ray-worker", "raylet/raylet")


def _head(cluster: Cluster, rng: random.Random) -> None:
    _kill_one(cluster, rng, "ray-head", "gcs_server")


def _gateway(cluster: Cluster, rng: random.Random) -> None:
    _kill_one(cluster, rng, "controller", "executors.ray_gateway")


def _controller(cluster: Cluster, rng: random.Random) -> None:
    container = cluster.containers["controller"]
    container.kill()
    time.sleep(2)  # Docker starts it again
    container.start()


def _database(cluster: Cluster, rng: random.Random) -> None:
    container = cluster.containers["postgres"]
    container.kill()
    time.sleep(5)
    container.start()


def _cut(cluster: Cluster, rng: random.Random) -> None:
    host = cluster.network.hosts[rng.choice([n for n in cluster.containers if n.startswith("ray-worker")])]
    host.cut()
    time.sleep(20)
    host.join()


def _cut_database(cluster: Cluster, rng: random.Random) -> None:
    host = cluster.network.hosts["postgres"]
    host.cut()
    time.sleep(20)
    host.join()


def _gone(cluster: Cluster, rng: random.Random) -> None:
    workers = [name for name in cluster.containers if name.startswith("ray-worker")]
    cluster.remove(rng.choice(workers))


def _full_disk(cluster: Cluster, rng: random.Random) -> None:
    filler = cluster.files / "filler"
    try:
        with filler.open("wb") as file:
            while True:
                file.write(bytes(2**20))
                file.flush()
    except OSError:
        pass
    time.sleep(20)
    filler.unlink()


WORKER_PROCESS = Fault(name="kill -9 of a worker's evaluation process", strike=_worker_process)
ACTOR = Fault(name="kill -9 of a Ray worker process", strike=_actor)
RAYLET = Fault(name="kill -9 of a raylet", strike=_raylet)
HEAD = Fault(name="kill -9 of the Ray head", strike=_head, slow=True)
GATEWAY = Fault(name="kill -9 of the process that speaks with Ray", strike=_gateway)
CONTROLLER = Fault(name="kill -9 of the controller", strike=_controller)
DATABASE = Fault(name="kill -9 of PostgreSQL, back after 5 s", strike=_database)
CUT = Fault(name="a worker's host cut off for 20 s", strike=_cut, in_flight=2)
CUT_DATABASE = Fault(name="the database's host cut off for 20 s", strike=_cut_database)
GONE = Fault(name="a worker's host gone for good", strike=_gone)
FULL_DISK = Fault(name="the checkpoints' disk full for 20 s", strike=_full_disk)

ALL = (WORKER_PROCESS, ACTOR, RAYLET, HEAD, GATEWAY, CONTROLLER, DATABASE, CUT, CUT_DATABASE, FULL_DISK)
"""Those that a cluster of unchanging hosts can have any number of times."""
