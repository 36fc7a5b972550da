"""Pictures and tables of ``recipes.py``: one of each for every ``recipes_MODEL.json`` beside this file.

python benchmarks/recipes_report.py       # docs/recipes_MODEL.png, and the tables between docs/recipes.md's marks
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

_HERE = Path(__file__).parent
_DOCS = _HERE.parent / "docs"
_STYLES = {
    "uniform": ("black", "s"),
    "search": ("tab:blue", "o"),
    "search from the recipes": ("tab:red", "D"),
}
SEARCHES = ("search", "search from the recipes")
_OURS = "leave-one-in"
_LEAST = 0.1
"""Points that are drawn at the bottom of the logarithmic scale."""

TITLES = {
    "resnet20": "ResNet-20, CIFAR-10",
    "resnet56": "ResNet-56, CIFAR-10",
    "vit": "Vision transformer, MNIST",
    "decoder": "Decoder, characters",
}
Rows = list[dict[str, Any]]


def lines_of(found: dict[str, Any]) -> dict[str, Rows]:
    """Rows by policy, in the order of their sizes."""
    lines: dict[str, Rows] = defaultdict(list)
    for row in found["rows"]:
        lines[row["policy"]].append(row)
    return {policy: sorted(rows, key=lambda row: float(row["average"])) for policy, rows in lines.items()}


def plot(found: dict[str, Any], name: str, file: Path) -> None:
    """Draw one model's rows."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(11, 5.5))
    for policy, rows in lines_of(found).items():
        sizes = [row["average"] for row in rows]
        drops = [max(row["drop"], _LEAST) for row in rows]
        if policy == "random":
            low, high = ([max(row[key], _LEAST) for row in rows] for key in ("least", "most"))
            axes.fill_between(sizes, low, high, color="lightgrey", label="random policies, least to most")
        elif policy.endswith("random score"):
            continue
        elif policy in _STYLES:
            colour, marker = _STYLES[policy]
            axes.plot(sizes, drops, "-", color=colour, marker=marker, label=policy, linewidth=2, zorder=3)
        else:
            axes.plot(sizes, drops, ":", marker=".", label=policy, linewidth=1.3)
    axes.set_yscale("log")
    axes.set_xlabel("bits of a weight, on average over the layers that were chosen for")
    axes.set_ylabel(f"points of accuracy lost on test data ({_LEAST} and less at the bottom)")
    axes.set_title(f"{TITLES.get(name, name)}: bit widths at equal size, nearest rounding")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    plt.close(figure)
    print(f"drawn to {file}")


def table(found: dict[str, Any], name: str) -> str:
    """One model's rows in Markdown: a column for each budget; the ablation stands behind the recipe that it is of."""
    lines = lines_of(found)
    averages = sorted({row["average"] for row in found["rows"]})
    accuracies = ", ".join(f"{words} {value:.2f} %" for words, value in found["accuracy"].items())
    text = [
        f"### {TITLES.get(name, name)}",
        "",
        f"Accuracy of the network on the test part: {accuracies}. Policies are judged on {found['test']:,} samples;",
        f"a single drop at {averages[-1]:g} bits deviates by {_deviation(found, averages[-1]):.2f} points.",
        "",
        f"![Points lost over bits](recipes_{name}.png)",
        "",
        "| points lost at, bits on average | " + " | ".join(f"{average:g}" for average in averages) + " |",
        "|---|" + "---|" * len(averages),
    ]
    for policy, rows in lines.items():
        if policy.endswith(", random score"):
            continue
        at = {row["average"]: row for row in rows}
        drawn = {row["average"]: row for row in lines.get(f"{policy}, random score", [])}
        text.append(f"| {policy} | " + " | ".join(_drop(at.get(average)) for average in averages) + " |")
        if drawn:
            text.append("| - own score replaced by a random one | " + _cells(drawn, averages) + " |")
        if any("recovered" in row for row in rows):
            cells = [f"{at[a]['recovered']:.2f}" if a in at else "" for a in averages]
            text.append("| - after its recovery | " + " | ".join(cells) + " |")
    return "\n".join([*text, ""])


def divergences(found: dict[str, Any]) -> str:
    """The same policies by how far their outputs are from the network's own, and what the searches come to."""
    lines = lines_of(found)
    averages = sorted({row["average"] for row in found["rows"]})
    shown = {policy: rows for policy, rows in lines.items() if not policy.endswith("random score")}
    if any("divergence" not in row for rows in shown.values() for row in rows):
        return ""
    text = [
        "| divergence from the network itself, nat, at | " + " | ".join(f"{average:g}" for average in averages) + " |",
        "|---|" + "---|" * len(averages),
    ]
    for policy, rows in shown.items():
        at = {row["average"]: row for row in rows}
        cells = [f"{at[a]['divergence']:.4f}" if a in at else "" for a in averages]
        text.append(f"| {policy} | " + " | ".join(cells) + " |")
    recipes = [policy for policy in shown if policy not in ("uniform", "random", *SEARCHES)]
    for measure, words in (("drop", "points lost"), ("divergence", "divergence")):
        values = {policy: {row["average"]: row[measure] for row in rows} for policy, rows in shown.items()}
        cold, warm = (values.get(name, {}) for name in SEARCHES)
        beaten = [str(sum(cold[a] < values[r].get(a, float("inf")) for r in recipes)) for a in averages if a in cold]
        points = [(a, values[r][a]) for r in recipes for a in averages if a in warm and a in values[r]]
        best, published = (
            sum(warm[a] < min(values[r].get(a, float("inf")) for r in some) for a in averages if a in warm)
            for some in (recipes, [r for r in recipes if r != _OURS])
        )
        text += [
            "",
            f"By {words}, the search beats {', '.join(beaten)} of the {len(recipes)} recipes at these budgets. "
            f"Beginning with them, it improves on {sum(warm[a] < value for a, value in points)} of their "
            f"{len(points)} points: on the best of the published ones at {published} of {len(averages)} budgets, and "
            f"on the best of all, with `{_OURS}`, which is ours, at {best}.",
        ]
    return "\n".join([*text, ""])


def _cells(rows: dict[float, dict[str, Any]], averages: list[float]) -> str:
    return " | ".join(_drop(rows.get(average)) for average in averages)


def _drop(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    spread = f" ({row['least']:.2f} to {row['most']:.2f})" if row["most"] > row["least"] else ""
    return f"{row['drop']:.2f}{spread}"


def _deviation(found: dict[str, Any], average: float) -> float:
    some = [row["std"] for row in found["rows"] if row["average"] == average]
    return float(sorted(some)[len(some) // 2])


def main() -> None:
    page = _DOCS / "recipes.md"
    text = []
    for name in TITLES:
        source = _HERE / f"recipes_{name}.json"
        if source.exists():
            found = json.loads(source.read_text())
            plot(found, name, _DOCS / f"recipes_{name}.png")
            text += [table(found, name), divergences(found)]
    marked = re.compile(r"(<!-- tables -->\n).*?(<!-- end -->)", flags=re.DOTALL)
    page.write_text(marked.sub(lambda m: m[1] + "\n".join(text) + m[2], page.read_text()))
    print(f"written to {page}")


if __name__ == "__main__":
    main()
