import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from postgres import Postgres, postgres_server

# Ray's own hygiene, in this process and whatever it starts. Here and not in a fixture: Ray reads RAY_AUTH_MODE once,
# when any test file first imports it.
os.environ.update(
    {
        "RAY_AUTH_MODE": "token",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        # Kernels run in Triton's interpreter; read once too, where a kernel is defined.
        "TRITON_INTERPRET": "1",
    }
)

PLUGIN = Path(__file__).parent / "plugins" / "synthetic.py"


@pytest.fixture(scope="session")
def plugin() -> Path:
    """The file of the synthetic evaluator."""
    return PLUGIN


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A real PostgreSQL for the session."""
    # Not pytest's own folder: the path of a Unix socket may have about a hundred characters.
    with tempfile.TemporaryDirectory(prefix="archfront-pg-") as folder, postgres_server(Path(folder)) as server:
        yield server


@pytest.fixture(autouse=True)
def _own_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees the settings of whoever runs it."""
    for name in ("ARCHFRONT_DB", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Under CI a test that was skipped did not pass; only the public data sets may be missing there."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("CI") != "true" or reporter is None:
        return
    allowed = () if os.environ.get("ARCHFRONT_DATA") else ("ARCHFRONT_DATA",)
    skipped = [str(r.longrepr) for r in reporter.stats.get("skipped", [])]
    if any(not any(word in text for word in allowed) for text in skipped):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
