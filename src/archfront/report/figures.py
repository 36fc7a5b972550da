"""The report's figures, as Plotly figures."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go

from archfront.plots import ACCENT, FRONT_COLOUR
from archfront.report.facts import Correlation, Facts, Finalist

_LAYOUT: dict[str, Any] = {"template": "plotly_white", "height": 380, "margin": {"t": 30, "r": 20, "b": 50}}


def history_figure(facts: Facts) -> Any:
    figure = go.Figure(layout=_LAYOUT)
    figure.add_scatter(
        x=[seq for seq, _ in facts.history], y=[volume for _, volume in facts.history], mode="lines",
        line={"shape": "hv", "color": FRONT_COLOUR, "width": 2.5},
        hovertemplate="%{x} evaluations: %{y:.4f}<extra></extra>",
    )  # fmt: skip
    figure.update_xaxes(title="evaluations committed", rangemode="tozero")
    figure.update_yaxes(title="hypervolume", rangemode="tozero")
    return figure


def correlation_figure(correlation: Correlation) -> Any:
    figure = go.Figure(layout=_LAYOUT)
    figure.add_scatter(
        x=correlation.low_values, y=correlation.high_values, mode="markers",
        marker={"color": FRONT_COLOUR, "size": 8, "opacity": 0.75}, hovertemplate="%{x:.4g} → %{y:.4g}<extra></extra>",
    )  # fmt: skip
    figure.update_xaxes(title=f"{correlation.metric} at fidelity {correlation.low}")
    figure.update_yaxes(title=f"{correlation.metric} at fidelity {correlation.high}")
    return figure


def latency_figure(finalists: list[Finalist], batch: int, backend: str = "eager") -> Any:
    """Predicted against measured, with the 95 % interval of the measured median and the line of equality."""
    rows = [(f, f.predicted_ms, f.measured(backend, batch)) for f in finalists]
    known = [(f, predicted, timing) for f, predicted, timing in rows if predicted is not None and timing is not None]
    figure = go.Figure(layout=_LAYOUT)
    measured = [timing["median_ms"] for _, _, timing in known]
    predicted = [value for _, value, _ in known]
    top = 1.08 * max([*measured, *predicted], default=1.0)
    figure.add_scatter(
        x=[0, top], y=[0, top], mode="lines", line={"color": "#9aa0a6", "dash": "dot"}, hoverinfo="skip", name="equal"
    )
    figure.add_scatter(
        x=predicted, y=measured, mode="markers", marker={"color": ACCENT, "size": 11}, name="finalists",
        error_y={
            "type": "data", "symmetric": False,
            "array": [timing["high_ms"] - timing["median_ms"] for _, _, timing in known],
            "arrayminus": [timing["median_ms"] - timing["low_ms"] for _, _, timing in known],
        },
        text=[f.row["key"][:8] for f, _, _ in known],
        hovertemplate="%{text}: predicted %{x:.3f} ms, measured %{y:.3f} ms<extra></extra>",
    )  # fmt: skip
    figure.update_layout(showlegend=False)
    figure.update_xaxes(title="predicted latency_ms", range=[0, top])
    figure.update_yaxes(title=f"measured ({backend}, batch {batch})", range=[0, top])
    return figure


def fronts_figure(finalists: list[Finalist], objective: str, stay: set[int], batch: int, backend: str = "eager") -> Any:
    """The finalists on the predicted front and where measurement puts them; hollow where another now dominates."""
    figure = go.Figure(layout=_LAYOUT)
    rows = [(f, f.predicted_ms, f.measured(backend, batch)) for f in finalists]
    known = [(f, predicted, timing) for f, predicted, timing in rows if predicted is not None and timing is not None]
    for f, predicted, timing in known:
        figure.add_scatter(
            x=[predicted, timing["median_ms"]], y=[f.row["metrics"][objective]] * 2, mode="lines",
            line={"color": "#9aa0a6", "width": 1.5}, hoverinfo="skip", showlegend=False,
        )  # fmt: skip
    values = [f.row["metrics"][objective] for f, _, _ in known]
    names = [f.row["key"][:8] for f, _, _ in known]
    figure.add_scatter(
        x=[predicted for _, predicted, _ in known], y=values, mode="markers", name="predicted", text=names,
        marker={"color": FRONT_COLOUR, "size": 9}, hovertemplate="%{text}: predicted %{x:.3f} ms<extra></extra>",
    )  # fmt: skip
    symbols = ["circle" if f.row["evaluation"] in stay else "circle-open" for f, _, _ in known]
    figure.add_scatter(
        x=[timing["median_ms"] for _, _, timing in known], y=values, mode="markers", name="measured", text=names,
        marker={"color": ACCENT, "size": 11, "symbol": symbols},
        hovertemplate="%{text}: measured %{x:.3f} ms<extra></extra>",
    )  # fmt: skip
    figure.update_xaxes(title=f"latency_ms ({backend}, batch {batch})", rangemode="tozero")
    figure.update_yaxes(title=objective)
    return figure


def deployment_figure(deployed: list[tuple[Finalist, dict[str, Any], dict[str, Any]]]) -> Any:
    """Time against points lost on test data, of each finalist on each backend that executes files."""
    figure = go.Figure()
    for backend in dict.fromkeys(settings["backend"] for _, settings, _ in deployed):
        rows = [(f, s, t) for f, s, t in deployed if s["backend"] == backend]
        figure.add_scatter(
            x=[t["median_ms"] for _, _, t in rows], y=[t["test_accuracy_drop"] for _, _, t in rows],
            error_y={"array": [2 * t["test_accuracy_drop_std"] for _, _, t in rows], "thickness": 1},
            text=[f"{f.row['key'][:8]}, batch {s['batch']}" for f, s, _ in rows], mode="markers",
            marker={"size": 11}, name=backend, hovertemplate="%{text}<br>%{x:.3f} ms, %{y:.2f} points",
        )  # fmt: skip
    for median in sorted({t["baseline"]["median_ms"] for _, _, t in deployed if t.get("baseline")}):
        figure.add_vline(median, line={"dash": "dot", "color": "grey"}, annotation_text="the network itself")
    figure.update_layout(
        template="plotly_white", height=420, margin={"l": 60, "r": 20, "t": 30, "b": 50},
        xaxis={"title": "measured latency, ms", "type": "log"}, yaxis_title="points lost on test data (± 2 σ)",
    )  # fmt: skip
    return figure
