"""Short ways to make the ledger's rows."""

from collections.abc import Mapping, Sequence

from archfront.db.records import AskRecord, FinishedRecord, MetricValue

SPEC = {
    "objectives": [{"metric": "gain", "direction": "max"}, {"metric": "cost", "direction": "min"}],
    "budget": {"evaluations": 10},
}
SIGNS = [("gain", -1), ("cost", 1)]


def ask(number: int, first: int, count: int, *, fidelity: int | Sequence[int] = 0, told: int = 0) -> AskRecord:
    fidelities = [fidelity] * count if isinstance(fidelity, int) else list(fidelity)
    return AskRecord(
        number=number,
        told=told,
        first=first,
        source="strategy",
        keys=[f"{first + i:032x}" for i in range(count)],
        genotypes=[[first + i] for i in range(count)],
        fidelities=fidelities,
        repeats=[0] * count,
    )


def done(number: int, metrics: Mapping[str, float], *, fidelity: int = 0, violation: float = 0.0) -> FinishedRecord:
    values = {name: MetricValue(value, None, "computed", None, None) for name, value in metrics.items()}
    return FinishedRecord(
        number=number,
        fidelity=fidelity,
        state="done",
        attempts=1,
        metrics=values,
        objectives=[-value if name == "gain" else value for name, value in metrics.items() if name != "late"],
        violation=violation,
    )


def failed(number: int, *, fidelity: int = 0) -> FinishedRecord:
    return FinishedRecord(number=number, fidelity=fidelity, state="failed", attempts=3, error="boom")
