"""The low-bit linear operators as torch sees them: registered, compiled, exported, refused where not served; and their
costs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from low_bit import int8_operands, packed_operands
from torch import Tensor, nn

from archfront.kernels.ops.dequantise_weight import dequantise_weight
from archfront.kernels.ops.fp8_linear import fp8_linear
from archfront.kernels.ops.int8_linear import int8_linear
from archfront.kernels.ops.quantise_rows import gelu_quantise, layer_norm_quantise, quantise_rows
from archfront.kernels.ops.weight_only_linear import weight_only_linear
from archfront.kernels.reference import low_bit_costs as costs
from archfront.kernels.reference.low_bit_linear import FP8
from archfront.kernels.reference.low_bit_linear import quantise_rows as reference_rows

HALF, FULL = torch.float16, torch.float32
OPERATORS = torch.ops.archfront


def fp8_operands(rows: int, channels: int, columns: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    x, w = torch.randn(rows, columns), torch.randn(channels, columns)
    return (*reference_rows(x, FP8), *reference_rows(w, FP8), torch.randn(channels))


def calls(rows: int) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]]:
    """Each operator on ``(rows, 40)`` with 9 channels: the public function, what it is given and its settings."""
    x = torch.randn(rows, 40).half()
    packed = packed_operands(9, 40, 4, 32, zero=True, rank=2)
    weight = (packed.packed, packed.scale, packed.zero, packed.down, packed.up)
    return {
        "quantise_rows": (quantise_rows, (x,), {}),
        "layer_norm_quantise": (layer_norm_quantise, (x, torch.randn(40), None), {"eps": 1e-6}),
        "gelu_quantise": (gelu_quantise, (x,), {}),
        "int8_linear": (int8_linear, int8_operands(rows, 9, 40, rank=2), {"activation": "gelu", "out_dtype": HALF}),
        "fp8_linear": (fp8_linear, fp8_operands(rows, 9, 40), {"out_dtype": torch.bfloat16}),
        "weight_only_linear": (weight_only_linear, (x, *packed), {"bits": 4, "group": 32}),
        "dequantise_weight": (dequantise_weight, weight, {"bits": 4, "group": 32, "columns": 40}),
    }


NAMES = sorted(calls(1))


@pytest.mark.parametrize("rows", [0, 5])
@pytest.mark.parametrize("name", NAMES)
def test_torch_accepts_the_operators(name: str, rows: int) -> None:
    _, given, settings = calls(rows)[name]
    checks = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    # The first calculates with the operands, which torch does not do in fp8.
    checks = checks[1:] if name == "fp8_linear" else checks
    results = torch.library.opcheck(getattr(OPERATORS, name).default, tuple(given), settings, test_utils=checks)
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", NAMES)
def test_shapes_are_known_without_computing(name: str) -> None:
    function, given, settings = calls(3)[name]
    computed = function(*given, **settings)
    shaped = function(*(None if t is None else t.to("meta") for t in given), **settings)
    pairs = zip(computed, shaped, strict=True) if isinstance(computed, tuple) else [(computed, shaped)]
    for found, meta in pairs:
        assert (meta.device.type, meta.shape, meta.dtype) == ("meta", found.shape, found.dtype)
        assert meta.stride() == found.stride()


class Block(nn.Module):
    """A norm, both kinds of low-bit layers and both fused quantisers, with the weights as arguments."""

    def forward(self, x: Tensor, norm: Tensor, first: list[Tensor], second: list[Tensor]) -> Tensor:
        codes, scale = layer_norm_quantise(x, norm, None, eps=1e-6)
        hidden = int8_linear(codes, scale, first[0], first[1], activation="none", out_dtype=x.dtype)
        codes, scale = gelu_quantise(hidden)
        back = int8_linear(codes, scale, first[2], first[3], out_dtype=x.dtype)
        return x + weight_only_linear(back, second[0], second[1], bits=4, group=32) * 2


def block_operands(rows: int) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    there, back, packed = int8_operands(1, 70, 40), int8_operands(1, 40, 70), packed_operands(40, 40, 4, 32)
    first = [there.wq, there.w_scale, back.wq, back.w_scale]
    return torch.randn(rows, 40).half(), torch.randn(40), first, [packed.packed, packed.scale]


def test_they_compile_whole_and_export_for_any_number_of_rows() -> None:
    given = block_operands(6)
    block = Block()
    compiled: Any = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*given), block(*given))
    shapes = ({0: torch.export.Dim("m")}, None, [None] * 4, [None] * 2)
    exported = torch.export.export(block, given, dynamic_shapes=shapes)
    targets = [node.target for node in exported.graph.nodes]
    for name in ("layer_norm_quantise", "int8_linear", "gelu_quantise", "weight_only_linear"):
        assert getattr(OPERATORS, name).default in targets
    other = (torch.randn(11, 40).half(), *given[1:])
    torch.testing.assert_close(exported.module()(*other), block(*other))


def test_they_have_no_gradient_and_say_so() -> None:
    packed = packed_operands(9, 40, 4, 32)
    x = torch.randn(3, 40).half().requires_grad_()
    with pytest.raises(RuntimeError, match="autograd"):
        weight_only_linear(x, *packed, bits=4, group=32).sum().backward()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(4), r"x.shape: \(4,\) is not served; \(m, k\) with k of 1 to 16384"),
        (torch.zeros(4, 0), r"x.shape: \(4, 0\)"),
        (torch.zeros(1, 20000, device="meta"), r"x.shape: \(1, 20000\)"),
        (torch.zeros(2, 4).double(), "x.dtype: torch.float64"),
        (torch.zeros(4, 2).T, r"x.stride\(\): \(1, 2\) .* \.contiguous\(\)"),
    ],
)
def test_rows_that_are_not_served_are_refused(x: Tensor, message: str) -> None:
    for function in (quantise_rows, gelu_quantise, OPERATORS.quantise_rows.default, OPERATORS.gelu_quantise.default):
        with pytest.raises(ValueError, match=message):
            function(x)


def test_norms_that_are_not_served_are_refused() -> None:
    x, weight = torch.zeros(2, 4), torch.ones(4)
    for wrong, bias, message in (
        (torch.ones(5), None, r"weight.shape: \(5,\) is not served; \(k,\) with k = 4 of x"),
        (weight.double(), None, "weight.dtype: torch.float64"),
        (weight, torch.ones(1), r"bias.shape: \(1,\)"),
        (weight, torch.ones(4, device="meta"), "bias.device: meta is not served; cpu"),
    ):
        with pytest.raises(ValueError, match=message):
            layer_norm_quantise(x, wrong, bias, eps=1e-6)
    with pytest.raises(ValueError, match=r"x.shape: .* k of 1 to 8192"):
        layer_norm_quantise(torch.zeros(1, 9000), torch.ones(9000), None, eps=1e-6)


@pytest.mark.parametrize(
    ("position", "wrong", "message"),
    [
        (0, torch.zeros(3, dtype=torch.int8), r"xq.shape: \(3,\)"),
        (0, torch.zeros(3, 2**17, dtype=torch.int8, device="meta"), r"xq.shape: .* k of 1 to 131071"),
        (0, torch.zeros(3, 40), "xq.dtype: torch.float32 is not served; torch.int8"),
        (0, torch.zeros(40, 3, dtype=torch.int8).T, r"x.stride\(\): \(1, 3\)"),
        (1, torch.zeros(4), r"x_scale.shape: \(4,\)"),
        (1, torch.zeros(3).half(), "x_scale.dtype: torch.float16"),
        (2, torch.zeros(9, 41, dtype=torch.int8), r"wq.shape: \(9, 41\) .* k = 40 of xq"),
        (2, torch.zeros(0, 40, dtype=torch.int8), r"wq.shape: \(0, 40\)"),
        (2, torch.zeros(9, 40), "wq.dtype: torch.float32"),
        (2, torch.zeros(9, 40, dtype=torch.int8, device="meta"), "wq.device: meta"),
        (3, torch.zeros(9, 1), r"w_scale.shape: \(9, 1\) .* n = 9 of wq"),
        (4, torch.zeros(9).half(), "bias.dtype: torch.float16"),
        (5, None, "down, up: one alone is not served"),
        (5, torch.zeros(65, 40).half(), r"down.shape: \(65, 40\) .* r of 1 to 64"),
        (6, torch.zeros(9, 3).half(), r"up.shape: \(9, 3\) .* r = 2 of down"),
        (6, torch.zeros(9, 2), "up.dtype: torch.float32 is not served; torch.float16"),
    ],
)
def test_int8_operands_that_are_not_served_are_refused(position: int, wrong: Tensor | None, message: str) -> None:
    given: list[Tensor | None] = list(int8_operands(3, 9, 40, rank=2))
    given[position] = wrong
    for call in (int8_linear, OPERATORS.int8_linear.default):
        with pytest.raises(ValueError, match=message):
            call(*given, activation="none", out_dtype=HALF)  # type: ignore[arg-type]


def test_settings_of_int8_linear_that_are_not_served_are_refused() -> None:
    given = int8_operands(3, 9, 40)
    with pytest.raises(ValueError, match=r"activation: tanh is not served; none or relu or gelu is"):
        int8_linear(*given, activation="tanh")
    with pytest.raises(ValueError, match=r"out_dtype: torch\.int8"):
        int8_linear(*given, out_dtype=torch.int8)


@pytest.mark.parametrize(
    ("position", "wrong", "message"),
    [
        (0, torch.zeros(40).half(), r"x.shape: \(40,\)"),
        (0, torch.zeros(3, 40).double(), "x.dtype: torch.float64"),
        (0, torch.zeros(3, 65).half(), r"packed.shape: .* with 2 slabs for 4 bits and k = 65"),
        (0, torch.zeros(40, 3).half().T, r"x.stride\(\)"),
        (1, torch.zeros(1, 9, 32, dtype=torch.int8), "packed.dtype: torch.int8"),
        (1, torch.zeros(9, 32, dtype=torch.uint8), r"packed.shape: \(9, 32\)"),
        (2, torch.zeros(9, 2).half(), r"scale.shape: \(9, 2\) .* 2 groups and n = 9"),
        (2, torch.zeros(2, 9), "scale.dtype: torch.float32 is not served; torch.float16"),
        (3, torch.zeros(1, 9, dtype=torch.uint8), r"zero.shape: \(1, 9\)"),
        (3, torch.zeros(2, 9).half(), "zero.dtype: torch.float16 is not served; torch.uint8"),
        (4, torch.zeros(8).half(), r"bias.shape: \(8,\) .* n = 9 of packed"),
        (4, torch.zeros(9), "bias.dtype: torch.float32"),
        (4, torch.zeros(18).half()[::2], r"bias.stride\(\): \(2,\)"),
        (5, torch.zeros(2, 40), "down.dtype: torch.float32"),
        (6, None, "down, up: one alone"),
    ],
)
def test_packed_operands_that_are_not_served_are_refused(position: int, wrong: Tensor | None, message: str) -> None:
    packed = packed_operands(9, 40, 4, 32, zero=True, rank=2)
    given: list[Tensor | None] = [torch.zeros(3, 40).half(), *packed]
    given[position] = wrong
    for call in (weight_only_linear, OPERATORS.weight_only_linear.default):
        with pytest.raises(ValueError, match=message):
            call(*given, bits=4, group=32)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("bits", "group", "message"),
    [(5, 32, "bits: 5 is not served; 8 or 4 or 3 or 2"), (4, 20, "group: 20 .* a multiple of 32"), (4, 0, "group: 0")],
)
def test_bits_and_groups_that_are_not_served_are_refused(bits: int, group: int, message: str) -> None:
    packed = packed_operands(9, 40, 4, 32)
    with pytest.raises(ValueError, match=message):
        weight_only_linear(torch.zeros(3, 40).half(), *packed, bits=bits, group=group)
    with pytest.raises(ValueError, match=message):
        dequantise_weight(packed.packed, packed.scale, bits=bits, group=group, columns=40)


def test_fp8_operands_that_are_not_served_are_refused() -> None:
    xq, x_scale, wq, w_scale, bias = fp8_operands(3, 9, 40)
    for given, message in (
        ((xq.float(), x_scale, wq, w_scale, bias), "xq.dtype: torch.float32 is not served; torch.float8_e4m3fn"),
        ((xq, x_scale, wq.view(torch.int8), w_scale, bias), "wq.dtype: torch.int8"),
        ((xq, x_scale, wq[:, :8], w_scale, bias), r"wq.shape: \(9, 8\)"),
        ((xq, x_scale.half(), wq, w_scale, bias), "x_scale.dtype"),
        ((xq, x_scale, wq, w_scale[:4], bias), r"w_scale.shape: \(4,\)"),
        ((xq, x_scale, wq, w_scale, bias[:4]), r"bias.shape: \(4,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            fp8_linear(*given)
    with pytest.raises(ValueError, match=r"out_dtype: torch\.float64"):
        fp8_linear(xq, x_scale, wq, w_scale, bias, out_dtype=torch.float64)


@pytest.mark.parametrize("rank", [0, 2])
def test_costs_are_those_of_the_tensors(rank: int) -> None:
    """Bytes are the operands' own; two operations a product, as torch counts them, and those of epilogues."""
    x, given = torch.randn(3, 128).half(), packed_operands(9, 128, 4, 32, zero=True, rank=rank)
    y = weight_only_linear(x, *given, bits=4, group=32)
    settings = {"bits": 4, "group": 32, "zero": True, "bias": True, "dtype": HALF, "rank": rank}
    cost = costs.weight_only_linear_cost(3, 9, 128, **settings)  # type: ignore[arg-type]
    assert cost.bytes == sum(tensor.nbytes for tensor in (x, *given, y) if tensor is not None)
    assert cost.operations == 3 * 9 * (2 * 128 + 1) + 2 * 3 * rank * (128 + 9)
    codes = int8_operands(3, 9, 128, rank=rank)
    out = int8_linear(*codes, out_dtype=HALF)
    cost = costs.quantised_linear_cost(3, 9, 128, bias=True, out_dtype=HALF, rank=rank)
    assert cost.bytes == sum(tensor.nbytes for tensor in (*codes, out) if tensor is not None)
    assert cost.operations == 3 * 9 * (2 * 128 + 3) + 2 * 3 * rank * (128 + 9)
    pair = quantise_rows(x)
    plain = costs.quantise_rows_cost(3, 128, dtype=HALF)
    assert plain.bytes == sum(tensor.nbytes for tensor in (x, *pair))
    assert costs.gelu_quantise_cost(3, 128, dtype=HALF).bytes == plain.bytes
    assert costs.layer_norm_quantise_cost(3, 128, dtype=HALF, bias=True).bytes == plain.bytes + 2 * 2 * 128


def test_a_llama_layer_has_the_published_bytes_a_weight() -> None:
    """0.53 bytes: four bits, and a float16 scale with a zero point for 128 weights."""
    cost = costs.weight_only_linear_cost(1, 14336, 4096, bits=4, group=128, zero=True, bias=False, dtype=HALF)
    assert abs(cost.bytes / (14336 * 4096) - 0.524) < 0.002
