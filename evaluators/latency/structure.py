"""Structural features of networks: what is counted in them, whatever device will run them.

Latency is close to additive in such counts on every device, with prices of its own; so they let few measurements say
much. Features need no common unit: whoever fits them standardises them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from archfront.errors import InputError
from archfront.spaces.blocks import NO_BLOCK, BlockSpace
from archfront.spaces.space import Population

Features = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

CELL_EDGES = ((0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3))
"""NAS-Bench-201's edges between the cell's four nodes, in the order of the columns of operators."""

CELL_NONE = 0
CELL_OPERATORS = 5


def cell_structure(ops: npt.ArrayLike) -> Features:
    """How often each operator stands in each NAS-Bench-201 cell.

    Args:
        ops: ``(n, 6)`` operators of ``CELL_EDGES``: 0 none, 1 skip, 2 1x1 conv, 3 3x3 conv, 4 3x3 average pool.

    Returns:
        ``(n, 4)`` counts of operators 1 to 4; those of ``none`` follow from them.
    """
    cells = _cells(ops)
    return np.stack([(cells == op).sum(axis=1) for op in range(1, CELL_OPERATORS)], axis=1).astype(np.float64)


def used_cells(ops: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """The cells ``(n, 6)`` without the operators whose result nobody reads, as a graph compiler leaves them."""
    cells = _cells(ops)
    return np.where(_used(cells), cells, CELL_NONE)


def live_cells(ops: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """As ``used_cells``, and without the operators that only ever see zeros: what constant folding leaves."""
    cells = _cells(ops)
    reached = np.zeros((len(cells), 4), dtype=bool)
    reached[:, 0] = True
    for edge, (start, stop) in enumerate(CELL_EDGES):
        reached[:, stop] |= reached[:, start] & (cells[:, edge] != CELL_NONE)
    fed = np.stack([reached[:, start] for start, _ in CELL_EDGES], axis=1)
    return np.where(_used(cells) & fed, cells, CELL_NONE)


def cell_rewrites(ops: npt.ArrayLike) -> Indices:
    """Which row each cell becomes on a runtime that drops unused operators, and on one that folds zeros as well.

    Args:
        ops: ``(n, 6)``, each cell once, and with every cell also what it becomes.

    Returns:
        ``(2, n)`` rows.

    Raises:
        InputError: a cell becomes one that is not there.
    """
    cells = _cells(ops)
    radix = CELL_OPERATORS ** np.arange(6)
    codes = cells @ radix
    order = np.argsort(codes, kind="stable")
    rows = []
    for rewritten in (used_cells(cells), live_cells(cells)):
        wanted = rewritten @ radix
        found = order[np.minimum(np.searchsorted(codes[order], wanted), len(codes) - 1)]
        missing = np.flatnonzero(codes[found] != wanted)
        if len(missing):
            cell = rewritten[missing[0]].tolist()
            raise InputError("ops", cell, "is what a cell becomes, and is not among the cells", "Append it.")
        rows.append(found)
    return np.stack(rows)


def cell_relations(ops: npt.ArrayLike) -> Features:
    """How the live operators of NAS-Bench-201 cells meet: what their counts do not say, and a device may price.

    Args:
        ops: as of ``cell_structure``.

    Returns:
        ``(n, 64)``: for each two operators how often one reads the other's result (16), adds to it (10), and reads the
        same tensor (10); the sums at each node and in all (4); on the longest way through the cell, the convolutions,
        poolings, both, and all operators, -1 where nothing gets through (4); and whether the cell has 0 to 4 of each
        operator (20).
    """
    cells = live_cells(ops)
    one_hot = np.eye(CELL_OPERATORS)[cells][:, :, 1:]
    shape = (len(cells), CELL_OPERATORS - 1, CELL_OPERATORS - 1)
    reads, adds, shares = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    for first, (start, stop) in enumerate(CELL_EDGES):
        for second, (other_start, other_stop) in enumerate(CELL_EDGES):
            both = one_hot[:, first, :, None] * one_hot[:, second, None, :]
            if stop == other_start:
                reads += both
            if stop == other_stop and first != second:
                adds += both
            if start == other_start and first != second:
                shares += both
    half = np.triu_indices(CELL_OPERATORS - 1)
    present = cells != CELL_NONE
    ends = np.array([stop for _, stop in CELL_EDGES])
    arriving = np.stack([present[:, ends == node].sum(axis=1) for node in (1, 2, 3)], axis=1)
    sums = np.maximum(arriving - 1.0, 0.0)
    weights = [[0, 0, 1, 1, 0], [0, 0, 0, 0, 1], [0, 0, 1, 1, 1], [0, 1, 1, 1, 1]]
    ways = [_longest(cells, np.array(each)) for each in weights]
    counts = (cell_structure(cells)[:, :, None] == np.arange(5)).reshape(len(cells), -1)
    related = [reads.reshape(len(cells), -1), adds[:, *half], shares[:, *half], sums, sums.sum(axis=1, keepdims=True)]
    return np.hstack([*related, np.stack(ways, axis=1), counts.astype(np.float64)])


def _longest(cells: npt.NDArray[np.int64], weights: npt.NDArray[np.int64]) -> Features:
    """``(n,)``: weight of the heaviest way from input to output by each operator's weight; -1 where there is none."""
    nowhere = -float(len(CELL_EDGES) * weights.max() + 1)
    heaviest = np.full((len(cells), 4), nowhere)
    heaviest[:, 0] = 0
    for edge, (start, stop) in enumerate(CELL_EDGES):
        by_edge = np.where(cells[:, edge] != CELL_NONE, heaviest[:, start] + weights[cells[:, edge]], nowhere)
        heaviest[:, stop] = np.maximum(heaviest[:, stop], by_edge)
    found: Features = np.maximum(heaviest[:, 3], -1.0)
    return found


