"""The picture of ``recipes.py``: points lost on test data over the size, for each kind of policy.

python benchmarks/recipes_plot.py benchmarks/recipes_MODEL.json docs/recipes_MODEL.png
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

_STYLES = {
    "uniform": ("black", "s", "-"),
    "search": ("tab:blue", "o", "-"),
    "search from the recipes": ("tab:red", "D", "-"),
}


def plot(found: dict[str, Any], name: str, file: Path) -> None:
    """Draw one model's rows."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    lines: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in found["rows"]:
        lines[row["policy"]].append(row)
    figure, axes = plt.subplots(figsize=(9, 5.5))
    for policy, rows in lines.items():
        rows = sorted(rows, key=lambda row: row["model_mb"])
        sizes = [row["model_mb"] for row in rows]
        drops = [max(row["drop"], 0.03) for row in rows]
        if policy == "random":
            low, high = ([max(row[key], 0.03) for row in rows] for key in ("least", "most"))
            axes.fill_between(sizes, low, high, color="lightgrey", label="random policies, least to most")
        elif policy.endswith("random score"):
            continue
        elif policy in _STYLES:
            colour, marker, style = _STYLES[policy]
            axes.plot(sizes, drops, style, color=colour, marker=marker, label=policy, linewidth=2, zorder=3)
        else:
            axes.plot(sizes, drops, ":", marker=".", label=policy, linewidth=1.2)
    axes.set_yscale("log")
    axes.set_xlabel("weights of the layers, MiB")
    axes.set_ylabel("points of accuracy lost on test data (log scale, 0.03 and less at the bottom)")
    axes.set_title(f"{name}: bit widths at equal size, nearest rounding")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    print(f"drawn to {file}")


if __name__ == "__main__":
    source = Path(sys.argv[1])
    plot(json.loads(source.read_text()), source.stem.removeprefix("recipes_"), Path(sys.argv[2]))
