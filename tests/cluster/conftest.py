import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from accounting import Witness
from cluster import Cluster
from hosts import why_not

PLUGINS = [
    Path(__file__).parents[1] / "plugins" / name for name in ("synthetic.py", "counted_training.py", "stopwatch.py")
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """PostgreSQL, head, two workers and a controller, up and well."""
    if reason := why_not():
        pytest.skip(reason)
    # Not /tmp: every host has one of its own.
    with tempfile.TemporaryDirectory(prefix="archfront-cluster-", dir="/var/tmp", ignore_cleanup_errors=True) as folder:
        made = Cluster(Path(folder), PLUGINS)
        try:
            made.add_postgres()
            made.archfront("db", "upgrade")
            made.add("ray-head").wait_healthy()
            workers = [made.add("ray-worker", f"ray-worker-{i}") for i in (1, 2)]
            controller = made.add_controller()
            for container in (*workers, controller):
                container.wait_healthy()
            yield made
        finally:
            made.close()


@pytest.fixture(scope="module")
def witness(cluster: Cluster) -> Iterator[Witness]:
    opened = Witness(cluster.url)
    yield opened
    opened.close()


@pytest.fixture(scope="session")
def records() -> Iterator[list[dict[str, Any]]]:
    """What each fault did; written as JSON to the file that ARCHFRONT_FAULTS names."""
    kept: list[dict[str, Any]] = []
    yield kept
    if file := os.environ.get("ARCHFRONT_FAULTS"):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).write_text(json.dumps(kept, indent=2) + "\n")
