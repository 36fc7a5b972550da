"""The public latency tables behind benchmarks/few_shot.py: networks, devices, splits, and what noise allows."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from archfront.errors import InputError
from archfront.evaluators.latency.structure import (
    cell_rewrites,
    cell_structure,
    chain_structure,
    live_cells,
    used_cells,
)
from archfront.spaces.fbnet import FBNet

Vector = npt.NDArray[np.float64]

EDGES = ["op_0_1", "op_0_2", "op_1_2", "op_0_3", "op_1_3", "op_2_3"]
BLOCKS = [f"block_{i:02d}" for i in range(22)]
MACRO = [[16, 1, 1], [24, 4, 1], [32, 4, 2], [64, 4, 2], [112, 4, 1], [184, 4, 2], [352, 1, 1]]
"""Of HELP's FBNet, which is the one of HW-NAS-Bench for CIFAR-100."""

PHONES_AND_CPUS = ["silver_4114", "silver_4210r", "samsung_a50", "pixel3", "essential_ph_1", "samsung_s7"]
SAME_DEVICE = ("raspi4", "eyeriss", "fpga")
"""HW-NAS-Bench measured HELP's test devices too: these columns of it are not used for anything."""


@dataclass(frozen=True, kw_only=True)
class LatencyTable:
    """Networks of a space and their latencies.

    Attributes:
        name: of the space.
        networks: ``(n, d)`` decisions.
        choices: of each decision.
        structure: ``(n, p)`` structural features.
        rewrites: ``(k, n)`` rows that a runtime may turn each network into; None for none.
        ms: ``(n,)`` of each device, NaN where not supported or not measured.
        train, validation, test: devices by HELP's split; validation also has what HELP does not have.
        published: mean Spearman on the test devices as HELP states it.
        goal: ours.
    """

    name: str
    networks: npt.NDArray[np.int64]
    choices: list[int]
    structure: Vector
    rewrites: npt.NDArray[np.int64] | None
    ms: dict[str, Vector]
    train: list[str]
    validation: list[str]
    test: list[str]
    published: float
    goal: float

    def known(self, devices: Sequence[str]) -> Vector:
        """``(n, D)`` latencies of devices."""
        return np.stack([self.ms[device] for device in devices], axis=1) if devices else np.zeros((len(self), 0))

    def __len__(self) -> int:
        return len(self.networks)


def data_folder() -> Path:
    """
    Raises:
        InputError: ``ARCHFRONT_DATA`` does not name a folder with HELP's tables.
    """
    folder = os.environ.get("ARCHFRONT_DATA", "")
    if not folder or not (Path(folder) / "help_latency").is_dir():
        remedy = "Set it to the folder that holds help_latency, nasbench201, hwnasbench and nnmeter."
        raise InputError("ARCHFRONT_DATA", folder, "has no folder help_latency", remedy)
    return Path(folder)


def family(device: str) -> str:
    """Devices that are one but for batch size or model number: ``1080ti_32`` is ``1080ti``; all Titans are one."""
    if device.startswith("titan"):
        return "titan"
    return device.rsplit("_", 1)[0]


def cells(folder: Path, *, beyond_help: bool = True) -> LatencyTable:
    """NAS-Bench-201 on HELP's devices and, for validation, on those that HELP does not have."""
    accuracy = pd.read_parquet(folder / "nasbench201/nb201_accuracy.parquet", columns=["arch_idx", *EDGES])
    frame = pd.read_parquet(folder / "help_latency/help_nb201_latency_ms.parquet")
    ops = accuracy.set_index("arch_idx").loc[frame.arch_idx, EDGES].to_numpy(np.int64)
    ms = {str(name): frame[name].to_numpy(np.float64) for name in frame.columns if name != "arch_idx"}
    extra: list[str] = []
    if beyond_help:
        ms |= (found := _beyond_help(folder, frame.arch_idx.to_numpy()))
        extra = list(found)
    return LatencyTable(
        name="NAS-Bench-201",
        networks=ops,
        choices=[5] * 6,
        structure=cell_structure(ops),
        rewrites=cell_rewrites(ops),
        ms=ms,
        train=["1080ti_1", "1080ti_32", "1080ti_256", *PHONES_AND_CPUS],
        validation=["titanx_1", "titanx_32", "titanx_256", "gold_6240", *extra],
        test=["titan_rtx_256", "gold_6226", "fpga", "pixel2", "raspi4", "eyeriss"],
        published=0.932,
        goal=0.965,
    )


