"""A user's own files, as a controller that resolves several jobs at once loads them."""

import threading
from concurrent.futures import ThreadPoolExecutor

from archfront.plugins import Plugin, load_into

SLOW_FILE = """
import time
time.sleep(0.3)
ARCHFRONT_PLUGINS = {"recipes": {}}
"""


def test_a_file_is_loaded_by_two_threads_at_once() -> None:
    start = threading.Barrier(2)

    def load(_: int) -> None:
        start.wait()
        load_into({}, [Plugin("slow_file.py", SLOW_FILE)])

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(load, range(2))) == [None, None]
