"""Few-shot latency: ten measurements of a device never seen, how well do they rank and price all other networks?

NAS-Bench-201 and FBNet with HELP's splits of devices: ours, chosen actively and drawn at random; a plain Gaussian
process over the principal components of the training devices' latencies; HELP's published figures. Then 900 random
samples of each NAS-Bench-201 device and the share of networks within 10 %, beside what its noise allows. Then
nn-Meter's model families. Target devices show nothing but the rows drawn; the method's choices were made on validation
devices.

    python benchmarks/few_shot.py [--quick]
    python benchmarks/few_shot.py --table MY.parquet --targets my_phone,my_gpu [--known pixel3,1080ti_1]

MY.parquet: a column of ms for each device, and `arch_idx` (NAS-Bench-201) or `block_00` to `block_21` (FBNet).
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from few_shot_tables import (
    SAME_DEVICE,
    LatencyTable,
    Repeats,
    cell_encoding,
    cells,
    chains,
    data_folder,
    family,
    repeats,
    with_own,
    within,
)
from machine import machine, show, write_json
from scipy.stats import spearmanr

from archfront.errors import InputError
from archfront.evaluators.latency.predictors.ensemble import TabularEnsemble
from archfront.evaluators.latency.predictors.few_shot import FewShotTransfer
from archfront.evaluators.latency.structure import cell_relations

Vector = npt.NDArray[np.float64]
Rows = npt.NDArray[np.int64]

CONFIDENCE = 0.9
SAMPLES = 900


def transfer(table: LatencyTable, known: Sequence[str]) -> FewShotTransfer:
    families = [family(device) for device in known]
    return FewShotTransfer(table.structure, table.known(known), rewrites=table.rewrites, families=families)


def few_shot(
    table: LatencyTable, known: Sequence[str], target: str, *, draws: int, count: int, active: bool
) -> dict[str, Any]:
    """Mean over draws on all rows of the target that were not drawn: Spearman, errors, cover of the intervals."""
    ms = table.ms[target]
    supported = np.flatnonzero(np.isfinite(ms))
    found = []
    for seed in range(draws):
        rng = np.random.default_rng(seed)
        predictor = transfer(table, known)
        rows = predictor.choose(count, rng, supported) if active else rng.choice(supported, count, replace=False)
        others = np.setdiff1d(supported, rows)
        said = predictor.fit(rows, ms[rows]).predict(others, CONFIDENCE)
        true = ms[others]
        found.append(
            {
                "spearman": float(spearmanr(said.ms, true).statistic),
                "median_error": float(np.median(np.abs(said.ms / true - 1))),
                "within_10": float(within(said.ms, true).mean()),
                "covered": float(((said.low_ms <= true) & (true <= said.high_ms)).mean()),
                "width": float(np.median((said.high_ms - said.low_ms) / said.ms)),
            }
        )
    return _mean(found)


def plain_process(table: LatencyTable, known: Sequence[str], target: str, *, draws: int, count: int) -> dict[str, Any]:
    """The peer: a Gaussian process over all principal components of the known devices' latencies, samples at random."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel

    latencies = table.known(known)
    latencies = np.where(np.isnan(latencies), np.nanmean(latencies, axis=0), latencies)
    centred = (latencies - latencies.mean(axis=0)) / latencies.std(axis=0)
    left, singular, _ = np.linalg.svd(centred, full_matrices=False)
    points = left * singular / singular[0] * np.sqrt(len(left))
    ms = table.ms[target]
    supported = np.flatnonzero(np.isfinite(ms))
    found = []
    for seed in range(draws):
        rows = np.random.default_rng(seed).choice(supported, count, replace=False)
        # Bounds as they serve the validation devices best: ten samples alone often ask for lengths that are too short.
        kernel = ConstantKernel(10.0, (1.0, 1e4)) * RBF(5.0, (3.0, 100.0)) + WhiteKernel(0.05, (1e-3, 1.0))
        process = GaussianProcessRegressor(kernel, normalize_y=True, random_state=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            process.fit(points[rows], ms[rows])
        others = np.setdiff1d(supported, rows)
        found.append({"spearman": float(spearmanr(process.predict(points[others]), ms[others]).statistic)})
    return _mean(found)


def _mean(found: list[dict[str, float]]) -> dict[str, Any]:
    means: dict[str, Any] = {name: float(np.mean([each[name] for each in found])) for name in found[0]}
    each = [draw["spearman"] for draw in found]
    return means | {"spearman_std": float(np.std(each)), "least": min(each), "draws": len(found)}


def devices(
    table: LatencyTable, targets: Sequence[str], draws: int, count: int, known: Sequence[str] | None = None
) -> dict[str, Any]:
    """Each target; without ``known`` it is a validation device, predicted from training devices of other families."""
    found = {}
    for target in targets:
        others = known or [device for device in table.train if family(device) != family(target)]
        others = [device for device in others if device != target]
        found[target] = {
            "active": few_shot(table, others, target, draws=draws, count=count, active=True),
            "random": few_shot(table, others, target, draws=draws, count=count, active=False),
            "plain_process": plain_process(table, others, target, draws=draws, count=count) if others else None,
        }
    return found


def many_samples(table: LatencyTable, alike: Repeats, targets: Sequence[str], samples: int) -> dict[str, Any]:
    """Random samples of one device alone; all its other networks predicted."""
    found = {}
    for target in targets:
        ms = table.ms[target]
        supported = np.flatnonzero(np.isfinite(ms))
        rng = np.random.default_rng(0)
        rows = rng.choice(supported, min(samples, len(supported) // 2), replace=False)
        others = np.setdiff1d(supported, rows)
        predictor = TabularEnsemble(table.choices, cell_encoding, cell_relations).fit(table.networks[rows], ms[rows])
        said = predictor.predict(table.networks[others], CONFIDENCE)
        close = within(said.ms, ms[others])
        repeated, low, high = alike.ceiling(ms, others)
        found[target] = {
            "samples": len(rows),
            "within_10": float(close.mean()),
            "spearman": float(spearmanr(said.ms, ms[others]).statistic),
            "covered": float(((said.low_ms <= ms[others]) & (ms[others] <= said.high_ms)).mean()),
            "integer_ms": bool((ms[supported] == np.round(ms[supported])).all()),
            "repeated": len(repeated),
            "within_10_repeated": float(close[np.isin(others, repeated)].mean()) if len(repeated) else None,
            "ceiling_low": low if len(repeated) else None,
            "ceiling_high": high if len(repeated) else None,
        }
        print(f"{target}: {found[target]['within_10']:.2%} within 10 %", flush=True)
    return found


def model_families(folder: Path) -> list[dict[str, Any]]:
    """nn-Meter's families, each left out in turn: the GPU's latencies from the CPU's by a line between logarithms.

    The table has no architectures, only families and numbers of models, so the latency on the one device is all that
    there is to predict the other one from. Numbers that stand for several models are left out.
    """
    frame = pd.read_parquet(folder / "nnmeter/nnmeter_model_latency.parquet")
    frame = frame.astype({"device": str, "family": str}).drop_duplicates(["device", "family", "model_id"], keep=False)
    wide = frame.pivot(index=["family", "model_id"], columns="device", values="latency_ms").dropna()
    cpu, gpu = (next(name for name in wide.columns if word in name) for word in ("cpu", "gpu"))
    x, y = np.log(wide[cpu].to_numpy(np.float64)), np.log(wide[gpu].to_numpy(np.float64))
    names = wide.index.get_level_values("family").to_numpy()
    weight = 1 / pd.Series(names).map(pd.Series(names).value_counts()).to_numpy(np.float64)
    found = []
    for name in sorted(set(names)):
        out = names == name
        slope, constant = np.polyfit(x[~out], y[~out], 1, w=np.sqrt(weight[~out]))
        predicted = np.exp(constant + slope * x[out])
        rank = float(spearmanr(predicted, y[out]).statistic)
        error = float(np.median(np.abs(predicted / np.exp(y[out]) - 1)))
        share = float(within(predicted, np.exp(y[out])).mean())
        row = {"family": name, "models": int(out.sum()), "spearman": rank, "median_error": error, "within_10": share}
        found.append(row)
    return found


def report_devices(title: str, found: dict[str, Any], table: LatencyTable, *, published: bool) -> None:
    rows: list[list[Any]] = []
    for name, each in found.items():
        active, peer = each["active"], each["plain_process"]
        shown = [active["spearman"], active["spearman_std"], each["random"]["spearman"]]
        shown += [peer and peer["spearman"], active["median_error"], active["covered"], active["width"]]
        rows.append([name, *(_three(value) for value in shown)])
    means = [_average(found, kind, "spearman") for kind in ("active", "random", "plain_process")]
    covered = _average(found, "active", "covered")
    rows.append(["mean", _three(means[0]), "", _three(means[1]), _three(means[2]), "", _three(covered), ""])
    if published:
        rows.append(["HELP, published", _three(table.published), *[""] * 6])
        rows.append(["goal", _three(table.goal), *[""] * 6])
    heads = ("", "active", "sd of draws", "random", "plain process", "median error", "90 % covers", "width / ms")
    show(title, heads, rows)


def report_many(found: dict[str, Any]) -> None:
    names = ("within_10", "covered", "within_10_repeated", "ceiling_low", "ceiling_high")
    rows = []
    for name, row in found.items():
        title = name + (" (integer ms)" if row["integer_ms"] else "")
        rows.append([title, row["samples"], *(_three(row[n], 4) for n in names), row["repeated"]])
    heads = ("", "samples", "within 10 %", "90 % covers", "on repeated cells", "noise allows", "to", "repeated cells")
    show("NAS-Bench-201, many samples of one device", heads, rows)


def _three(value: float | None, digits: int = 3) -> str | None:
    return None if value is None else f"{value:.{digits}f}"


def _average(found: dict[str, Any], kind: str, measure: str) -> float | None:
    values = [each[kind][measure] for each in found.values() if each[kind] is not None]
    return float(np.mean(values)) if values else None


def own(folder: Path, options: argparse.Namespace) -> None:
    table = with_own(folder, options.table)
    targets = [name for name in options.targets.split(",") if name]
    known = [name for name in options.known.split(",") if name] or table.train
    for name in [*targets, *known]:
        if name not in table.ms:
            raise InputError("--targets", name, "is no device of the tables", f"Choose from {', '.join(table.ms)}.")
    if not targets:
        raise InputError("--targets", options.targets, "names no device", f"Choose from {', '.join(table.ms)}.")
    found = devices(table, targets, options.draws, options.count, known)
    report_devices(f"{table.name}, {options.count} samples, known: {', '.join(known)}", found, table, published=False)
    if options.json != Path(__file__).with_suffix(".json"):
        write_json(options.json, machine(), table=str(options.table), known=known, devices=found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--count", type=int, default=10, help="samples of each new device")
    parser.add_argument("--quick", action="store_true", help="test devices with two draws: a smoke test")
    parser.add_argument("--table", type=Path, help="a parquet of one's own devices")
    parser.add_argument("--known", default="", help="devices of --table or HELP; HELP's training devices by default")
    parser.add_argument("--targets", default="", help="devices of --table or HELP to predict")
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    folder = data_folder()
    if options.table is not None or options.targets:
        if options.table is None:
            raise InputError("--table", None, "is missing", "--known and --targets are devices of a table: name it.")
        own(folder, options)
        return
    facts = machine()
    draws = 2 if options.quick else options.draws
    tables = [cells(folder), chains(folder)]
    results: dict[str, Any] = {}
    for table in tables:
        further = [] if options.quick else [d for d in table.ms if d not in table.train + table.validation + table.test]
        splits = {"test": table.test, "further": further, "validation": [] if options.quick else table.validation}
        if not options.quick:
            splits["training"] = table.train
        results[table.name] = {"goal": table.goal, "help": table.published}
        for split, targets in splits.items():
            if not targets:
                continue
            # Training devices stand for new ones, each predicted from the other families.
            known = None if split == "training" else table.train
            found = results[table.name][split] = devices(table, targets, draws, options.count, known)
            title = f"{table.name}, {options.count} samples, {len(targets)} {split} devices, Spearman"
            report_devices(title, found, table, published=split == "test")
    targets = tables[0].test[:1] if options.quick else [*tables[0].train, *tables[0].validation, *tables[0].test]
    results["many"] = many_samples(tables[0], repeats(folder), targets, SAMPLES)
    report_many(results["many"])
    results["families"] = model_families(folder)
    measures = ("models", "spearman", "median_error", "within_10")
    rows = [[row["family"], *(row[m] for m in measures)] for row in results["families"]]
    title = "nn-Meter: Adreno 640 from Cortex-A76 by a line fitted to the other families (no architectures are public)"
    show(title, ("", "models", "Spearman", "median error", "within 10 %"), rows)
    note = f"HW-NAS-Bench's {', '.join(SAME_DEVICE)} are HELP's test devices and are not used."
    write_json(options.json, facts, note=note, results=results)


if __name__ == "__main__":
    main()
