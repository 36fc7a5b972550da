"""Attention by pattern: lists against masks, the kernel and its twin against float64, the operator around them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import GATES, guarded, poisoned, relative_error, worst_error
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from archfront.kernels.modules.pattern_attention import PatternAttention
from archfront.kernels.ops import pattern_attention as op
from archfront.kernels.ops import pattern_plan, serving
from archfront.kernels.reference import attention_patterns as reference
from archfront.kernels.reference.attention_patterns import (
    Band,
    BlockLists,
    Dense,
    MultiDiagonal,
    Pattern,
    Skip,
    VerticalStripe,
    block_lists,
    listed_masks,
    pattern_attention_cost,
    permutation,
)

OPERATOR = torch.ops.archfront.pattern_attention.default
# All kinds, equal ones apart, one that is skipped, and diagonals both in their order and in that of the tokens.
PATTERNS = (Dense(), Band(3), MultiDiagonal(7, 1), Skip(), VerticalStripe((0, 3, 20)), MultiDiagonal(16, 2, 1), Dense())


def naive_mask(pattern: Pattern, length: int) -> list[list[bool]]:
    """Straight from the patterns' descriptions."""

    def sees(query: int, key: int) -> bool:
        match pattern:
            case Dense():
                return True
            case Band(width):
                return abs(query - key) <= width
            case MultiDiagonal(stride, width, reach):
                most = length if reach is None else reach
                return any(abs(query + k * stride - key) <= width for k in range(-most, most + 1))
            case VerticalStripe(columns):
                return key in columns
        return False

    return [[sees(query, key) for key in range(length)] for query in range(length)]


