"""What the commands share: options, output, exit codes."""

from __future__ import annotations

import json
import math
from datetime import datetime
from typing import Annotated, Any

import typer
from rich.console import Console

from archfront.client import DEFAULT_DB

EXIT_DONE, EXIT_INPUT, EXIT_FAILED, EXIT_INTERRUPTED = 0, 2, 3, 130

Database = Annotated[
    str, typer.Option("--db", envvar="ARCHFRONT_DB", help="SQLite file or database URL.", show_default=DEFAULT_DB)
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
JobReference = Annotated[str, typer.Argument(metavar="JOB", help="Id, name, or 'last'.")]
PluginFiles = Annotated[list[str] | None, typer.Option("--plugin", help="Python file with your own components.")]

console = Console()
errors = Console(stderr=True)


def print_json(data: Any) -> None:
    """JSON on standard output; numbers that JSON does not have become null."""
    print(json.dumps(plain(data), indent=2))


def number(value: Any) -> str:
    """A value for a table: short, and never misleading about its size."""
    if value is None:
        return "-"
    if isinstance(value, float) and not value.is_integer():
        return f"{value:.4g}"
    if isinstance(value, (int, float)):
        return f"{value:,.0f}"
    return str(value)


def moment(seconds: float | None) -> str:
    """A time of the ledger in the local zone."""
    return "-" if seconds is None else datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M:%S")


def duration(seconds: float) -> str:
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{whole % 60:02d}s" if minutes else f"{whole}s"


def plain(data: Any) -> Any:
    """The data with what JSON does not have (nan, infinities) as null."""
    if isinstance(data, dict):
        return {str(key): plain(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [plain(value) for value in data]
    if isinstance(data, float) and not math.isfinite(data):
        return None
    return data
