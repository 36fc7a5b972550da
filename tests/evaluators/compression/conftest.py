from collections.abc import Iterator

import pytest

from archfront.evaluators.training_loop import torch_threads


@pytest.fixture(scope="package", autouse=True)
def _one_thread() -> Iterator[None]:
    """These networks are small: threads that wait for each other, beside other tests, cost more than the work."""
    with torch_threads(1):
        yield
