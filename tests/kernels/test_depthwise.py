"""The fused depthwise operator: the kernel against its twin and FBNet's block, and the operator around it."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from archfront.kernels.ops import serving
from archfront.kernels.ops.depthwise import depthwise_scale_shift
from archfront.kernels.reference.depthwise import depthwise_cost, fold_batch_norm
from archfront.kernels.reference.depthwise import depthwise_scale_shift as reference
from archfront.spaces.fbnet_blocks import BlockKind, BlockShape, FBNetBlock

HERE = Path(__file__).parent
OPERATOR = torch.ops.archfront.depthwise_scale_shift.default


def operands(shape: tuple[int, ...] = (2, 6, 9, 7), kernel: int = 3, dtype: Any = torch.float32) -> list[Tensor]:
    channels = shape[1]
    weight = torch.randn(channels, 1, kernel, kernel).to(dtype)
    return [torch.randn(shape).to(dtype), weight, torch.randn(channels), torch.randn(channels)]


def run_alone(program: str, *arguments: str, **environment: str) -> list[dict[str, Any]]:
    """The lines of JSON of a program beside this file, run from the root as users run theirs."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    command = [sys.executable, str(HERE / program), *arguments]
    settings: dict[str, Any] = {"env": kept | environment, "cwd": HERE.parents[1], "timeout": 300}
    run = subprocess.run(command, capture_output=True, text=True, **settings)
    assert run.returncode == 0, run.stderr[-2000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def assert_exact(rows: list[dict[str, Any]]) -> None:
    # Of the root mean square; float16 rounds each result by up to 2**-11, which ``worst`` leaves out.
    for row in rows:
        limit = 2**-11 if row["case"].endswith("float16") else 1e-6
        assert row["relative"] <= limit, row
        assert row["worst"] <= 1e-5, row
        assert not row["strayed"], row


def test_the_kernel_computes_what_its_twin_and_fbnet_compute() -> None:
    rows = run_alone("interpret_depthwise.py", TRITON_INTERPRET="1")
    assert len(rows) == 3 * 2 * 2 + 2 + 1
    assert_exact(rows)


@pytest.mark.slow
def test_the_kernel_computes_what_its_twin_computes_under_every_setting() -> None:
    rows = run_alone("interpret_depthwise.py", "--everything", TRITON_INTERPRET="1")
    assert len(rows) == 3 * 2 * 2 * 4 + 2 + 1
    assert_exact(rows)


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("expansion", [1, 6])
def test_fbnets_block_is_the_same_with_its_middle_fused(kernel: int, stride: int, expansion: int) -> None:
    torch.manual_seed(0)
    block = FBNetBlock(BlockShape(BlockKind(kernel, expansion), 16, 24, stride, 15, 14))
    for norm in (module for module in block.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.uniform_(norm.running_var, 0.2, 3)
        for values in (norm.running_mean, norm.weight, norm.bias):
            nn.init.normal_(values)
    block.eval().requires_grad_(False)
    x = torch.randn(2, 16, 15, 14)
    *first, middle, last = block.body
    hidden = nn.Sequential(*first)(x)
    conv, norm = middle[0], middle[1]
    fused = depthwise_scale_shift(hidden, conv.weight, *fold_batch_norm(norm), stride=stride, relu=True)
    torch.testing.assert_close(last(fused), block(x), rtol=1e-5, atol=1e-5)


def test_folding_needs_statistics_and_serves_norms_without_weights() -> None:
    with pytest.raises(ValueError, match="norm: track_running_stats=False"):
        fold_batch_norm(nn.BatchNorm2d(3, track_running_stats=False))
    plain = nn.BatchNorm2d(3, affine=False).eval()
    nn.init.uniform_(plain.running_var)
    x = torch.randn(2, 3, 4, 4)
    scale, shift = fold_batch_norm(plain)
    torch.testing.assert_close(x * scale[:, None, None] + shift[:, None, None], plain(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(2, 6, 9, 7), (1, 1, 1, 1), (0, 3, 4, 4)])
def test_torch_accepts_the_operator(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    results = torch.library.opcheck(OPERATOR, tuple(operands(shape, 5, dtype)), {"stride": 2, "relu": True})
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize(("shape", "stride", "expected"), [((3, 6, 9, 8), 1, (9, 8)), ((3, 6, 9, 8), 2, (5, 4))])
def test_shapes_are_known_without_computing(shape: tuple[int, ...], stride: int, expected: tuple[int, int]) -> None:
    meta = [operand.to("meta") for operand in operands(shape, 5, torch.float16)]
    out = depthwise_scale_shift(*meta, stride=stride, relu=False)
    assert (out.shape, out.dtype, out.device.type) == ((3, 6, *expected), torch.float16, "meta")


def model(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return depthwise_scale_shift(x * 2, weight, scale, shift, stride=2, relu=True) + 1


class Exported(nn.Module):
    def forward(self, x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return model(x, weight, scale, shift)


def test_it_compiles_whole_and_exports_for_any_batch() -> None:
    given = operands()
    whole = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(whole(*given), model(*given))
    exported = torch.export.export(Exported(), tuple(given), dynamic_shapes=({0: torch.export.Dim("n")}, {}, {}, {}))
    assert OPERATOR in [node.target for node in exported.graph.nodes]
    given[0] = torch.randn(5, 6, 9, 7)
    torch.testing.assert_close(exported.module()(*given), model(*given))


@pytest.mark.slow
def test_inductor_compiles_it_on_a_cpu() -> None:
    given = operands()
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(*given), model(*given))


@pytest.mark.parametrize(
    ("position", "wrong", "message"),
    [
        (0, torch.zeros(6, 9, 7), r"x.shape: \(6, 9, 7\) is not served; \(n, c, h, w\)"),
        (0, torch.zeros(2, 6, 0, 7), r"x.shape: \(2, 6, 0, 7\)"),
        (0, torch.zeros(1, 1, 2**15, 2**15, device="meta"), r"x.shape: .*; h \* w below 1073741824 is"),
        (0, torch.zeros(2, 6, 9, 7, dtype=torch.bfloat16), "x.dtype: torch.bfloat16 .* torch.float32 or torch.float16"),
        (0, torch.zeros(2, 6, 7, 9).mT, r"x.stride\(\): \(378, 63, 1, 9\) .* \.contiguous\(\)"),
        (1, torch.zeros(6, 1, 7, 7), r"weight.shape: \(6, 1, 7, 7\) .* \(6, 1, 3, 3\) or \(6, 1, 5, 5\)"),
        (1, torch.zeros(6, 1, 3, 5), r"weight.shape: \(6, 1, 3, 5\)"),
        (1, torch.zeros(5, 1, 3, 3), r"weight.shape: \(5, 1, 3, 3\)"),
        (1, torch.zeros(6, 1, 3, 3).half(), "weight.dtype: torch.float16 is not served; torch.float32"),
        (2, torch.zeros(7), r"scale.shape: \(7,\) .* c = 6"),
        (3, torch.zeros(6, 1), r"shift.shape: \(6, 1\)"),
        (2, torch.zeros(6).half(), "scale.dtype: torch.float16 is not served; torch.float32"),
        (3, torch.zeros(6, device="meta"), "shift.device: meta is not served; cpu"),
        (3, torch.zeros(12)[::2], r"shift.stride\(\): \(2,\)"),
    ],
)
def test_what_is_not_served_is_refused(position: int, wrong: Tensor, message: str) -> None:
    given = operands()
    given[position] = wrong
    for call in (depthwise_scale_shift, OPERATOR):
        with pytest.raises(ValueError, match=message):
            call(*given, stride=1, relu=True)


def test_a_stride_or_device_that_is_not_served_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="stride: 3 is not served; 1 or 2 is"):
        depthwise_scale_shift(*operands(), stride=3, relu=True)
    # No device but these is at hand everywhere, so one of them leaves the list.
    monkeypatch.setattr(serving, "DEVICES", ("cuda", "meta"))
    with pytest.raises(ValueError, match=r"x.device: cpu is not served; cuda or meta is"):
        depthwise_scale_shift(*operands(), stride=1, relu=True)


def test_it_has_no_gradient_and_says_so() -> None:
    x, *rest = operands()
    with pytest.raises(RuntimeError, match="autograd"):
        depthwise_scale_shift(x.requires_grad_(), *rest, stride=1, relu=True).sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_cost_is_that_of_the_tensors_and_of_torchs_count(dtype: torch.dtype) -> None:
    given = operands((2, 6, 9, 7), 5, dtype)
    with FlopCounterMode(display=False) as counter:
        out = reference(*given, stride=2, relu=True)
    cost = depthwise_cost((2, 6, 9, 7), kernel=5, stride=2, relu=True, dtype=dtype)
    assert cost.bytes == sum(tensor.nbytes for tensor in (*given, out))
    assert cost.operations == counter.get_total_flops() + 3 * math.prod(out.shape)
