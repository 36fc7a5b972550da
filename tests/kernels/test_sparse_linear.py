"""Sparse linear layers: packing, the kernels, interpreted, against float64 from the same numbers, what torch sees, and
the modules. bfloat16 only compiles: it is interpreted wrongly."""

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import GATES, guarded, poisoned, relative_error, worst_error
from torch import Tensor, nn

from archfront.kernels.modules.sparse_linear import BlockSparseLinear, SemiStructuredLinear, SharedPatternLinear
from archfront.kernels.ops import block_sparse_linear as block_ops
from archfront.kernels.ops import shared_pattern_linear as shared_ops
from archfront.kernels.ops.block_sparse_linear import block_sparse_linear
from archfront.kernels.ops.shared_pattern_linear import shared_pattern_linear
from archfront.kernels.reference import sparse_linear as reference
from archfront.kernels.reference.sparse_linear import (
    LAYOUT_VERSION,
    Blocks,
    Shared,
    pack_blocks,
    pack_shared,
    shared_mask,
    unpack_blocks,
    unpack_shared,
)
from archfront.kernels.tuning import Setting

HALF, FULL = torch.float16, torch.float32
OPERATORS = torch.ops.archfront


def inputs(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """With an outlier column and, of more than one, a last row of zeros."""
    x = torch.randn(rows, columns)
    x[:, columns // 3] *= 50
    x[1:][-1:] = 0
    return x.to(dtype)


def block_weight(channels: int, columns: int, block: int, *, share: float = 0.4) -> Tensor:
    """Some blocks are kept, of the first row of blocks none."""
    down, across = reference.block_counts((channels, columns), block)
    kept = torch.rand(down, across) < share
    kept[0] = False
    mask = kept.repeat_interleave(block, 0).repeat_interleave(block, 1)[:channels, :columns]
    return torch.randn(channels, columns) * mask


def shared_weight(channels: int, columns: int, n: int, m: int, tile: int) -> Tensor:
    weight = torch.randn(channels, columns)
    return weight * shared_mask(weight, n, m, tile=tile)


def by_blocks(x: Tensor, packed: Blocks, bias: Tensor | None, channels: int, setting: Setting | None = None) -> Tensor:
    out, strayed = poisoned((len(x), channels), x.dtype)
    operands = [tensor if tensor is None else guarded(tensor)[0] for tensor in (x, *packed, bias)]
    block_ops.run_kernel(*operands, out, setting=setting)  # type: ignore[misc, arg-type]
    assert not strayed()
    return out


def by_shared(x: Tensor, packed: Shared, bias: Tensor | None, tile: int, setting: Setting | None = None) -> Tensor:
    out, strayed = poisoned((len(x), len(packed.values)), x.dtype)
    operands = [tensor if tensor is None else guarded(tensor)[0] for tensor in (x, *packed, bias)]
    shared_ops.run_kernel(*operands, out, tile=tile, setting=setting)  # type: ignore[misc, arg-type]
    assert not strayed()
    return out


def assert_close(found: Tensor, exact: Tensor) -> None:
    gate = GATES[found.dtype]
    assert relative_error(found, exact) <= gate
    # Rounding to dtype may take half a unit of the largest number.
    assert worst_error(found, exact) <= gate * max(1.0, float(exact.abs().max() / exact.square().mean().sqrt()))


def tiles(candidates: list[Setting]) -> list[Setting]:
    """Without those that differ in warps and stages alone, which the interpreter knows nothing of."""
    found = [{name: value for name, value in one.items() if not name.startswith("num_")} for one in candidates]
    return [one for place, one in enumerate(found) if one not in found[:place]]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 150), st.integers(1, 150), st.sampled_from(reference.BLOCKS), st.floats(0, 1))
