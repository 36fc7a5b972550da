"""The NASNet space: a normal and a reduction cell of blocks, stacked in a fixed macro-architecture.

Sources: Zoph et al., "Learning Transferable Architectures for Scalable Image Recognition", CVPR 2018, and its published
code for what the paper leaves open; Liu et al., "DARTS", ICLR 2019.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
from torch import nn

from archfront.errors import InputError, suggestion
from archfront.spaces.nasnet_operations import (
    INPUTS,
    NONE,
    OPERATIONS,
    PRESETS,
    Block,
    CellPlan,
    Network,
    Site,
    live_sites,
    stem_conv,
)
from archfront.spaces.product import Column, ProductSpace
from archfront.spaces.space import Genotype, Layer, Population

KINDS = ("normal", "reduction")
MOST_BLOCKS = 6
"""Canonical forms try every order of the blocks: 720."""


@dataclass(frozen=True)
class NamedCells:
    """Two published cells, and how their output was combined."""

    normal: tuple[Block, ...]
    reduction: tuple[Block, ...]
    combine: Literal["unused", "all"] | dict[str, list[int]]

    @property
    def genotype(self) -> list[int | str]:
        """The genotype in a space with as many blocks and these operations."""
        return [part for cell in (self.normal, self.reduction) for block in cell for term in block for part in term]


NASNET_A = NamedCells(
    normal=(
        ((1, "sep_conv_5x5"), (0, "sep_conv_3x3")),
        ((0, "sep_conv_5x5"), (0, "sep_conv_3x3")),
        ((1, "avg_pool_3x3"), (0, "identity")),
        ((0, "avg_pool_3x3"), (0, "avg_pool_3x3")),
        ((1, "sep_conv_3x3"), (1, "identity")),
    ),
    reduction=(
        ((1, "sep_conv_5x5"), (0, "sep_conv_7x7")),
        ((1, "max_pool_3x3"), (0, "sep_conv_7x7")),
        ((1, "avg_pool_3x3"), (0, "sep_conv_5x5")),
        ((3, "identity"), (2, "avg_pool_3x3")),
        ((2, "sep_conv_3x3"), (1, "max_pool_3x3")),
    ),
    # The published networks concatenate state 0 and block 1 (of the reduction cell) although blocks use them.
    combine={"normal": [0, 2, 3, 4, 5, 6], "reduction": [3, 4, 5, 6]},
)
DARTS_V2 = NamedCells(
    normal=(
        ((0, "sep_conv_3x3"), (1, "sep_conv_3x3")),
        ((0, "sep_conv_3x3"), (1, "sep_conv_3x3")),
        ((1, "sep_conv_3x3"), (0, "identity")),
        ((0, "identity"), (2, "dil_sep_conv_3x3")),
    ),
    reduction=(
        ((0, "max_pool_3x3"), (1, "max_pool_3x3")),
        ((2, "identity"), (1, "max_pool_3x3")),
        ((0, "max_pool_3x3"), (2, "identity")),
        ((2, "identity"), (1, "max_pool_3x3")),
    ),
    combine="all",
)


class NasNet(ProductSpace):
    """Cells of blocks; a block is the sum of two terms, an operation on an earlier state each.

    A genotype lists state and operation of each term: of the normal cell's blocks, then of the reduction cell's. States
    0 and 1 are the outputs of the cell before the last one and of the last one, state ``2 + i`` is block ``i``.
    Operations on states 0 and 1 of a reduction cell have stride 2.

    Equal keys: genotypes whose networks differ by the order of terms in a sum or of blocks in a cell (and so by the
    order of channels), by blocks or a whole reduction cell that the logits do not depend on, or by the state of a
    ``none``. Those that are equal for algebraic reasons (the sum of two ``none`` as against no block) differ.

    Args:
        blocks: of each cell, at most 6.
        operations: ``nasnet`` (13), ``darts`` (7), ``darts_none`` (8) or a list of names.
        combine: states that make a cell's output: those that no block uses, its inputs among them (``unused``, NASNet),
            every block (``all``, DARTS), or given ones, ``{"normal": [...], "reduction": [...]}``.
        cells: normal cells in each stage.
        stages: of cells, with a reduction cell between two.
        filters: channels of each state in the first stage; twice as many after each reduction.
        stem: ``cifar``, a 3x3 convolution, or ``imagenet``, a strided one and two reduction cells.
        stem_filters: channels of that convolution; None is three times ``filters``, or 96 for ``imagenet``.
        skip_reduction_input: the cell after a reduction takes as state 0 what the reduction had as state 0, not what it
            reduced: NASNet's large network.
        classes: of the output.
        in_channels, resolution: of the images.

    Raises:
        InputError: an argument cannot be used; the message names it.
    """

    name: ClassVar[str] = "nasnet"

    def __init__(
        self,
        *,
        blocks: int = 5,
        operations: str | list[str] = "nasnet",
        combine: Literal["unused", "all"] | dict[str, list[int]] = "unused",
        cells: int = 6,
        stages: int = 3,
        filters: int = 32,
        stem: Literal["cifar", "imagenet"] = "cifar",
        stem_filters: int | None = None,
        skip_reduction_input: bool = False,
        classes: int = 10,
        in_channels: int = 3,
        resolution: int = 32,
    ) -> None:
        if stem not in ("cifar", "imagenet"):
            raise InputError("space.stem", stem, "is unknown", "Give 'cifar' or 'imagenet'.")
        if stem_filters is None:
            stem_filters = 3 * filters if stem == "cifar" else 96
        numbers = {"blocks": blocks, "cells": cells, "stages": stages, "filters": filters, "classes": classes}
        numbers |= {"stem_filters": stem_filters, "in_channels": in_channels, "resolution": resolution}
        for field, number in numbers.items():
            if number < 1:
                raise InputError(f"space.{field}", number, "is not positive", "Give 1 or more.")
        if filters < 2:
            raise InputError("space.filters", filters, "cannot be halved by a reduction", "Give 2 or more.")
        if blocks > MOST_BLOCKS:
            raise InputError("space.blocks", blocks, "is too many", f"Give at most {MOST_BLOCKS}.")
        if stem == "imagenet" and (filters % 4 or filters < 8):
            raise InputError(
                "space.filters", filters, "cannot be quartered by the stem", "Give a multiple of 4, from 8."
            )
        halvings = stages - 1 + (3 if stem == "imagenet" else 0)
        if resolution < 2**halvings:
            problem = f"cannot be halved {halvings} times"
            raise InputError("space.resolution", resolution, problem, f"Give at least {2**halvings}, or fewer stages.")
        self.blocks, self.cells, self.stages, self.filters, self.stem = blocks, cells, stages, filters, stem
        self.stem_filters, self.skip_reduction_input = stem_filters, bool(skip_reduction_input)
        self.classes, self.in_channels, self.resolution = classes, in_channels, resolution
        self.operations = _operations(operations)
        self.combine = _combine(combine, blocks)
        super().__init__(
            [
                Column(f"{kind}{block}.{term}.{part}", choices)
                for kind in KINDS
                for block in range(blocks)
                for term in ("first", "second")
                for part, choices in (("state", tuple(range(INPUTS + block))), ("operation", self.operations))
            ]
        )
        self.sites = self._sites()
        self._orders = [self._block_orders(kind) for kind in KINDS]
        flags = itertools.product((False, True), repeat=4)
        self._reduces = np.array(
            [any(self.sites[i].reduction for i in live_sites(self.sites, (a, b), (c, d))) for a, b, c, d in flags]
        )

    @property
    def config(self) -> Mapping[str, Any]:
        macro = ("cells", "stages", "filters", "stem", "stem_filters", "skip_reduction_input")
        fields = ("blocks", "combine", *macro, "classes", "in_channels", "resolution")
        return {"operations": list(self.operations), **{field: getattr(self, field) for field in fields}}

    @property
    def known(self) -> Mapping[str, Genotype]:
        """``nasnet-a`` and ``darts-v2``, where the space has their blocks and operations."""
        return self.members({"nasnet-a": NASNET_A.genotype, "darts-v2": DARTS_V2.genotype})

    def canonical(self, population: Population) -> Population:
        """The least of the genotypes that differ by what the class names only; see there."""
        result: Population = np.array(population, dtype=np.int16)
        halves = result.reshape(len(result), len(KINDS), self.blocks, 2, 2)
        none = self.operations.index(NONE) if NONE in self.operations else -1
        states, kinds = halves[..., 0], halves[..., 1]
        states[kinds == none] = 0
        uses = []
        for cell, kind in enumerate(KINDS):
            live = self._live(halves[:, cell], kind, none)
            halves[:, cell][~live[:, INPUTS:]] = 0
            empty = ((kinds[:, cell] == none).all(axis=2) & live[:, INPUTS:]).any(axis=1)
            uses += [live[:, 0], live[:, 1] | empty]
        reduces = self._reduces[np.stack(uses, axis=1) @ np.array([8, 4, 2, 1])]
        halves[~reduces, 1] = 0
        for cell in range(len(KINDS)):
            halves[:, cell] = _least(halves[:, cell], self._orders[cell], len(self.operations))
        return result

    def build(self, genotype: Genotype) -> nn.Module:
        """The network: ``(n, in_channels, resolution, resolution)`` images to ``(n, classes)`` logits."""
        return self.network(self.canonical(self.from_json([genotype]))[0])

    def network(self, row: Population) -> Network:
        """The network of a row as it is written, not of its canonical form."""
        stem = stem_conv(self.in_channels, self.stem_filters, strided=self.stem == "imagenet")
        return Network(stem, self.stem_filters, self.sites, self.plans(row), self.classes)

    def plans(self, row: Population) -> tuple[CellPlan, CellPlan]:
        """The normal and the reduction cell of a row."""
        none = self.operations.index(NONE) if NONE in self.operations else -1
        normal, reduction = (
            self._plan(cell, kind, none)
            for cell, kind in zip(row.reshape(len(KINDS), self.blocks, 2, 2), KINDS, strict=True)
        )
        return normal, reduction

    def describe(self, genotype: Genotype) -> list[Layer]:
        extents = {"sep_conv": 0.5, "conv": 0.7, "dilated_conv": 0.7, "dil_sep_conv": 0.3, "conv_1x7": 0.7}
        plans = self.plans(self.canonical(self.from_json([genotype]))[0])
        size = self.resolution if self.stem == "cifar" else -(-((self.resolution - 1) // 2) // 4)
        rows = []
        for kind, plan, width, extent in zip(
            KINDS, plans, (self.filters, 2 * self.filters), (size, -(-size // 2)), strict=True
        ):
            for number, block in enumerate(plan.blocks, start=INPUTS):
                sizes = [0.0 if op == NONE else extents.get(op.rpartition("_")[0], 0.1) for _, op in block]
                rows.append(
                    Layer(
                        name=f"{kind}.{number}",
                        kind=" + ".join(f"{op}({state})" for state, op in block),
                        shape=(width, extent, extent),
                        size=sum(sizes) if number in plan.live else 0.0,
                        details={"inputs": [state for state, _ in block], "output": number in plan.outputs},
                    )
                )
            shape = (width * len(plan.outputs), extent, extent)
            joined = ", ".join(map(str, plan.outputs))
            rows.append(Layer(name=f"{kind}.output", kind=f"concat({joined})", shape=shape, size=0.05))
        return rows

    def _plan(self, cell: Population, kind: str, none: int) -> CellPlan:
        blocks = [((int(a), self.operations[i]), (int(b), self.operations[j])) for (a, i), (b, j) in cell.tolist()]
        live = np.flatnonzero(self._live(cell[np.newaxis], kind, none)[0]).tolist()
        outputs = np.flatnonzero(self._outputs(cell[np.newaxis], kind, none)[0]).tolist()
        return CellPlan(tuple(blocks), tuple(outputs), frozenset(live))

    def _outputs(self, cells: Population, kind: str, none: int) -> npt.NDArray[np.bool_]:
        """``(n, states)``: the states that make the output of cells ``(n, blocks, 2, 2)``."""
        outputs = np.zeros((len(cells), INPUTS + self.blocks), dtype=bool)
        if self.combine == "unused":
            outputs[:] = True
            rows, blocks, terms = np.nonzero(cells[..., 1] != none)
            outputs[rows, cells[rows, blocks, terms, 0]] = False
        else:
            outputs[:, range(INPUTS, INPUTS + self.blocks) if self.combine == "all" else self.combine[kind]] = True
        return outputs

    def _live(self, cells: Population, kind: str, none: int) -> npt.NDArray[np.bool_]:
        """``(n, states)``: the states that the outputs depend on."""
        live = self._outputs(cells, kind, none)
        every = np.arange(len(cells))
        for block in reversed(range(self.blocks)):
            for term in range(2):
                used = live[:, INPUTS + block] & (cells[:, block, term, 1] != none)
                live[every, cells[:, block, term, 0]] |= used
        return live

    def _block_orders(self, kind: str) -> list[npt.NDArray[np.int16]]:
        """New positions of the blocks, for each of their orders that leaves the output states where they are."""
        every = itertools.permutations(range(self.blocks))
        if isinstance(self.combine, str):
            return [np.array(order, dtype=np.int16) for order in every]
        given = {state - INPUTS for state in self.combine[kind] if state >= INPUTS}
        return [np.array(order, dtype=np.int16) for order in every if {order[block] for block in given} == given]

    def _sites(self) -> list[Site]:
        sites: list[Site] = []
        history = [0, 0]

        def place(reduction: bool, width: int, previous: int) -> None:
            raw = self.stem == "imagenet" and not sites
            sites.append(Site(reduction, previous, history[-1], width, raw))
            history.append(len(sites))

        if self.stem == "imagenet":
            for part in (4, 2):
                place(True, self.filters // part, history[-2])
        for stage in range(self.stages):
            width = self.filters * 2**stage
            previous = history[-2]
            if stage:
                place(True, width, previous)
            for cell in range(self.cells):
                keeps = stage and not cell and self.skip_reduction_input
                place(False, width, previous if keeps else history[-2])
        return sites


def _least(cells: Population, orders: Sequence[npt.NDArray[np.int16]], operations: int) -> Population:
    """The lexicographically least form of cells ``(n, blocks, 2, 2)`` under orders of their blocks and terms."""
    count, blocks = cells.shape[:2]
    best, best_codes = cells, None
    base = (INPUTS + blocks) * operations
    for order in orders:
        labels = np.concatenate([np.arange(INPUTS, dtype=np.int16), INPUTS + order])
        moved = np.empty_like(cells)
        moved[:, order] = cells
        moved[..., 0] = labels[moved[..., 0]]
        valid = (moved[..., 0] < INPUTS + np.arange(blocks)[:, np.newaxis]).all(axis=(1, 2))
        terms = moved[..., 0].astype(np.int64) * operations + moved[..., 1]
        swap = terms[..., 0] > terms[..., 1]
        moved[swap] = moved[swap][:, ::-1]
        codes = terms.max(axis=2) * base + terms.min(axis=2)
        if best_codes is None:
            # The first order is the given one, which is valid.
            best, best_codes = moved, codes
            continue
        differs = codes != best_codes
        first = differs.argmax(axis=1)
        every = np.arange(count)
        better = valid & differs.any(axis=1) & (codes[every, first] < best_codes[every, first])
        best[better], best_codes[better] = moved[better], codes[better]
    return best


def _operations(given: str | list[str]) -> tuple[str, ...]:
    names = PRESETS.get(given) if isinstance(given, str) else tuple(given)
    if names is None:
        raise InputError(
            "space.operations", given, "is no list and no known name of one", suggestion(str(given), PRESETS)
        )
    if not names or len(set(names)) != len(names):
        raise InputError("space.operations", list(names), "is empty or repeats a name", "Give each operation once.")
    for i, name in enumerate(names):
        if name not in OPERATIONS:
            raise InputError(f"space.operations[{i}]", name, "is no operation", suggestion(str(name), OPERATIONS))
    return names


def _combine(
    given: Literal["unused", "all"] | dict[str, list[int]], blocks: int
) -> Literal["unused", "all"] | dict[str, list[int]]:
    remedy = f"Give 'unused', 'all', or lists of states from 0 to {blocks + 1} for 'normal' and 'reduction'."
    if isinstance(given, str):
        if given not in ("unused", "all"):
            raise InputError("space.combine", given, "is unknown", remedy)
        return given
    if set(given) != set(KINDS):
        raise InputError("space.combine", given, "does not name both cells", remedy)
    for kind, states in given.items():
        inside = all(0 <= state < INPUTS + blocks for state in states)
        if not states or not inside or len(set(states)) != len(states):
            raise InputError(f"space.combine.{kind}", states, "is empty, repeats a state or names none", remedy)
    return {kind: sorted(given[kind]) for kind in KINDS}
