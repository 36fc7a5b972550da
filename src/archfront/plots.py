"""Pictures of a front: interactive HTML with Plotly's own script embedded, or PNG."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from archfront.client import Front, Job
from archfront.db.columns import Columns, load_columns
from archfront.db.walking import snapshot
from archfront.errors import InputError

FRONT_COLOUR, OTHER_COLOUR, ACCENT = "#0b6e99", "#c3c8cc", "#d1495b"


def plot_front(members: Front, job: Job, to: Path) -> None:
    """Draw a front among all evaluations of its fidelity.

    Raises:
        InputError: the suffix is neither .html nor .png, or the folder does not exist.
    """
    if to.suffix not in (".html", ".png"):
        raise InputError("--plot", str(to), "has an unknown format", "End it with .html or .png.")
    if not to.absolute().parent.is_dir():
        raise InputError("--plot", str(to), "lies in a folder that does not exist", "Make the folder first.")
    if to.suffix == ".png":
        _png(members, job, to)
    else:
        front_figure(members, job).write_html(to, include_plotlyjs=True, full_html=True)


def axes(members: Front) -> list[tuple[str, str]]:
    """Pairs of objectives to draw, (across, up): the first objective upwards wherever it takes part."""
    names = [name for name, _ in members.objectives]
    if len(names) == 1:
        others = [name for name in members.metrics if name != names[0]]
        return [(others[0] if others else names[0], names[0])]
    return [(across, up) for up, across in combinations(names, 2)]


def dominated_rows(members: Front, job: Job) -> Columns:
    """Finished feasible evaluations at the front's fidelities that are not on it."""
    with snapshot(job.ledger.engine) as connection:
        columns = load_columns(connection, job.id)
    on_front = np.isin(columns["number"], [row["evaluation"] for row in members])
    level = np.isin(columns["fidelity"], [row["fidelity"] for row in members])
    return columns.rows((columns["done"] == 1) & (columns["violation"] == 0) & level & ~on_front)


def front_figure(members: Front, job: Job) -> Any:
    """A Plotly figure: one pair of objectives at a time, chosen by a menu where there are several."""
    import plotly.graph_objects as go

    figure = go.Figure()
    others = dominated_rows(members, job)
    pairs = axes(members)
    for i, (across, up) in enumerate(pairs):
        ordered = sorted(members, key=lambda row: row[across])
        if across in others and up in others:
            figure.add_scatter(
                x=others[across], y=others[up], mode="markers", name="dominated", visible=i == 0,
                marker={"color": OTHER_COLOUR, "size": 7}, customdata=others["number"],
                hovertemplate="evaluation %{customdata}<br>" + f"{across} %{{x:.4g}}<br>{up} %{{y:.4g}}<extra></extra>",
            )  # fmt: skip
        figure.add_scatter(
            x=[row[across] for row in ordered], y=[row[up] for row in ordered], mode="markers", name="front",
            visible=i == 0, marker={"color": FRONT_COLOUR, "size": 11, "line": {"color": "white", "width": 1}},
            text=[_hover(row, members) for row in ordered], hovertemplate="%{text}<extra></extra>",
        )  # fmt: skip
    _menu(figure, pairs)
    figure.update_layout(
        template="plotly_white", height=520, margin={"t": 60, "r": 20}, legend={"orientation": "h", "y": 1.08, "x": 0},
        xaxis={"title": {"text": pairs[0][0]}}, yaxis={"title": {"text": pairs[0][1]}},
    )  # fmt: skip
    return figure


def _menu(figure: Any, pairs: list[tuple[str, str]]) -> None:
    if len(pairs) < 2:
        return
    traces = len(figure.data) // len(pairs)
    buttons = [
        {
            "label": f"{up} / {across}",
            "method": "update",
            "args": [
                {"visible": [j // traces == i for j in range(len(figure.data))]},
                {"xaxis.title.text": across, "yaxis.title.text": up},
            ],
        }
        for i, (across, up) in enumerate(pairs)
    ]
    figure.update_layout(updatemenus=[{"buttons": buttons, "x": 1, "xanchor": "right", "y": 1.13}])


def _hover(row: dict[str, Any], members: Front) -> str:
    lines = [f"<b>evaluation {row['evaluation']}</b> ({row['key'][:8]}), fidelity {row['fidelity']}"]
    lines += [f"{name} {row[name]:.5g}" for name in members.metrics if row.get(name) is not None]
    genotype = json.dumps(row["genotype"])
    lines += [genotype[i : i + 70] for i in range(0, min(len(genotype), 420), 70)]
    return "<br>".join(lines)


def _png(members: Front, job: Job, to: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    others = dominated_rows(members, job)
    pairs = axes(members)[:3]
    figure, panels = plt.subplots(1, len(pairs), figsize=(5.2 * len(pairs), 4.2), squeeze=False)
    for panel, (across, up) in zip(panels[0], pairs, strict=True):
        if across in others and up in others:
            panel.scatter(others[across], others[up], s=16, color=OTHER_COLOUR, label="dominated", zorder=1)
        panel.scatter(
            [row[across] for row in members], [row[up] for row in members], s=34, color=FRONT_COLOUR,
            edgecolor="white", linewidth=0.6, label="front", zorder=2,
        )  # fmt: skip
        panel.set(xlabel=across, ylabel=up)
        panel.grid(color="#eceff1")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].legend(frameon=False)
    fidelity = ", ".join(sorted({str(row["fidelity"]) for row in members}))
    figure.suptitle(f"{job.name}: {len(members)} members of the front, fidelity {fidelity or '-'}", fontsize=11)
    figure.tight_layout()
    figure.savefig(to, dpi=150)
    plt.close(figure)
