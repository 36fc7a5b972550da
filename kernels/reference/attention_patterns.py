"""Attention whose heads each have a pattern of who sees whom: the patterns, lists of blocks made of them, the twin.

The patterns are those of Sparse-vDiT (arXiv 2506.03065): full, skip, diagonal, multi-diagonal and vertical stripe.
A kernel visits, for each block of queries, the listed blocks of keys; the mask is computed in ``partial`` ones alone.
Lists may be of tokens in another order, which the kernel reads through: see ``permutation``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from archfront.kernels.reference.cost import Cost

DENSE, BAND, DIAGONALS, STRIPES = range(4)
"""How a kernel computes the mask of a partial block; see ``Rule``."""


class Rule(NamedTuple):
    """What a kernel must know of a pattern to mask a partial block.

    Attributes:
        kind: ``DENSE``, no key is masked; ``BAND``, query and key are at most ``limit`` apart; ``DIAGONALS``, that,
            and their distance is at most ``width`` from a multiple of ``stride``; ``STRIPES``, the key is among the
            first ``limit`` of the order.
        stride, width, limit: 1, 0 and 0 where the kind does not use them.
    """

    kind: int
    stride: int = 1
    width: int = 0
    limit: int = 0


class Pattern(ABC):
    """Which keys each query of a head sees; tokens are numbered from 0. Equal patterns share lists and a launch."""

    @abstractmethod
    def allowed(self, query: Tensor, key: Tensor) -> Tensor:
        """Bool, of the shape to which the numbers of queries and keys broadcast."""

    @abstractmethod
    def rule(self, length: int) -> Rule: ...

    @abstractmethod
    def pairs(self, length: int) -> int:
        """How many pairs of a query and a key are allowed."""

    def keys(self, length: int) -> int:
        """How many keys any query sees."""
        return length

    def order(self, length: int) -> Tensor | None:
        """An order of the tokens, ``(length,)``, in which the mask may be in fewer blocks; None where none is known."""
        return None

    def mask(self, length: int) -> Tensor:
        """Bool ``(length, length)``, queries x keys.

        Raises:
            ValueError: the pattern names tokens beyond the length.
        """
        token = torch.arange(length)
        return self.allowed(token[:, None], token).expand(length, length)


@dataclass(frozen=True)
class Dense(Pattern):
    """Every key."""

    def allowed(self, query: Tensor, key: Tensor) -> Tensor:
        return torch.ones_like(query - key, dtype=torch.bool)

    def rule(self, length: int) -> Rule:
        return Rule(DENSE)

    def pairs(self, length: int) -> int:
        return length * length


@dataclass(frozen=True)
class Band(Pattern):
    """Keys at most ``width`` before or after the query."""

    width: int

    def __post_init__(self) -> None:
        _at_least("Band.width", self.width, 0)

    def allowed(self, query: Tensor, key: Tensor) -> Tensor:
        return (query - key).abs() <= self.width

    def rule(self, length: int) -> Rule:
        return Rule(BAND, limit=min(self.width, length))

    def pairs(self, length: int) -> int:
        reach = min(self.width, length - 1)
        return length + 2 * sum(length - away for away in range(1, reach + 1))


@dataclass(frozen=True)
class MultiDiagonal(Pattern):
    """Keys at most ``width`` from the query's place ``k * stride`` further, for each whole k, ``|k| <= reach``.

    Of a video with ``stride`` tokens a frame: the same place, and its neighbours, in the frames around.

    Attributes:
        stride: tokens from one diagonal to the next.
        width: tokens that a diagonal reaches to either side.
        reach: diagonals to either side of the main one; None is as many as there are.
    """

    stride: int
    width: int = 0
    reach: int | None = None

    def __post_init__(self) -> None:
        _at_least("MultiDiagonal.stride", self.stride, 1)
        _at_least("MultiDiagonal.width", self.width, 0)
        _at_least("MultiDiagonal.reach", 0 if self.reach is None else self.reach, 0)

    def allowed(self, query: Tensor, key: Tensor) -> Tensor:
        apart = query - key
        near = (apart + self.width) % self.stride <= 2 * self.width
        return near if self.reach is None else near & (apart.abs() <= self.reach * self.stride + self.width)

    def rule(self, length: int) -> Rule:
        limit = length if self.reach is None else min(self.reach * self.stride + self.width, length)
        # Wider or further apart than the sequence is long, a diagonal stays what it is; numbers must fit in int32.
        return Rule(DIAGONALS, min(self.stride, 2 * length), min(self.width, length), limit)

    def pairs(self, length: int) -> int:
        apart = torch.arange(1 - length, length)
        allowed = self.allowed(apart, torch.zeros_like(apart))
        return int(((length - apart.abs()) * allowed).sum())

    def order(self, length: int) -> Tensor | None:
        return permutation(self.stride, length) if 1 < self.stride < length else None


@dataclass(frozen=True)
class VerticalStripe(Pattern):
    """For every query the same keys.

    Attributes:
        columns: their numbers, ascending.
    """

    columns: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.columns or min(self.columns) < 0 or sorted(set(self.columns)) != list(self.columns):
            raise ValueError(f"VerticalStripe.columns: {self.columns} must be some numbers from 0 on, ascending")

    def allowed(self, query: Tensor, key: Tensor) -> Tensor:
        return torch.isin(key, torch.tensor(self.columns, device=key.device)) & Dense().allowed(query, key)

    def rule(self, length: int) -> Rule:
        return Rule(STRIPES, limit=len(self.columns))

    def pairs(self, length: int) -> int:
        return length * len(self.columns)

    def keys(self, length: int) -> int:
        return len(self.columns)

    def order(self, length: int) -> Tensor:
        """The columns first."""
        if self.columns[-1] >= length:
            raise ValueError(f"VerticalStripe.columns: {self.columns[-1]} must be below the length, {length}")
        return torch.argsort((~self.allowed(torch.zeros(1), torch.arange(length))).int(), stable=True)

    def mask(self, length: int) -> Tensor:
        self.order(length)
        return super().mask(length)


@dataclass(frozen=True)
class Skip(Pattern):
    """No key: the head's result is zero, and nothing is launched for it."""

    def allowed(self, query: Tensor, key: Tensor) -> Tensor:
        return ~Dense().allowed(query, key)

    def rule(self, length: int) -> Rule:
        return Rule(BAND, limit=-1)

    def pairs(self, length: int) -> int:
        return 0

    def keys(self, length: int) -> int:
        return 0


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name}: {value} must be at least {least}")