def test_blocks_are_unpacked_as_they_were(channels: int, columns: int, block: int, share: float) -> None:
    torch.manual_seed(channels * columns)
    weight = block_weight(channels, columns, block, share=share)
    packed = pack_blocks(weight, block=block)
    assert torch.equal(unpack_blocks(packed, (channels, columns)), weight)
    assert int(packed.offsets[-1]) == len(packed.values) == len(packed.columns)
    assert packed.values.flatten(1).any(1).all()
    assert packed.offsets.dtype == packed.columns.dtype == torch.int32


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 150), st.integers(1, 70), st.sampled_from(reference.TILES), st.sampled_from([(2, 4), (1, 4), (3, 8)])
)
def test_shared_patterns_are_unpacked_as_they_were(
    channels: int, columns: int, tile: int, pattern: tuple[int, int]
) -> None:
    torch.manual_seed(channels * columns)
    n, m = pattern
    weight = shared_weight(channels, columns, n, m, tile)
    # A group with fewer columns than there may be.
    weight[:, :m] = 0
    packed = pack_shared(weight, n=n, m=m, tile=tile)
    assert torch.equal(unpack_shared(packed, columns, tile=tile), weight)
    assert packed.values.shape == (channels, -(-columns // m * n // 16) * 16)
    assert (packed.indices.diff() > 0).all()
    assert packed.indices.dtype == torch.int32


def test_a_mask_takes_what_it_does_not_have_for_zero() -> None:
    torch.manual_seed(0)
    weight = torch.randn(70, 100)
    mask = torch.rand(70, 100) < 0.5
    mask[:32, 32:64] = False
    weight[~mask] = torch.nan
    packed = pack_blocks(weight, mask, block=32)
    assert len(packed.values) == 3 * 4 - 1
    assert torch.equal(unpack_blocks(packed, (70, 100)), weight.nan_to_num(0.0))
    shared = shared_mask(torch.randn(70, 100), 2, 4, tile=64)
    assert (shared.reshape(70, 25, 4).sum(2) == 2).all()
    assert torch.equal(shared[0].expand(64, -1), shared[:64])
    found = unpack_shared(pack_shared(torch.ones(70, 100), shared, n=2, m=4, tile=64), 100, tile=64)
    assert torch.equal(found, shared.float())


def test_the_largest_columns_are_kept_and_the_lowest_where_they_tie() -> None:
    weight = torch.ones(64, 8)
    weight[3, 2] = 5
    mask = shared_mask(weight, 2, 4, tile=64)
    assert mask[0].tolist() == [True, False, True, False, True, True, False, False]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pack_blocks(torch.ones(4, 4), block=16), "block: 16 is not served; 32 or 64 is"),
        (lambda: pack_blocks(torch.ones(4), block=32), r"weight.shape: \(4,\) is not served; \(n, k\)"),
        (lambda: pack_blocks(torch.ones(4, 4), torch.ones(4, 4), block=32), r"mask: torch.float32 \(4, 4\)"),
        (lambda: pack_blocks(torch.ones(4, 4), torch.ones(1, 1).bool(), block=32), r"mask: torch.bool \(1, 1\)"),
        (lambda: pack_shared(torch.ones(4, 4), n=5, m=4, tile=64), "n, m: 5 of 4 is not served"),
        (lambda: pack_shared(torch.ones(4, 4), n=2, m=4, tile=32), "tile: 32 is not served; 64 or 128 is"),
        (lambda: shared_mask(torch.ones(4, 4), 0, 4, tile=64), "n, m: 0 of 4"),
        (
            lambda: pack_shared(torch.cat((torch.zeros(64, 8), torch.eye(3, 8).roll(4, 1))), n=2, m=4, tile=64),
            "weight: 3 of 4 columns used by channels from 64 and columns from 4 is not served; 2 of 4 shared is",
        ),
        (
            lambda: unpack_blocks(pack_blocks(torch.ones(4, 4), block=32), (4, 4), version=9),
            "layout version: 9 is not served; 1 is",
        ),
        (
            lambda: unpack_shared(pack_shared(torch.eye(2, 4), n=2, m=4, tile=64), 4, tile=64, version=0),
            "layout version: 0",
        ),
    ],
)
def test_weights_that_are_not_served_are_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("dtype", [FULL, HALF])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("rows", "channels", "columns", "block"), [(1, 130, 200, 32), (17, 70, 256, 64), (70, 161, 99, 32)]
)
def test_block_sparse_linear(
    rows: int, channels: int, columns: int, block: int, bias: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    x, weight = inputs(rows, columns, dtype), block_weight(channels, columns, block).to(dtype)
    shift = torch.randn(channels).to(dtype) if bias else None
    exact = x.double() @ weight.double().T + (0 if shift is None else shift.double())
    packed = pack_blocks(weight, block=block)
    out = by_blocks(x, packed, shift, channels)
    assert_close(out, exact)
    assert torch.equal(out, by_blocks(x, packed, shift, channels))
    assert_close(reference.block_sparse_linear(x, *packed, shift, channels=channels), exact)
    if shift is None:
        assert not out[:, :block].any()


@pytest.mark.parametrize("rows", [9, 100])
def test_block_sparse_linear_under_every_setting(rows: int) -> None:
    torch.manual_seed(0)
    x, weight, bias = inputs(rows, 700, FULL), block_weight(90, 700, 32), torch.randn(90)
    packed = pack_blocks(weight, block=32)
    exact = x.double() @ weight.double().T + bias.double()
    for setting in [*tiles(block_ops.candidates(rows, 90, len(packed.values), 32)), {"SPLIT": 16}]:
        whole = block_ops.default_setting(rows, 90, len(packed.values), 32) | setting
        assert_close(by_blocks(x, packed, bias, 90, whole), exact)


def test_few_rows_of_a_large_layer_are_cut_into_pieces() -> None:
    assert block_ops.default_setting(1, 4096, 64 * 64 // 4, 64)["SPLIT"] == 4
    assert block_ops.default_setting(1000, 4096, 64 * 64 // 4, 64)["SPLIT"] == 1


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_no_blocks_and_all_blocks(share: float) -> None:
    torch.manual_seed(0)
    x, bias = inputs(5, 64, FULL), torch.randn(40)
    weight = torch.randn(40, 64) * share
    packed = pack_blocks(weight, block=32)
    assert len(packed.values) == 4 * share
    assert_close(by_blocks(x, packed, bias, 40), x.double() @ weight.double().T + bias.double())
    assert by_blocks(x[:0], packed, bias, 40).shape == (0, 40)


@pytest.mark.parametrize("dtype", [FULL, HALF])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("rows", "channels", "columns", "tile", "pattern"),
    [(1, 200, 130, 128, (2, 4)), (17, 70, 256, 64, (1, 4)), (70, 129, 51, 64, (3, 8)), (3, 64, 3, 64, (2, 4))],
)
def test_shared_pattern_linear(
    rows: int, channels: int, columns: int, tile: int, pattern: tuple[int, int], bias: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    x, weight = inputs(rows, columns, dtype), shared_weight(channels, columns, *pattern, tile).to(dtype)
    shift = torch.randn(channels).to(dtype) if bias else None
    exact = x.double() @ weight.double().T + (0 if shift is None else shift.double())
    packed = pack_shared(weight, n=pattern[0], m=pattern[1], tile=tile)
    out = by_shared(x, packed, shift, tile)
    assert_close(out, exact)
    assert torch.equal(out, by_shared(x, packed, shift, tile))
    assert_close(reference.shared_pattern_linear(x, *packed, shift, tile=tile), exact)
    assert by_shared(x[:0], packed, shift, tile).shape == (0, channels)


@pytest.mark.parametrize("rows", [9, 100])
def test_shared_pattern_linear_under_every_setting(rows: int) -> None:
    torch.manual_seed(0)
    x, weight, bias = inputs(rows, 150, FULL), shared_weight(140, 150, 2, 4, 128), torch.randn(140)
    packed = pack_shared(weight, n=2, m=4, tile=128)
    exact = x.double() @ weight.double().T + bias.double()
    for setting in [*tiles(shared_ops.candidates(rows, 140, 128)), {"BLOCK_N": 128}]:
        whole = shared_ops.default_setting(rows, 140, 128) | setting
        assert_close(by_shared(x, packed, bias, 128, whole), exact)


def calls(rows: int) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]]:
    """Each operator on ``(rows, 40)`` with 70 channels: the public function, what it is given and its settings."""
    torch.manual_seed(0)
    x, bias = torch.randn(rows, 40).half(), torch.randn(70).half()
    blocks = pack_blocks(block_weight(70, 40, 32).half(), block=32)
    shared = pack_shared(shared_weight(70, 40, 2, 4, 64).half(), n=2, m=4, tile=64)
    return {
        "block_sparse_linear": (block_sparse_linear, (x, *blocks, bias), {"channels": 70}),
        "shared_pattern_linear": (shared_pattern_linear, (x, *shared, bias), {"tile": 64}),
    }


NAMES = sorted(calls(1))


@pytest.mark.parametrize("rows", [0, 5])
@pytest.mark.parametrize("name", NAMES)
def test_torch_accepts_the_operators(name: str, rows: int) -> None:
    function, given, arguments = calls(rows)[name]
    checks = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    results = torch.library.opcheck(getattr(OPERATORS, name).default, given, arguments, test_utils=checks)
    assert set(results.values()) == {"SUCCESS"}
    computed, shaped = function(*given, **arguments), function(*(t.to("meta") for t in given), **arguments)
    assert (shaped.device.type, shaped.shape, shaped.dtype) == ("meta", computed.shape, computed.dtype)
    assert shaped.stride() == computed.stride()


@pytest.mark.parametrize(
    ("name", "position", "wrong", "message"),
    [
        *((name, 0, torch.zeros(40).half(), r"x.shape: \(40,\) is not served; \(m, k\)") for name in NAMES),
        *((name, 0, torch.zeros(3, 40).double(), "x.dtype: torch.float64") for name in NAMES),
        *((name, 0, torch.zeros(40, 3).half().T, r"x.stride\(\): \(1, 3\) .* \.contiguous\(\)") for name in NAMES),
        *((name, -1, torch.zeros(69).half(), r"bias.shape: \(69,\) .* n = 70") for name in NAMES),
        *((name, -1, torch.zeros(70), "bias.dtype: torch.float32 is not served; torch.float16") for name in NAMES),
        *((name, -1, torch.zeros(70, device="meta").half(), "bias.device: meta is not served; cpu") for name in NAMES),
        (NAMES[0], 1, torch.zeros(2, 16, 16).half(), r"values.shape: \(2, 16, 16\) .* b of 32 or 64"),
        (NAMES[0], 1, torch.zeros(2, 32, 64).half(), r"values.shape: \(2, 32, 64\)"),
        (NAMES[0], 2, torch.zeros(99).int(), r"columns.shape: \(99,\) is not served; \(blocks,\) with "),
        (NAMES[0], 3, torch.zeros(3).int(), r"offsets.shape: \(3,\) is not served; \(4,\), for 70 channels in blocks"),
        (NAMES[0], 3, torch.zeros(4), "offsets.dtype: torch.float32 is not served; torch.int32"),
        (NAMES[1], 1, torch.zeros(70, 20).half(), r"values.shape: \(70, 20\) .* a multiple of 16 kept columns"),
        (NAMES[1], 1, torch.zeros(70, 32), "values.dtype: torch.float32"),
        (NAMES[1], 1, torch.zeros(70, 0).half(), r"values.shape: \(70, 0\)"),
        (NAMES[1], 2, torch.zeros(3, 20).int(), r"indices.shape: \(3, 20\) is not served; \(tiles, kept\) = \(2, 32\)"),
        (NAMES[1], 2, torch.zeros(2, 32).long(), "indices.dtype: torch.int64"),
    ],
)
def test_operands_that_are_not_served_are_refused(name: str, position: int, wrong: Tensor, message: str) -> None:
    function, given, arguments = calls(3)[name]
    changed = list(given)
    changed[position] = wrong
    for call in (function, getattr(OPERATORS, name).default):
        with pytest.raises(ValueError, match=message):
            call(*changed, **arguments)


def test_settings_that_are_not_served_are_refused() -> None:
    function, given, _ = calls(3)["block_sparse_linear"]
    with pytest.raises(ValueError, match="channels: 0 is not served; 1 to 16777216 is"):
        function(*given, channels=0)
    function, given, _ = calls(3)["shared_pattern_linear"]
    with pytest.raises(ValueError, match="tile: 32 is not served; 64 or 128 is"):
        function(*given, tile=32)


@pytest.mark.parametrize("bias", [False, True])
def test_costs_are_those_of_the_tensors(bias: bool) -> None:
    shift = torch.randn(70).half() if bias else None
    _, (x, values, columns, offsets, _), _ = calls(3)["block_sparse_linear"]
    given = (x, values, columns, offsets, shift)
    out = block_sparse_linear(*given, channels=70)
    cost = reference.block_sparse_linear_cost(3, 70, 40, blocks=len(values), block=32, bias=bias, dtype=HALF)
    assert cost.bytes == sum(tensor.nbytes for tensor in (*given, out) if tensor is not None)
    assert cost.operations == 2 * 3 * values.numel() + 3 * 70 * bias
    _, (x, kept, indices, _), _ = calls(3)["shared_pattern_linear"]
    cost = reference.shared_pattern_linear_cost(3, 70, 40, kept=32, tile=64, bias=bias, dtype=HALF)
    assert cost.bytes == sum(tensor.nbytes for tensor in (x, kept, indices, shift, out) if tensor is not None)
    assert cost.operations == 2 * 3 * kept.numel() + 3 * 70 * bias


def test_two_of_four_has_nine_sixteenths_of_the_weights_bytes() -> None:
    cost = reference.semi_structured_cost(0, 4096, 4096, bias=False, dtype=HALF)
    assert cost.bytes == 4096 * 4096 * 2 * 9 // 16
    assert reference.semi_structured_cost(7, 64, 64, bias=True, dtype=HALF).operations == 7 * 64 * 65


def made(kind: str, *, bias: bool = True, dtype: torch.dtype = FULL) -> tuple[Any, Any, Tensor]:
    """A layer, an empty one of its kind, and the weight."""
    torch.manual_seed(0)
    linear = nn.Linear(96, 160, bias=bias, dtype=dtype).requires_grad_(False)
    empty: dict[str, Any] = {"bias": bias, "dtype": dtype}
    if kind == "blocks":
        mask = block_weight(160, 96, 32) != 0
        return BlockSparseLinear.from_linear(linear, mask, block=32), BlockSparseLinear(96, 160, 32, **empty), mask
    mask = shared_mask(linear.weight, 2, 4, tile=64)
    if kind == "shared":
        layer = SharedPatternLinear.from_linear(linear, mask, n=2, m=4, tile=64)
        return layer, SharedPatternLinear(96, 160, 2, 4, 64, **empty), mask
    return SemiStructuredLinear.from_linear(linear, mask), SemiStructuredLinear(96, 160, **empty), mask


KINDS = ("blocks", "shared", "semi")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_layers_are_the_masked_linear_ones(kind: str, bias: bool) -> None:
    layer, empty, mask = made(kind, bias=bias)
    torch.manual_seed(0)
    weight = nn.Linear(96, 160, bias=bias).weight.detach() * mask
    assert torch.equal(layer.dense(), weight)
    x = torch.randn(2, 5, 96)
    y = nn.functional.linear(x, weight, layer.bias)
    torch.testing.assert_close(layer(x), y)
    torch.testing.assert_close(layer(x.transpose(0, 1)), y.transpose(0, 1))
    assert layer(x[:0]).shape == (0, 5, 160)
    assert not list(layer.parameters())
    assert not any(buffer.requires_grad for buffer in layer.buffers())
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    empty.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(empty(x), layer(x))
    assert repr(empty) == repr(layer)
    assert layer.half()(x.half()).dtype == HALF
    assert layer.to("meta").dense().device.type == "meta"


@pytest.mark.parametrize("kind", KINDS)
def test_layers_compile_and_export(kind: str) -> None:
    layer, _, _ = made(kind)
    x = torch.randn(2, 5, 96)
    compiled: Any = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    exported = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("n")},))
    other = torch.randn(7, 5, 96)
    torch.testing.assert_close(exported.module()(other), layer(other))