@dataclass(frozen=True, kw_only=True)
class BlockQuantities:
    """What each distinct block of a space computes and moves.

    Attributes:
        names: of the columns.
        values: ``(blocks, quantities)``, for one input; multiply-accumulates, elements or counts.
    """

    names: tuple[str, ...]
    values: Features


def summed_structure(values: npt.ArrayLike, indices: npt.ArrayLike) -> Features:
    """Each network's quantities: the sums over its blocks.

    Args:
        values: ``(blocks, quantities)``.
        indices: ``(n, layers)`` blocks of each network; ``NO_BLOCK`` where a layer does nothing.

    Returns:
        ``(n, quantities)``.

    Raises:
        InputError: the shapes do not fit, or an index is none of the blocks.
    """
    table, chosen = np.asarray(values, dtype=np.float64), np.asarray(indices)
    if table.ndim != 2 or chosen.ndim != 2 or not np.issubdtype(chosen.dtype, np.integer):
        shapes = (table.shape, chosen.shape)
        raise InputError("indices", shapes, "are not two matrices", "Give (blocks, quantities) and (n, layers) ints.")
    if chosen.size and (chosen.min() < NO_BLOCK or chosen.max() >= len(table)):
        wrong = int(chosen.min() if chosen.min() < NO_BLOCK else chosen.max())
        raise InputError("indices", wrong, "is no block", f"Give {NO_BLOCK} to {len(table) - 1}.")
    # Counts first: networks have few distinct blocks, and one product beats a sum over a large three-way array.
    counts = np.zeros((len(chosen), len(table)))
    network, layer = np.nonzero(chosen != NO_BLOCK)
    np.add.at(counts, (network, chosen[network, layer]), 1)
    summed: Features = counts @ table
    return summed


def chain_structure(space: BlockSpace, population: Population) -> Features:
    """``(n, quantities)``: the sums of ``block_quantities`` over each genotype's blocks, stem and head included."""
    return summed_structure(block_quantities(space).values, space.block_indices(population))


def block_quantities(space: BlockSpace) -> BlockQuantities:
    """Count what the blocks of a space do: each runs once on tensors without data.

    Multiply-accumulates are told apart where devices price them apart: full convs by kernel, grouped ones, depthwise
    ones by kernel, linear layers. Traffic is the elements that these layers read and write.
    """
    found = [_quantities(space, spec.descriptor, spec.input_shape) for spec in space.block_catalogue()]
    names = tuple(sorted({name for quantities in found for name in quantities}))
    values = np.array([[quantities.get(name, 0.0) for name in names] for quantities in found], dtype=np.float64)
    return BlockQuantities(names=names, values=values.reshape(len(found), len(names)))


def _quantities(space: BlockSpace, descriptor: str, input_shape: Sequence[int]) -> dict[str, float]:
    import torch
    from torch import Tensor, nn

    found: dict[str, float] = {"blocks": 1.0}

    def add(name: str, amount: float) -> None:
        found[name] = found.get(name, 0.0) + amount

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        traffic = float(inputs[0].numel() + output.numel())
        if isinstance(module, nn.Linear):
            add("linear_macs", float(output.numel() * module.in_features))
        else:
            assert isinstance(module, nn.Conv2d)
            kernel, groups = module.kernel_size[0], module.groups
            macs = float(output.numel() * module.weight[0].numel())
            if groups == 1:
                add(f"conv{kernel}_macs", macs)
            elif groups == module.in_channels:
                add(f"depthwise{kernel}_macs", macs)
                add("depthwise_traffic", traffic)
            else:
                add(f"grouped{kernel}_macs", macs)
                found["grouped_blocks"] = 1.0
        add("traffic", traffic)

    with torch.device("meta"):
        block = space.build_block(descriptor).eval()
        hooks = [m.register_forward_hook(count) for m in block.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        with torch.no_grad():
            block(torch.empty(1, *input_shape))
        for hook in hooks:
            hook.remove()
    add("parameters", float(sum(parameter.numel() for parameter in block.parameters())))
    return found


def _cells(ops: npt.ArrayLike) -> npt.NDArray[np.int64]:
    cells = np.asarray(ops)
    if cells.ndim != 2 or cells.shape[1] != len(CELL_EDGES) or not np.issubdtype(cells.dtype, np.integer):
        raise InputError("ops", f"{cells.dtype}{cells.shape}", "is no matrix of cells", "Give integers (n, 6).")
    if cells.size and (cells.min() < 0 or cells.max() >= CELL_OPERATORS):
        wrong = int(cells.min() if cells.min() < 0 else cells.max())
        raise InputError("ops", wrong, "is no operator", f"Give 0 to {CELL_OPERATORS - 1}.")
    return cells.astype(np.int64)


def _used(cells: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """``(n, 6)``: which operators lie on a way to the cell's output."""
    wanted = np.zeros((len(cells), 4), dtype=bool)
    wanted[:, 3] = True
    present = cells != CELL_NONE
    for edge, (start, stop) in reversed(list(enumerate(CELL_EDGES))):
        wanted[:, start] |= wanted[:, stop] & present[:, edge]
    used: npt.NDArray[np.bool_] = present & np.stack([wanted[:, stop] for _, stop in CELL_EDGES], axis=1)
    return used