def permutation(stride: int, length: int) -> Tensor:
    """Tokens in the order of their place in a frame of ``stride`` tokens, then of their frame: space-major.

    Diagonals ``stride`` apart become blocks on the main diagonal, as long as there are frames, so that of F frames a
    block of queries meets about one block of keys where it met F. ``tokens[permutation]`` is space-major, and
    ``argsort`` of the permutation leads back; frame-major is the order that frames one after another have. The length
    need be no multiple of the stride.
    """
    return torch.argsort(torch.arange(length) % stride, stable=True)


class BlockLists(NamedTuple):
    """Which blocks of keys each block of queries sees, for groups of heads with equal patterns.

    ``Q = ceil(length / block_m)`` blocks of queries; all tensors are int32.

    Attributes:
        heads: ``(h,)``, group after group, then the heads that are skipped.
        indices: all lists, one after another; in each first the partial blocks, then the full ones.
        starts: ``(groups * (Q + 1),)``, where in ``indices`` each list starts, and where a group's last one ends.
        partial: ``(groups * Q,)``, how many blocks of a list are partial.
        order: orders of tokens, each of ``length``, one after another.
        groups: six numbers each: how many heads, the fields of ``Rule``, and which order, or -1 for none.
        block_m, block_n: queries and keys in a block.
    """

    heads: Tensor
    indices: Tensor
    starts: Tensor
    partial: Tensor
    order: Tensor
    groups: tuple[int, ...]
    block_m: int
    block_n: int

    def to(self, device: torch.device) -> BlockLists:
        moved = {name: getattr(self, name).to(device) for name in self._fields[:5]}
        return self._replace(**moved)


