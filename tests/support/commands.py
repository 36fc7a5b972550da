"""Running the command line in a test: see tests/cli/conftest.py."""

from collections.abc import Callable

Command = Callable[..., tuple[int, str, str]]
"""Arguments in; exit code, output and errors out."""