def _beyond_help(folder: Path, arch_idx: npt.NDArray[np.int64]) -> dict[str, Vector]:
    found = {}
    hw = pd.read_parquet(
        folder / "hwnasbench/hwnasbench_nb201.parquet", columns=["dataset", "arch_idx", "edgetpu_latency"]
    )
    edgetpu = hw[hw.dataset == "cifar10"].set_index("arch_idx").edgetpu_latency.reindex(arch_idx).to_numpy(np.float64)
    found["edgetpu"] = np.where(edgetpu > 0, edgetpu, np.nan)
    meter = pd.read_parquet(folder / "nnmeter/nnmeter_model_latency.parquet")
    for device, rows in meter[meter.family == "nasbench201"].groupby("device", observed=True):
        latency = rows.drop_duplicates("model_id").set_index("model_id").latency_ms
        found[str(device).split("_")[0]] = latency.reindex(arch_idx).to_numpy(np.float64)
    return found


def cell_encoding(ops: npt.NDArray[np.int64]) -> Vector:
    """``(n, 51)`` further features of cells for many samples: of the cell as written, used, and live its counts, and
    whether it has no, one or two convolutions, for what a network costs without any does not add up; and the live cell.
    """
    live = live_cells(ops)
    counts = [cell_structure(cells) for cells in (ops, used_cells(ops), live)]
    few = [(count[:, 1:3].sum(axis=1, keepdims=True) == np.arange(3)).astype(float) for count in counts]
    return np.hstack([*counts, *few, np.eye(5)[live].reshape(len(ops), -1)])


def chains(folder: Path) -> LatencyTable:
    """HELP's FBNet on its devices."""
    frame = pd.read_parquet(folder / "help_latency/help_fbnet_latency_ms.parquet")
    return _chain_table(frame)


def _chain_table(frame: pd.DataFrame) -> LatencyTable:
    blocks = frame[BLOCKS].to_numpy(np.int64)
    space = FBNet(resolution=32, classes=100, stem=[16, 1], macro=MACRO, keep_expansion=True)
    return LatencyTable(
        name="FBNet",
        networks=blocks,
        choices=[9] * 22,
        structure=chain_structure(space, blocks.astype(np.int16)),
        rewrites=None,
        ms={str(name): frame[name].to_numpy(np.float64) for name in frame.columns if name not in BLOCKS},
        train=["1080ti_1", "1080ti_32", "1080ti_64", *PHONES_AND_CPUS],
        validation=["titanx_1", "titanx_32", "titanx_64", "gold_6240"],
        test=["raspi4", "eyeriss", "fpga"],
        published=0.910,
        goal=0.95,
    )


