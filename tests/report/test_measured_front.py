"""The front of the finalists once measurement has spoken."""

from typing import Any

from archfront.report.facts import Finalist, measured_front
from archfront.report.figures import fronts_figure

OBJECTIVES = [("accuracy", "max"), ("latency_ms", "min")]


def finalist(number: int, accuracy: float, predicted: float, measured: float | None) -> Finalist:
    timings: list[tuple[dict[str, Any], dict[str, Any]]] = []
    if measured is not None:
        content = {"median_ms": measured, "low_ms": measured, "high_ms": measured}
        timings = [({"backend": "eager", "batch": 1}, content), ({"backend": "eager", "batch": 64}, {"median_ms": 0.0})]
    row = {"evaluation": number, "key": f"{number:032x}", "metrics": {"accuracy": accuracy, "latency_ms": predicted}}
    return Finalist(row=row, timings=timings)


def test_a_finalist_that_measures_slower_than_predicted_may_fall_from_the_front() -> None:
    finalists = [finalist(3, 90, 1.0, 1.1), finalist(5, 92, 2.0, 3.5), finalist(8, 95, 3.0, 3.2)]
    assert measured_front(finalists, OBJECTIVES, 1) == {3, 8}
    figure = fronts_figure(finalists, "accuracy", {3, 8}, 1)
    predicted, measured = figure.data[-2:]
    assert list(predicted.x) == [1.0, 2.0, 3.0]
    assert list(measured.x) == [1.1, 3.5, 3.2]
    assert list(measured.marker.symbol) == ["circle", "circle-open", "circle"]


def test_there_is_none_without_latency_or_measurement() -> None:
    assert measured_front([finalist(1, 90, 1.0, None)], OBJECTIVES, 1) == set()
    assert measured_front([finalist(1, 90, 1.0, 1.0)], [("accuracy", "max")], 1) == set()
    assert measured_front([finalist(1, 90, 1.0, 1.0)], OBJECTIVES, 64) == {1}
