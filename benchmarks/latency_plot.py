"""Draws what latency.py found: predicted against measured, with the 90 % intervals.

python benchmarks/latency_plot.py [--json benchmarks/latency.json] [--png docs/latency.png]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=here / "latency.json")
    parser.add_argument("--png", type=Path, default=here.parent / "docs" / "latency.png")
    options = parser.parse_args()
    networks = json.loads(options.json.read_text())["networks"]
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.6), layout="constrained")
    for axis, tiny, title in ((axes[0], True, "FBNet-tiny, 16 px"), (axes[1], False, "timm")):
        part = [n for n in networks if n["name"].startswith("fbnet-tiny") == tiny]
        measured, predicted, low, high = (
            np.array([n[key] for n in part]) for key in ("measured_ms", "predicted_ms", "low_ms", "high_ms")
        )
        ends = [min(measured.min(), low.min()) * 0.95, max(measured.max(), high.max()) * 1.05]
        axis.plot(ends, ends, color="#9aa0a6", linestyle=":", linewidth=1.2)
        axis.errorbar(
            measured, predicted, yerr=[predicted - low, high - predicted], fmt="o", markersize=4, color="#1a73e8",
            ecolor="#a8c7fa", elinewidth=1, alpha=0.9,
        )  # fmt: skip
        axis.set(xscale="log", yscale="log", xlim=ends, ylim=ends, xlabel="measured, ms", ylabel="predicted, ms")
        error = np.median(np.abs(predicted / measured - 1))
        axis.set_title(f"{title}: {len(part)} networks, median error {error:.1%}", fontsize=11)
        axis.spines[["top", "right"]].set_visible(False)
        ticks = [t for t in (1, 1.5, 2, 3, 5, 10, 20, 50, 100, 200, 500) if ends[0] <= t <= ends[1]]
        axis.set_xticks(ticks, [f"{t:g}" for t in ticks])
        axis.set_yticks(ticks, [f"{t:g}" for t in ticks])
        axis.minorticks_off()
    figure.savefig(options.png, dpi=110)


if __name__ == "__main__":
    main()