@pytest.mark.parametrize("kind", KINDS)
def test_states_of_another_layout_and_other_inputs_are_refused(kind: str) -> None:
    layer, empty, _ = made(kind)
    state = layer.state_dict()
    state["layout"] = state["layout"].clone()
    state["layout"][-1] += 1
    with pytest.raises(ValueError, match=r"layout: \[96, 160, .*\] is not served; \[96, 160, "):
        empty.load_state_dict(state)
    state["layout"][0] += 1
    with pytest.raises(ValueError, match=f"layout version: {LAYOUT_VERSION + 1} is not served"):
        empty.load_state_dict(state)
    with pytest.raises(ValueError, match=r"x.shape: \(3, 95\) is not served; \(..., 96\) is"):
        layer(torch.zeros(3, 95))
    pattern = {"n": 2, "m": 4, "tile": 64} if kind == "shared" else {}
    with pytest.raises(ValueError, match=r"bias.shape: \(4,\) is not served; \(n,\) with n = 160 of weight"):
        type(layer).from_dense(layer.dense(), None, torch.zeros(4), **pattern)


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((64, 128), HALF, "weight.device: cpu is not served; cuda"),
        ((64, 128), FULL, "weight.dtype: torch.float32 is not served; torch.float16 or torch.bfloat16"),
        ((48, 128), HALF, r"weight.shape: \(48, 128\) is not served; \(n, k\), multiples of 32 and 64, is"),
        ((64, 96), HALF, r"weight.shape: \(64, 96\)"),
    ],
)
def test_torchs_own_two_of_four_is_refused_where_it_has_no_kernel(
    shape: tuple[int, int], dtype: torch.dtype, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        SemiStructuredLinear.from_dense(torch.zeros(shape, dtype=dtype), backend="sparse")


def test_what_runs_is_by_device_and_choice() -> None:
    weight = torch.zeros(64, 128, dtype=HALF)
    with pytest.raises(ValueError, match="backend: fast is not served; auto or sparse or dense is"):
        SemiStructuredLinear.from_dense(weight, backend="fast")
    with pytest.raises(ValueError, match="weight: more than 2 of 4 neighbouring columns"):
        SemiStructuredLinear.from_dense(torch.ones(64, 128))
    layer = SemiStructuredLinear(128, 64, backend="sparse")
    with pytest.raises(ValueError, match=r"weight\.device: cpu"):
        layer(torch.zeros(3, 128, dtype=HALF))
    assert layer.runs == "sparse"
    assert SemiStructuredLinear(128, 64).runs == "dense"
    assert SemiStructuredLinear(128, 64, device="meta").runs == "sparse"
    assert SemiStructuredLinear(128, 64, device="meta", backend="dense").runs == "dense"