def with_own(folder: Path, path: Path) -> LatencyTable:
    """HELP's table with the columns of another one of the same space, matched by ``arch_idx`` or by the blocks.

    Raises:
        InputError: it has neither.
    """
    own = pd.read_parquet(path)
    if "arch_idx" in own.columns:
        table = cells(folder, beyond_help=False)
        index = pd.read_parquet(folder / "help_latency/help_nb201_latency_ms.parquet", columns=["arch_idx"]).arch_idx
        given = own.drop_duplicates("arch_idx").set_index("arch_idx").reindex(index)
        named = [name for name in given.columns if name not in EDGES and pd.api.types.is_numeric_dtype(given[name])]
        columns = {str(name): given[name].to_numpy(np.float64) for name in named}
        return _joined(table, columns)
    if set(BLOCKS) <= set(own.columns):
        devices = [name for name in own.columns if name not in BLOCKS]
        both = pd.read_parquet(folder / "help_latency/help_fbnet_latency_ms.parquet")
        both = both.drop(columns=[name for name in devices if name in both.columns])
        merged = both.merge(own.drop_duplicates(BLOCKS), on=BLOCKS, how="outer")
        return _chain_table(merged)
    remedy = f"Give a column arch_idx (NAS-Bench-201) or {BLOCKS[0]} to {BLOCKS[-1]} (FBNet)."
    raise InputError("--table", list(own.columns), "does not say which networks its rows are", remedy)


def _joined(table: LatencyTable, columns: dict[str, Vector]) -> LatencyTable:
    # Values that are no latency say that the network does not run there.
    clean = {name: np.where(column > 0, column, np.nan) for name, column in columns.items()}
    return LatencyTable(**{**vars(table), "ms": table.ms | clean})


@dataclass(frozen=True, kw_only=True)
class Repeats:
    """Groups of cells that are one network under different names, so that their latencies differ by noise alone.

    Cells are alike that have the same isomorphism class and the same number of each operator, those that do nothing
    included.
    """

    group: npt.NDArray[np.int64]

    def ceiling(
        self, ms: Vector, rows: npt.NDArray[np.int64], least: int = 6
    ) -> tuple[npt.NDArray[np.int64], float, float]:
        """Bounds of the share within 10 % that a perfect predictor reaches on those of ``rows`` that have repeats.

        It has to give one figure to all of a group. The upper bound takes the figure that suits each group best, which
        also fits its noise; the lower one each cell's from the others of its group, the median of five or more.

        Returns:
            these rows, the lower and the upper bound.
        """
        kept, low, high = [], 0, 0
        for members in self._groups(rows, ms, least):
            values = ms[members]
            others = np.array([np.median(np.delete(values, i)) for i in range(len(values))])
            low += int(within(others, values).sum())
            # The best figure can be moved up to the upper end of one of its members' intervals.
            ends = 1.1 * values * (1 - 1e-12)
            high += int(within(ends[:, None], values[None]).sum(axis=1).max())
            kept.append(members)
        found = np.concatenate(kept) if kept else np.zeros(0, np.int64)
        return found, low / max(1, len(found)), high / max(1, len(found))

    def _groups(self, rows: npt.NDArray[np.int64], ms: Vector, least: int) -> list[npt.NDArray[np.int64]]:
        given = rows[np.isfinite(ms[rows])]
        order = given[np.argsort(self.group[given], kind="stable")]
        parts = np.split(order, np.flatnonzero(np.diff(self.group[order])) + 1)
        return [part for part in parts if len(part) >= least]


def repeats(folder: Path) -> Repeats:
    """NAS-Bench-201's, in the order of HELP's table."""
    frame = pd.read_parquet(folder / "nasbench201/nb201_accuracy.parquet", columns=["arch_idx", "unique_str", *EDGES])
    index = pd.read_parquet(folder / "help_latency/help_nb201_latency_ms.parquet", columns=["arch_idx"]).arch_idx
    frame = frame.set_index("arch_idx").loc[index]
    counts = cell_structure(frame[EDGES].to_numpy(np.int64)).astype(int)
    keys = [f"{name}{count.tolist()}" for name, count in zip(frame.unique_str.astype(str), counts, strict=True)]
    return Repeats(group=np.unique(keys, return_inverse=True)[1].ravel())


def within(predicted: Vector, measured: Vector, share: float = 0.1) -> npt.NDArray[np.bool_]:
    """Whether each prediction lies within this share of the measured latency."""
    close: npt.NDArray[np.bool_] = np.abs(predicted / measured - 1) <= share
    return close