def group_heads(patterns: Sequence[Pattern]) -> dict[Pattern, list[int]]:
    """The heads of each pattern, in the order in which patterns first occur."""
    found: dict[Pattern, list[int]] = {}
    for head, pattern in enumerate(patterns):
        found.setdefault(pattern, []).append(head)
    return found


def block_lists(patterns: Sequence[Pattern], length: int, block_m: int, block_n: int) -> BlockLists:
    """The lists for heads of these patterns, on the CPU.

    A pattern's own order is taken where it leaves fewer blocks than the tokens as they are.
    """
    heads: list[int] = []
    groups: list[int] = []
    indices: list[Tensor] = []
    starts: list[Tensor] = []
    partial: list[Tensor] = []
    orders: list[Tensor] = []
    found = group_heads(patterns)
    listed = 0
    for pattern, members in found.items():
        if isinstance(pattern, Skip):
            continue
        order = pattern.order(length)
        states = _states(pattern, torch.arange(length), block_m, block_n)
        # The rule of stripes is of their order: without it nothing else says which keys are theirs.
        taken = order is not None and pattern.rule(length).kind == STRIPES
        if order is not None:
            ordered = _states(pattern, order, block_m, block_n)
            if taken or int((ordered > 0).sum()) < int((states > 0).sum()):
                states, taken = ordered, True
        counts = (states > 0).sum(1)
        # A stable sort by state leaves partial blocks, then full ones, each ascending.
        sequence = torch.argsort(torch.where(states == 0, 3, states), dim=1, stable=True)
        indices.append(sequence[torch.arange(states.shape[1]) < counts[:, None]])
        starts.append(torch.cat((torch.zeros(1, dtype=torch.int64), counts.cumsum(0))) + listed)
        partial.append((states == 1).sum(1))
        listed += int(counts.sum())
        groups += [len(members), *pattern.rule(length), len(orders) if taken else -1]
        if order is not None and taken:
            orders.append(order)
        heads += members
    heads += [head for pattern, members in found.items() if isinstance(pattern, Skip) for head in members]
    return BlockLists(
        torch.tensor(heads, dtype=torch.int32),
        _joined(indices),
        _joined(starts),
        _joined(partial),
        _joined(orders),
        tuple(groups),
        block_m,
        block_n,
    )


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts).int() if parts else torch.zeros(0, dtype=torch.int32)


