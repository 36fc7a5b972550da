"""Structural features: what is counted in cells and in chains of blocks."""

import itertools

import numpy as np
import pytest

from archfront.errors import InputError
from archfront.evaluators.latency.structure import (
    block_quantities,
    cell_relations,
    cell_rewrites,
    cell_structure,
    chain_structure,
    live_cells,
    summed_structure,
    used_cells,
)
from archfront.spaces.blocks import NO_BLOCK
from archfront.spaces.fbnet import FBNet, FBNetTiny

EVERY = np.array(list(itertools.product(range(5), repeat=6)))


def test_counts_of_operators() -> None:
    assert cell_structure([[0, 1, 2, 3, 3, 4]]).tolist() == [[1, 1, 2, 1]]


# Edges 0-1, 0-2, 1-2, 0-3, 1-3, 2-3.
@pytest.mark.parametrize(
    ("cell", "used", "live"),
    [
        ([3, 3, 3, 3, 3, 3], [3, 3, 3, 3, 3, 3], [3, 3, 3, 3, 3, 3]),
        ([3, 2, 0, 1, 0, 2], [0, 2, 0, 1, 0, 2], [0, 2, 0, 1, 0, 2]),  # node 1 is read by nobody
        ([0, 2, 3, 0, 0, 2], [0, 2, 3, 0, 0, 2], [0, 2, 0, 0, 0, 2]),  # node 1 is zero
        ([3, 3, 3, 0, 0, 0], [0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]),
        ([0, 0, 4, 0, 3, 3], [0, 0, 4, 0, 3, 3], [0, 0, 0, 0, 0, 0]),
    ],
)
def test_what_runtimes_leave_of_a_cell(cell: list[int], used: list[int], live: list[int]) -> None:
    assert used_cells([cell]).tolist() == [used]
    assert live_cells([cell]).tolist() == [live]


def test_relations_of_a_cell() -> None:
    # 3x3 from 0 to 1, skip from 0 to 2, pool from 1 to 2, 1x1 from 2 to 3: one way of three, and one around it.
    [found] = cell_relations([[3, 1, 4, 0, 0, 2]])
    reads, adds, shares, sums, ways, counts = np.split(found, [16, 26, 36, 40, 44])
    pairs = {(a, b): i for i, (a, b) in enumerate(itertools.combinations_with_replacement((1, 2, 3, 4), 2))}
    assert {(i // 4 + 1, i % 4 + 1): n for i, n in enumerate(reads) if n} == {(3, 4): 1, (4, 2): 1, (1, 2): 1}
    assert {pair: adds[i] for pair, i in pairs.items() if adds[i]} == {(1, 4): 1}
    assert {pair: shares[i] for pair, i in pairs.items() if shares[i]} == {(1, 3): 1}
    assert sums.tolist() == [0, 1, 0, 1]
    assert ways.tolist() == [2, 1, 3, 3]
    assert counts.reshape(4, 5).argmax(axis=1).tolist() == [1, 1, 1, 1]
    assert cell_relations([[3, 0, 0, 0, 0, 0]])[0, 40:44].tolist() == [-1, -1, -1, -1]


def test_relations_do_not_know_the_names_of_nodes() -> None:
    # Without the edge between them, nodes 1 and 2 can change places.
    cells = EVERY[EVERY[:, 2] == 0]
    swapped = cells[:, [1, 0, 2, 3, 5, 4]]
    one = [*range(36), 39, *range(40, 64)]
    assert (cell_relations(cells)[:, one] == cell_relations(swapped)[:, one]).all()
    assert (cell_relations(EVERY) == cell_relations(live_cells(EVERY))).all()


def test_rewrites_are_rows_of_the_cells_that_remain() -> None:
    shuffled = EVERY[np.random.default_rng(0).permutation(len(EVERY))]
    used, live = cell_rewrites(shuffled)
    assert (shuffled[used] == used_cells(shuffled)).all()
    assert (shuffled[live] == live_cells(shuffled)).all()
    assert (used[used] == used).all()
    assert (live[live] == live).all()
    assert (used != np.arange(len(EVERY))).any()


@pytest.mark.parametrize(
    "cells", [[[0, 1, 2]], [[0, 1, 2, 3, 4, 5]], [[0, 1, 2, 3, 4, -1]], [[0.5, 1, 2, 3, 4, 1]], [0, 1, 2, 3, 4, 1]]
)
def test_what_is_no_cell_is_refused(cells: list[object]) -> None:
    with pytest.raises(InputError, match=r"^ops: "):
        cell_structure(cells)


def test_a_rewrite_that_is_not_there_is_named() -> None:
    with pytest.raises(InputError, match=r"ops: \[0, 0, 0, 0, 0, 0\] is what a cell becomes"):
        cell_rewrites([[3, 3, 3, 0, 0, 0]])


def test_sums_over_blocks() -> None:
    values = [[1.0, 10.0], [2.0, 20.0], [4.0, 0.0]]
    indices = [[0, 1, NO_BLOCK], [2, 2, 2], [NO_BLOCK, NO_BLOCK, NO_BLOCK]]
    assert summed_structure(values, indices).tolist() == [[3, 30], [12, 0], [0, 0]]


@pytest.mark.parametrize("indices", [[[3]], [[-2]], [[0.5]], [0]])
def test_indices_that_are_none_are_refused(indices: list[object]) -> None:
    with pytest.raises(InputError, match=r"^indices: "):
        summed_structure([[1.0], [2.0], [3.0]], indices)


@pytest.mark.parametrize("keep_expansion", [False, True])
def test_quantities_agree_with_the_blocks_own_shapes(keep_expansion: bool) -> None:
    space = FBNetTiny(keep_expansion=keep_expansion)
    found = block_quantities(space)
    macs = found.values[:, [name.endswith("_macs") for name in found.names]].sum(axis=1)
    catalogue = {spec.descriptor: i for i, spec in enumerate(space.block_catalogue())}
    shapes = {
        shape.descriptor: shape
        for choice in space.blocks
        for shape in space.block_shapes([choice] * 12)
        if not shape.is_identity
    }
    assert len(shapes) == len(catalogue) - 2
    for descriptor, shape in shapes.items():
        assert macs[catalogue[descriptor]] == shape.macs
        grouped = found.values[catalogue[descriptor], found.names.index("grouped_blocks")]
        # A block whose groups are its channels is depthwise.
        assert grouped == (1 < shape.kind.groups < shape.cin)


def test_a_chain_is_the_sum_of_its_blocks() -> None:
    space = FBNet(resolution=32)
    population = space.sample(np.random.default_rng(0), 3)
    found = block_quantities(space)
    structure = chain_structure(space, population)
    assert structure.shape == (3, len(found.names))
    depth = found.names.index("blocks")
    assert structure[:, depth].tolist() == (space.block_indices(population) != NO_BLOCK).sum(axis=1).tolist()
    largest = space.from_json([["k5_e6"] * 22])
    assert (chain_structure(space, largest)[0, depth:] >= 0).all()
    kernel3, kernel5 = (found.names.index(f"depthwise{k}_macs") for k in (3, 5))
    assert chain_structure(space, largest)[0, kernel3] == 0 < chain_structure(space, largest)[0, kernel5]