def truth(
    q: Tensor, k: Tensor, v: Tensor, patterns: Sequence[Pattern], size: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """In float64, a query at a time, over the allowed keys alone."""
    q, k, v = q.double(), k.double(), v.double()
    out = torch.zeros(q.shape, dtype=torch.float64)
    length = q.shape[2]
    for head, pattern in enumerate(patterns):
        mask = naive_mask(pattern, length)
        for query in range(length):
            keys = [key for key in range(length) if mask[query][key]]
            if not keys:
                continue
            logits = torch.einsum("bd,bkd->bk", q[:, head, query], k[:, head, keys])
            logits = logits * (q.shape[-1] ** -0.5 if scale is None else scale)
            if size is not None:
                logits += size[:, keys].double().log()
            out[:, head, query] = torch.einsum("bk,bkd->bd", logits.softmax(-1), v[:, head, keys])
    return out


def operands(shape: tuple[int, ...] = (1, 7, 40, 32), dtype: Any = torch.float32) -> list[Tensor]:
    return [torch.randn(shape).to(dtype) for _ in range(3)]


def by_kernel(
    given: Sequence[Tensor], patterns: Sequence[Pattern], size: Tensor | None = None, block: tuple[int, int] = (16, 16)
) -> Tensor:
    """The interpreted kernel amid poison, with small blocks."""
    q, k, v = (guarded(tensor)[0] for tensor in given)
    sizes = None if size is None else guarded(size)[0]
    out, strayed = poisoned(tuple(q.shape), q.dtype)
    lists = block_lists(patterns, q.shape[2], *block)
    op.run_kernel(q, k, v, sizes, out, lists, scale=q.shape[-1] ** -0.5, warps=4, stages=2)
    assert not strayed()
    return out


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert relative_error(found, expected) <= GATES[found.dtype]
    assert worst_error(found, expected) <= 10 * GATES[found.dtype]


numbers = st.integers(0, 50)
PATTERN = st.one_of(
    st.builds(Dense),
    st.builds(Skip),
    st.builds(Band, numbers),
    st.builds(MultiDiagonal, st.integers(1, 60), st.integers(0, 9), st.none() | st.integers(0, 4)),
    st.builds(lambda columns: VerticalStripe(tuple(sorted(columns))), st.sets(st.integers(0, 8), min_size=1)),
)


@given(st.lists(PATTERN, min_size=1, max_size=4), st.integers(9, 40), st.sampled_from([4, 8, 16]), st.integers(3, 16))
@settings(max_examples=60, deadline=None)
def test_lists_say_what_the_patterns_say(patterns: list[Pattern], length: int, block_m: int, block_n: int) -> None:
    lists = block_lists(patterns, length, block_m, block_n)
    found = {int(head): mask for heads, mask in listed_masks(lists, length) for head in heads}
    assert sorted(lists.heads.tolist()) == list(range(len(patterns)))
    for head, pattern in enumerate(patterns):
        mask = torch.tensor(naive_mask(pattern, length))
        assert torch.equal(pattern.mask(length), mask)
        assert torch.equal(found[head], mask) if head in found else isinstance(pattern, Skip)
        assert pattern.pairs(length) == mask.sum()
        assert pattern.keys(length) == (length if not isinstance(pattern, VerticalStripe | Skip) else mask.any(0).sum())


@given(PATTERN.filter(lambda p: not isinstance(p, Skip)), st.integers(9, 70), st.sampled_from([4, 16]))
@settings(max_examples=60, deadline=None)
def test_each_block_is_listed_once_if_anything_in_it_is_allowed(pattern: Pattern, length: int, block: int) -> None:
    lists = block_lists([pattern], length, block, block)
    mask = torch.tensor(naive_mask(pattern, length))
    if lists.groups[5] >= 0:
        order = lists.order.long()
        assert sorted(order.tolist()) == list(range(length))
        mask = mask[order][:, order]
    for number, rows in enumerate(mask.split(block)):
        start, end = lists.starts[number : number + 2].tolist()
        middle = start + int(lists.partial[number])
        # The last block is full of what there is only if no place in it is beyond the end.
        kinds = [bool(tile.all()) and tile.shape[1] == block for tile in rows.split(block, 1) if tile.any()]
        columns = [column for column, tile in enumerate(rows.split(block, 1)) if tile.any()]
        partial = [column for column, full in zip(columns, kinds, strict=True) if not full]
        assert lists.indices[start:middle].tolist() == partial
        assert lists.indices[middle:end].tolist() == [column for column in columns if column not in partial]


def test_equal_patterns_share_lists_and_orders_are_taken_where_they_help() -> None:
    lists = block_lists([Dense(), Band(1), Dense(), Skip(), MultiDiagonal(32)], 256, 16, 16)
    assert lists.heads.tolist() == [0, 2, 1, 4, 3]
    assert lists.groups[::6] == (2, 1, 1)
    # 8 tokens a residue: two residues in a block of 16, so one block of keys for each of queries and not 8.
    assert (lists.starts[-17:].diff() == 1).all()
    assert lists.groups[5::6] == (-1, -1, 0)
    # The main diagonal alone is in as many blocks either way, and needs no order.
    assert block_lists([MultiDiagonal(16, 0, 0)], 256, 16, 16).groups[5] == -1
    assert block_lists([VerticalStripe(tuple(range(0, 256, 16)))], 256, 16, 16).indices.tolist() == [0] * 16


def test_the_permutation_makes_diagonals_blocks_and_has_an_inverse() -> None:
    order = permutation(5, 20)
    mask = MultiDiagonal(5).mask(20)[order][:, order]
    assert torch.equal(mask, torch.block_diag(*[torch.ones(4, 4)] * 5).bool())
    tokens = torch.arange(20) * 3
    assert torch.equal(tokens[order][torch.argsort(order)], tokens)
    assert permutation(4, 6).tolist() == [0, 4, 1, 5, 2, 3]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Band(-1), "Band.width: -1 must be at least 0"),
        (lambda: MultiDiagonal(0), "MultiDiagonal.stride: 0 must be at least 1"),
        (lambda: MultiDiagonal(1, -1), "MultiDiagonal.width: -1"),
        (lambda: MultiDiagonal(1, 0, -1), "MultiDiagonal.reach: -1"),
        (lambda: VerticalStripe(()), r"VerticalStripe.columns: \(\) must be some"),
        (lambda: VerticalStripe((3, 1)), "ascending"),
        (lambda: VerticalStripe((1, 9)).mask(9), "VerticalStripe.columns: 9 must be below the length, 9"),
        (lambda: block_lists([VerticalStripe((9,))], 9, 16, 16), "must be below the length"),
    ],
)
def test_patterns_that_are_none_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("sized", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_kernel_and_its_twin_are_right(dtype: torch.dtype, sized: bool) -> None:
    torch.manual_seed(0)
    given = operands((2, 7, 37, 32), dtype)
    size = torch.randint(1, 5, (2, 37)).float() if sized else None
    expected = truth(*given, PATTERNS, size)
    assert_close(by_kernel(given, PATTERNS, size), expected)
    assert_close(reference.pattern_attention(*given, PATTERNS, size), expected)
    assert_close(op.pattern_attention(*given, PATTERNS, size), expected)


# DeiT's 197 tokens with its class token's remainder, of which only a few heads' worth is interpreted; one token;
# lengths around a block's; blocks of other shapes; all widths.
@pytest.mark.parametrize(
    ("length", "width", "block", "patterns"),
    [
        (197, 64, (64, 64), [MultiDiagonal(14, 1), Band(20)]),
        (1, 32, (16, 16), [Dense(), MultiDiagonal(3), VerticalStripe((0,)), Skip()]),
        (16, 32, (16, 16), [Dense(), Band(0)]),
        (33, 128, (32, 16), [Dense(), MultiDiagonal(8, 0, 2), VerticalStripe((1, 32))]),
        (31, 64, (16, 32), [Band(2), MultiDiagonal(40, 3)]),
    ],
)
def test_lengths_widths_and_blocks(length: int, width: int, block: tuple[int, int], patterns: list[Pattern]) -> None:
    torch.manual_seed(1)
    given = operands((1, len(patterns), length, width), torch.float16)
    assert_close(by_kernel(given, patterns, block=block), truth(*given, patterns))


def test_an_empty_batch_and_heads_that_are_all_skipped() -> None:
    given = operands((0, 2, 9, 32))
    assert by_kernel(given, [Dense(), Skip()]).shape == (0, 2, 9, 32)
    assert op.pattern_attention(*given, [Dense(), Skip()]).shape == (0, 2, 9, 32)
    assert (by_kernel(operands((1, 2, 9, 32)), [Skip(), Skip()]) == 0).all()
    assert (op.pattern_attention(*operands((1, 2, 9, 32)), [Skip(), Skip()]) == 0).all()


def test_queries_that_see_nothing_get_zero() -> None:
    """Keys of size 0 are not seen: here all of those that a band leaves to the first queries."""
    given = operands((1, 2, 40, 32))
    size = torch.ones(1, 40)
    size[:, :24] = 0
    patterns = [Band(3), Dense()]
    for found in (by_kernel(given, patterns, size), op.pattern_attention(*given, patterns, size)):
        assert (found[0, 0, :21] == 0).all()
        assert found.isfinite().all()
        assert (found[0, 0, 21:] != 0).all()
        assert_close(found[:, 1:], truth(*(t[:, 1:] for t in given), [Dense()], size))


def test_outliers_and_nan_stay_where_they_are() -> None:
    torch.manual_seed(2)
    q, k, v = operands((1, 2, 40, 32), torch.float16)
    for tensor in (q, k, v):
        tensor[..., 5] *= 50
    patterns = [Dense(), MultiDiagonal(7, 1)]
    assert_close(by_kernel((q, k, v), patterns), truth(q, k, v, patterns))
    q[0, 0, 3] = torch.nan
    found = by_kernel((q, k, v), patterns)
    assert found[0, 0, 3].isnan().all()
    assert found.isnan().sum() == 32


def test_a_key_that_is_not_allowed_leaves_no_trace() -> None:
    given = operands((1, 1, 40, 32))
    before = by_kernel(given, [Band(2)])
    given[1][0, 0, 30], given[2][0, 0, 30] = 1e30, 1e30
    after = by_kernel(given, [Band(2)])
    assert torch.equal(before[0, 0, :28], after[0, 0, :28])
    assert torch.equal(before[0, 0, 33:], after[0, 0, 33:])


def test_the_same_inputs_give_the_same_bits() -> None:
    given = operands(dtype=torch.float16)
    assert torch.equal(by_kernel(given, PATTERNS), by_kernel(given, PATTERNS))


def test_sizes_are_as_if_tokens_were_repeated() -> None:
    """What proportional attention is for: n equal keys and one of size n."""
    q, k, v = operands((1, 1, 4, 32))
    times = torch.tensor([1, 3, 2, 1])
    repeated = op.pattern_attention(*(t.repeat_interleave(times, 2) for t in (q, k, v)), [Dense()])
    once = by_kernel((q, k, v), [Dense()], times[None].float())
    torch.testing.assert_close(repeated[:, :, [0, 1, 4, 6]], once)


def test_views_of_a_fused_projection_are_read_where_they_are() -> None:
    qkv = torch.randn(2, 20, 3, 2, 32)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    patterns = [Dense(), MultiDiagonal(5, 1)]
    expected = truth(q, k, v, patterns)
    memory = torch.full((2, 20, 2, 32), torch.nan)
    out = memory.transpose(1, 2)
    op.run_kernel(q, k, v, None, out, block_lists(patterns, 20, 16, 16), scale=32**-0.5, warps=4, stages=2)
    assert_close(out, expected)
    found = op.pattern_attention(q, k, v, patterns)
    assert_close(found, expected)
    # So the projection that follows needs no copy.
    assert found.transpose(1, 2).is_contiguous()


def listed(given: Sequence[Tensor], patterns: Sequence[Pattern], size: Tensor | None = None) -> tuple[Any, ...]:
    """The operator's arguments."""
    made = pattern_plan.plan(patterns, given[0].shape[2], given[0].shape[3], given[0].dtype, given[0].device)
    lists = made.lists
    return (*given, size, *lists[:5], list(lists.groups), *lists[6:], *made[1:], 0.25)


@pytest.mark.parametrize(("shape", "sized"), [((2, 7, 21, 32), True), ((0, 7, 21, 64), False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_torch_accepts_the_operator(shape: tuple[int, ...], sized: bool, dtype: torch.dtype) -> None:
    size = torch.ones(shape[0], shape[2]) if sized else None
    results = torch.library.opcheck(OPERATOR, listed(operands(shape, dtype), PATTERNS, size))
    assert set(results.values()) == {"SUCCESS"}


def test_shapes_are_known_without_computing() -> None:
    meta = [torch.empty(3, 7, 40, 64, dtype=torch.bfloat16, device="meta") for _ in range(3)]
    out = op.pattern_attention(*meta, PATTERNS)
    assert (out.shape, out.dtype, out.device.type) == ((3, 7, 40, 64), torch.bfloat16, "meta")


class Attention(nn.Module):
    """As ViT's: a fused projection before, another after."""

    def __init__(self, patterns: Sequence[Pattern], length: int) -> None:
        super().__init__()
        width = 32 * len(patterns)
        self.heads = len(patterns)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.attention = PatternAttention(patterns, length, 32)

    def forward(self, x: Tensor, size: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, 32)).permute(2, 0, 3, 1, 4).unbind(0)
        projected: Tensor = self.proj(self.attention(q, k, v, size).transpose(1, 2).flatten(2))
        return projected


def test_a_block_of_it_is_torchs_where_dense_and_compiles_and_exports() -> None:
    torch.manual_seed(3)
    dense = Attention([Dense()] * 2, 17).eval().requires_grad_(False)
    x = torch.randn(3, 17, 64)
    q, k, v = dense.qkv(x).unflatten(2, (3, 2, 32)).permute(2, 0, 3, 1, 4).unbind(0)
    plain = dense.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(dense(x), plain, rtol=1e-5, atol=1e-5)
    assert "Dense()" in repr(dense)
    assert not [name for name in dense.state_dict() if "attention" in name]

    block = Attention([Dense(), MultiDiagonal(4, 1), Skip()], 17).eval().requires_grad_(False)
    two = nn.Sequential(block, Attention([Band(2), Band(2), VerticalStripe((0, 9))], 17).requires_grad_(False))
    x = torch.randn(3, 17, 96)
    torch.testing.assert_close(torch.compile(two, fullgraph=True, backend="aot_eager")(x), two(x))
    exported = torch.export.export(two, (x,), dynamic_shapes=({0: torch.export.Dim("n")},))
    assert [node.target for node in exported.graph.nodes].count(OPERATOR) == 2
    more = torch.randn(5, 17, 96)
    torch.testing.assert_close(exported.module()(more), two(more))


class Called(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return op.pattern_attention(q, k, v, (Dense(), MultiDiagonal(3, 0)))


def test_the_function_exports_with_lists_that_were_not_made_before() -> None:
    pattern_plan.kept_plan.cache_clear()
    given = operands((2, 2, 19, 32))
    exported = torch.export.export(Called(), tuple(given))
    torch.testing.assert_close(exported.module()(*given), Called()(*given))


@pytest.mark.parametrize(
    ("position", "wrong", "message"),
    [
        (0, torch.zeros(2, 9, 32), r"q.shape: \(2, 9, 32\) is not served; \(b, h, l, d\)"),
        (0, torch.zeros(2, 2, 0, 32), r"q.shape: \(2, 2, 0, 32\)"),
        (0, torch.zeros(2, 2, 9, 48), r"q.shape: .* with d 32, 64, 128 is"),
        (0, torch.zeros(1, 1, 2**21, 32, device="meta"), "with l below 2097152 is"),
        (0, torch.zeros(2, 2, 9, 32).double(), "q.dtype: torch.float64 is not served; torch.float32 or torch.float16"),
        (1, torch.zeros(2, 2, 8, 32), r"k.shape: \(2, 2, 8, 32\) .* that of q"),
        (2, torch.zeros(2, 1, 9, 32), r"v.shape: \(2, 1, 9, 32\)"),
        (1, torch.zeros(2, 2, 9, 32).half(), "k.dtype: torch.float16 is not served; torch.float32 is"),
        (2, torch.zeros(2, 2, 9, 32, device="meta"), "v.device: meta is not served; cpu"),
        (0, torch.zeros(2, 2, 32, 9).mT, r"q.stride\(\): \(576, 288, 1, 9\) is not served; a last stride of 1"),
        (2, torch.zeros(2, 2, 9, 64)[..., ::2], r"v.stride\(\): \(1152, 576, 64, 2\)"),
        (3, torch.zeros(2, 8), r"size.shape: \(2, 8\) .* \(b, l\) = \(2, 9\) of q"),
        (3, torch.zeros(2, 9).long(), "size.dtype: torch.int64 is not served; torch.float32 is"),
        (3, torch.zeros(9, 2).T, r"size.stride\(\): \(1, 2\)"),
        (3, torch.zeros(2, 9, device="meta"), "size.device: meta"),
    ],
)
def test_what_is_not_served_is_refused(position: int, wrong: Tensor, message: str) -> None:
    given: list[Any] = [*operands((2, 2, 9, 32)), torch.ones(2, 9)]
    arguments = list(listed(given[:3], [Dense()] * 2, given[3]))
    given[position] = arguments[position] = wrong
    with pytest.raises(ValueError, match=message):
        op.pattern_attention(*given[:3], [Dense()] * 2, given[3])
    with pytest.raises(ValueError, match=message):
        OPERATOR(*arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": torch.zeros(3).int()}, r"heads.shape: \(3,\) .* h = 2 of q"),
        ({"starts": torch.zeros(3).int()}, r"starts.shape: \(3,\)"),
        ({"partial": torch.zeros(4).int()}, r"partial.shape: \(4,\)"),
        ({"order": torch.zeros(9).int()}, r"order.shape: \(9,\) is not served; 0 orders"),
        ({"indices": torch.zeros(1)}, "indices.dtype: torch.float32 is not served; torch.int32"),
        ({"indices": torch.zeros(1, device="meta").int()}, "indices.device: meta"),
        ({"groups": (3, 0, 1, 0, 0, -1)}, r"groups: \(3, 0, 1, 0, 0, -1\) is not served; six numbers"),
    ],
)
def test_lists_of_another_shape_are_refused(change: dict[str, Any], message: str) -> None:
    given = operands((2, 2, 9, 32))
    made = pattern_plan.plan([Dense()] * 2, 9, 32, torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match=message):
        op.attend(*given, made._replace(lists=made.lists._replace(**change)))


def test_patterns_for_other_heads_and_devices_without_a_kernel_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"len\(patterns\): 1 is not served; h = 2 of q is"):
        op.pattern_attention(*operands((2, 2, 9, 32)), [Dense()])
    # No device but these is at hand everywhere, so one of them leaves the list.
    monkeypatch.setattr(serving, "DEVICES", ("cuda", "meta"))
    with pytest.raises(ValueError, match=r"x.device: cpu is not served; cuda or meta is"):
        op.pattern_attention(*operands((2, 2, 9, 32)), [Dense()] * 2)


def test_settings_of_every_kind_are_blocks_that_the_kernel_takes() -> None:
    for width in op.WIDTHS:
        for diagonals in (False, True):
            for dtype in pattern_plan.DTYPES:
                tried = pattern_plan.candidates(width, dtype, diagonals)
                assert all(pattern_plan.default_setting(width, n, dtype, diagonals) for n in (197, 4096))
                assert all(min(s["BLOCK_M"], s["BLOCK_N"]) >= 16 for s in tried)
    assert pattern_plan.tuning_key(64, 197, torch.bfloat16, True) == "bf16-d64-l256-diagonals"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_cost_is_that_of_the_tensors_and_of_torchs_count(dtype: torch.dtype) -> None:
    shape = (2, 3, 20, 32)
    given = operands(shape, dtype)
    with FlopCounterMode(display=False) as counter:
        out = reference.pattern_attention(*given, [Dense()] * 3)
    cost = pattern_attention_cost(shape, [Dense()] * 3, dtype=dtype)
    assert cost.operations == counter.get_total_flops() == 4 * math.prod(shape) * 20
    assert cost.bytes == sum(tensor.nbytes for tensor in (*given, out))
    head, row = 2 * 20 * 32 * dtype.itemsize, 2 * 32 * dtype.itemsize
    cost = pattern_attention_cost(shape, [Skip(), VerticalStripe((1, 4)), Band(1)], dtype=dtype, sized=True)
    assert cost.operations == 4 * 2 * 32 * (20 * 2 + 20 * 3 - 2)
    assert cost.bytes == head + (2 * head + 4 * row) + 4 * head + 2 * 20 * 4


def test_lists_are_tensors_of_int32() -> None:
    lists = block_lists([Skip()], 9, 16, 16)
    assert isinstance(lists, BlockLists)
    assert all(tensor.dtype == torch.int32 for tensor in lists[:5])
