"""Tables in plain text, for terminals and logs: torch and triton bring nothing that prints them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

COLUMNS = ("variant", "us", "p20", "p80", "n", "timed", "floor", "Eff", "ceiling", "speed-up", "error", "noise")
_LETTERS = {"BLOCK_M": "m", "BLOCK_N": "n", "BLOCK_K": "k", "num_warps": "w", "num_stages": "s"}


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any] | str]) -> str:
    """The first column to the left, all others to the right; a text in the place of a row stands as it is."""
    lines = [row if isinstance(row, str) else [cell(value) for value in row] for row in (columns, *rows)]
    cells = [line for line in lines if not isinstance(line, str)]
    widths = [max(len(row[place]) for row in cells) for place in range(len(columns))]
    texts = [line if isinstance(line, str) else _aligned(line, widths) for line in lines]
    return "\n".join([title, texts[0], "-" * (sum(widths) + 2 * len(widths) - 2), *texts[1:], ""])


def _aligned(row: list[str], widths: list[int]) -> str:
    first, *rest = zip(row, widths, strict=True)
    return "  ".join([first[0].ljust(first[1]), *(text.rjust(width) for text, width in rest)]).rstrip()


def cell(value: Any) -> str:
    """A number with the digits that it deserves; nothing for None."""
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value)
    if value == 0 or abs(value) >= 1000:
        return f"{value:.0f}"
    return f"{value:.1e}" if abs(value) < 1e-3 else f"{value:.3g}"


def operator_table(operator: str, rows: list[dict[str, Any]]) -> str:
    """A block of lines for each shape: name and settings, then a line a variant, with the reason where one failed."""
    lines: list[Sequence[Any] | str] = []
    for shape in dict.fromkeys(row["shape"] for row in rows):
        members = [row for row in rows if row["shape"] == shape]
        lines.append(f"{shape}, {members[0]['dtype']}; speed-up over {members[0]['named']}")
        lines += [_line(row) for row in members]
        config = next((row["config"] for row in members if row["config"]), None)
        lines += [f"    settings: {_settings(config)}"] if config else []
    return table(f"{operator}; times and floors in microseconds, * ours", COLUMNS, lines)


def _line(row: dict[str, Any]) -> Sequence[Any] | str:
    name = f"{' *' if row['ours'] else '  '} {row['variant']} [{row['backend']}]"
    if row["median_us"] is None:
        return f"{name}: {row['failure']}"
    name += f" ({row['failure']})" if row["failure"] else ""
    timed = row["cache"] if row["method"] == "graph" else f"{row['cache']}, {row['method']}"
    efficiency, noise = (None if part is None else f"{part:.0%}" for part in (row["efficiency"], row["noise"]))
    times = [row[name] for name in ("median_us", "p20_us", "p80_us", "n")]
    return [name, *times, timed, row["floor_us"], efficiency, row["ceiling"], row["speedup"], row["error"], noise]


def _settings(config: dict[str, dict[str, int]]) -> str:
    parts = []
    for operator, setting in config.items():
        values = " ".join(f"{_LETTERS.get(name, name.lower())}{value}" for name, value in setting.items())
        parts.append(f"{operator} {values}")
    return "; ".join(parts)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Renamed into place, so that a run that is ended from outside leaves the last whole file."""
    draft = path.with_suffix(".part")
    draft.write_text(json.dumps(content, indent=1) + "\n")
    draft.replace(path)
