"""One Ray for all tests of this folder, since starting it takes some seconds."""

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def ray_address() -> Iterator[str]:
    """The address of a running Ray to which this process is connected."""
    import ray

    ray.init(
        address="local",  # not whatever cluster this machine may have
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=100 * 2**20,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()
