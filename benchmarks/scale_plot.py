"""The picture of ``scale.py``: how busy one driver keeps its workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def draw(path: Path, found: dict[str, list[dict[str, Any]]]) -> None:
    """Utilisation by evaluation length, a line for each number of workers; a panel for each database."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(found), figsize=(5.2 * len(found), 4.0), sharey=True, squeeze=False)
    for axis, (kind, rows) in zip(axes[0], found.items(), strict=True):
        for i, workers in enumerate(sorted({row["workers"] for row in rows})):
            points = [row for row in rows if row["workers"] == workers and "utilisation" in row]
            points.sort(key=lambda row: row["length_s"])
            x, y = [row["length_s"] for row in points], [100 * row["utilisation"] for row in points]
            (line,) = axis.plot(x, y, "-", color=f"C{i}", label=f"{workers:,} workers")
            for row, a, b in zip(points, x, y, strict=True):
                face = "white" if row.get("inferred") else line.get_color()
                axis.plot(a, b, "o", color=line.get_color(), markerfacecolor=face)
        axis.set_xscale("log")
        axis.set_xlabel("length of an evaluation, s")
        axis.set_title(f"one driver on {kind}")
        axis.grid(alpha=0.3)
        axis.set_ylim(0, 104)
    axes[0][0].set_ylabel("workers busy, % of their time")
    axes[0][-1].legend(loc="lower right")
    figure.tight_layout()
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