def _states(pattern: Pattern, order: Tensor, block_m: int, block_n: int) -> Tensor:
    """For blocks of queries x blocks of keys: 0 nothing allowed, 1 partial, 2 all allowed of those that there are."""
    length = len(order)
    columns = -(-length // block_n)
    rows = []
    # A row of blocks at a time: the whole mask of long sequences would not fit in memory.
    for queries in torch.split(order, block_m):
        allowed = torch.zeros(len(queries), columns * block_n, dtype=torch.bool)
        allowed[:, :length] = pattern.allowed(queries[:, None], order)
        tiles = allowed.view(len(queries), columns, block_n)
        rows.append(tiles.any(2).any(0).int() + tiles.all(2).all(0).int())
    return torch.stack(rows)


def listed_masks(lists: BlockLists, length: int) -> list[tuple[Tensor, Tensor]]:
    """What a kernel makes of lists: for each group its heads, ``(n,)`` int64, and mask, bool ``(length, length)``."""
    result = []
    queries, columns = -(-length // lists.block_m), -(-length // lists.block_n)
    device = lists.indices.device
    seen = 0
    for number in range(len(lists.groups) // 6):
        count, kind, stride, width, limit, ordered = lists.groups[6 * number : 6 * number + 6]
        starts = lists.starts[number * (queries + 1) : (number + 1) * (queries + 1)].long()
        partial = lists.partial[number * queries : (number + 1) * queries]
        row = torch.arange(queries, device=device).repeat_interleave(starts.diff())
        place = torch.arange(len(row), device=device) + starts[0]
        states = torch.zeros(queries, columns, dtype=torch.int32, device=device)
        states[row, lists.indices[place].long()] = torch.where(place - starts[row] < partial[row], 1, 2).int()
        states = states.repeat_interleave(lists.block_m, 0)[:length].repeat_interleave(lists.block_n, 1)[:, :length]
        position = torch.arange(length, device=device)
        token = position if ordered < 0 else lists.order[ordered * length : (ordered + 1) * length].long()
        apart = (token[:, None] - token).abs()
        across = (token[:, None] % stride - token % stride).abs()
        rules = {
            DENSE: torch.ones_like(apart, dtype=torch.bool),
            BAND: apart <= limit,
            DIAGONALS: (apart <= limit) & (torch.minimum(across, stride - across) <= width),
            STRIPES: (position < limit).expand(length, length),
        }
        mask = torch.zeros(length, length, dtype=torch.bool, device=device)
        mask[token[:, None], token] = (states == 2) | ((states == 1) & rules[kind])
        result.append((lists.heads[seen : seen + count].long(), mask))
        seen += count
    return result


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, size: Tensor | None, scale: float) -> Tensor:
    """Softmax attention under a mask ``(l, l)``, in at least float32 and of that dtype; see ``pattern_attention``."""
    wide = torch.promote_types(q.dtype, torch.float32)
    logits = q.to(wide) @ k.to(wide).mT * scale
    if size is not None:
        logits = logits + size.to(wide).log()[:, None, None, :]
    logits = logits.masked_fill(~mask, -torch.inf)
    top = logits.amax(-1, keepdim=True)
    weights = (logits - top.masked_fill(top == -torch.inf, 0)).exp()
    total = weights.sum(-1, keepdim=True)
    return (weights @ v.to(wide)) / total.masked_fill(total == 0, 1)


def pattern_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    patterns: Sequence[Pattern],
    size: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention in which head h sees what ``patterns[h]`` allows; computed in at least float32.

    Args:
        q, k, v: ``(b, h, l, d)``.
        patterns: h of them.
        size: ``(b, l)``, of how many tokens each key is the mean: its logarithm is added to the key's logits
            (proportional attention: Bolya et al., Token Merging, arXiv 2210.09461). A key of size 0 is not seen.
        scale: of the logits; ``d ** -0.5`` where not given.

    Returns:
        ``(b, h, l, d)`` of q's dtype, rounded to it once, at the end; zero for queries that see no key.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    for pattern, heads in group_heads(patterns).items():
        mask = pattern.mask(q.shape[2]).to(q.device)
        out[:, heads] = masked_attention(q[:, heads], k[:, heads], v[:, heads], mask, size, scale).to(q.dtype)
    return out


def pattern_attention_cost(
    shape: tuple[int, int, int, int], patterns: Sequence[Pattern], *, dtype: torch.dtype, sized: bool = False
) -> Cost:
    """The least cost of ``pattern_attention`` on q, k and v of ``shape`` ``(b, h, l, d)``: two products of matrices.

    Exponentials do not count. Of skipped heads only the result is moved, of stripes only their keys.
    """
    batch, _, length, width = shape
    operations = sum(4 * batch * width * pattern.pairs(length) for pattern in patterns)
    # The query's row where there is any, the result's row, and k and v.
    rows = sum(length * (pattern.keys(length) > 0) + length + 2 * pattern.keys(length) for pattern in patterns)
    sizes = 4 * batch * length if sized else 0
    return Cost(operations, batch * width * rows * dtype.itemsize + sizes)
