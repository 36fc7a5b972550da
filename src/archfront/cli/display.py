"""The live display of a running job; plain lines where there is no terminal."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import numpy as np
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table

from archfront.cli.common import duration, number
from archfront.db.dominance import hypervolume
from archfront.search.progress import Progress

_LINE_S = 10.0


class RunDisplay:
    """Shows a job's progress on a console.

    Args:
        objectives: ``(metric, direction)`` pairs of the job.
    """

    def __init__(self, console: Console, name: str, objectives: Sequence[tuple[str, str]]) -> None:
        self._console = console
        self._name = name
        self._objectives = list(objectives)
        self._live = Live(console=console, refresh_per_second=4, transient=False) if console.is_terminal else None
        self._last_line = 0.0
        self._shown = -1
        self._latest: Progress | None = None

    def __enter__(self) -> RunDisplay:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            if self._latest is not None:
                self._live.update(self._table(self._latest))
            self._live.stop()
        elif self._latest is not None and self._shown != self._latest.finished:
            self._line(self._latest)

    def announce(self, text: str) -> None:
        self._console.print(f"{self._name}: {text}", highlight=False, markup=False, soft_wrap=True)

    def observe(self, progress: Progress) -> None:
        self._latest = progress
        if not progress.finished:
            return
        if self._live is not None:
            self._live.update(self._table(progress))
        elif time.monotonic() - self._last_line >= _LINE_S or progress.finished == progress.budget:
            self._line(progress)

    def _line(self, progress: Progress) -> None:
        self._last_line = time.monotonic()
        self._shown = progress.finished
        parts = [f"{label} {value}" for label, value in self._facts(progress)]
        self._console.print(f"{self._name}: {', '.join(parts)}", highlight=False, markup=False, soft_wrap=True)

    def _table(self, progress: Progress) -> Table:
        table = Table.grid(padding=(0, 2))
        table.add_row(escape(self._name), ProgressBar(total=progress.budget, completed=progress.finished, width=40))
        for label, value in self._facts(progress):
            table.add_row(f"[dim]{label}[/dim]", value)
        return table

    def _facts(self, progress: Progress) -> list[tuple[str, str]]:
        facts = [("evaluations", f"{progress.finished}/{progress.budget}")]
        if progress.failed:
            facts.append(("failed", str(progress.failed)))
        rate = progress.per_second
        facts += [("running", str(progress.running)), ("per second", f"{rate:,.0f}" if rate >= 100 else f"{rate:.2g}")]
        if progress.fidelity is not None:
            for (name, direction), best in zip(self._objectives, progress.best, strict=True):
                facts.append((f"best {name}", number(-best if direction == "max" else best)))
            facts.append(("front", str(len(progress.front))))
            facts.append(("hypervolume", f"{relative_hypervolume(progress):.4f}"))
            if progress.fidelity:
                facts.append(("fidelity", str(progress.fidelity)))
        facts.append(("elapsed", duration(progress.elapsed_s)))
        if 0 < progress.finished < progress.budget and progress.per_second > 0:
            facts.append(("left", duration((progress.budget - progress.finished) / progress.per_second)))
        return facts


def relative_hypervolume(progress: Progress) -> float:
    """Share of the box between the best and the worst values so far that the front dominates."""
    best, worst = np.array(progress.best), np.array(progress.worst)
    extent = np.where(worst > best, worst - best, 1.0)
    points: Any = (np.asarray(progress.front) - best) / extent
    return hypervolume(points, np.ones(len(best)))
