"""The command line, in this process."""

import sys

import pytest

from archfront.cli.main import main


def command(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """Run ``archfront`` with these words; its exit code."""
    monkeypatch.setattr(sys, "argv", ["archfront", *words])
    with pytest.raises(SystemExit) as ending:
        main()
    return int(ending.value.code or 0)
