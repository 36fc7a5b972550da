"""Token reduction as torch sees it: modules in a network, operators, what is refused, costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from archfront.kernels.modules.token_reduction import TokenMerge, TokenPrune
from archfront.kernels.ops import serving
from archfront.kernels.ops.token_matching import token_match
from archfront.kernels.ops.token_merging import token_gather, token_merge
from archfront.kernels.reference import token_reduction as reference

MATCH = torch.ops.archfront.token_match.default
MERGE = torch.ops.archfront.token_merge.default
GATHER = torch.ops.archfront.token_gather.default


class Block(nn.Module):
    """As ViT's, with a fused projection; keys averaged over heads are the metric, sizes weigh the attention."""

    def __init__(self, r: int, keep: int | None = None) -> None:
        super().__init__()
        self.qkv, self.proj, self.mlp = nn.Linear(32, 96), nn.Linear(32, 32), nn.Linear(32, 32)
        self.merge = TokenMerge(r)
        self.prune = None if keep is None else TokenPrune(keep)

    def forward(self, x: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = self.qkv(x).unflatten(2, (3, 2, 16)).permute(2, 0, 3, 1, 4).unbind(0)
        attention = (q @ k.mT / 4 + size.log()[:, None, None, :]).softmax(-1)
        x = x + self.proj((attention @ v).transpose(1, 2).flatten(2))
        if self.prune is not None:
            x, index = self.prune(x, attention[:, :, 0].mean(1))
            size = size.gather(1, index)
        else:
            x, size = self.merge(x, k.mean(1), size)
        return x + self.mlp(x), size


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(4), Block(0), Block(4), Block(0, keep=5)])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        size = x.new_ones(x.shape[:2])
        for block in self.blocks:
            x, size = block(x, size)
        return x, size


def test_a_network_with_a_constant_schedule_compiles_and_exports() -> None:
    torch.manual_seed(10)
    network = Network().eval().requires_grad_(False)
    x = torch.randn(3, 21, 32)
    merged = nn.ModuleList(list(network.blocks)[:3])
    y, size = x, torch.ones(3, 21)
    for block in merged:
        y, size = block(y, size)
    # Every token is in exactly one of those that remain.
    assert y.shape == (3, 21 - 8, 32)
    assert (size.sum(1) == 21).all()
    out, _ = network(x)
    assert out.shape == (3, 6, 32)
    whole = torch.compile(network, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(whole(x), network(x))
    exported = torch.export.export(network, (x,), dynamic_shapes=({0: torch.export.Dim("n")},))
    called = [node.target for node in exported.graph.nodes]
    assert [called.count(operator) for operator in (MATCH, MERGE, GATHER)] == [2, 2, 1]
    more = torch.randn(5, 21, 32)
    torch.testing.assert_close(exported.module()(more), network(more))
    assert "r=4, protected=1" in repr(network)
    assert "keep=5" in repr(network)


def match_arguments(dtype: Any = torch.float32, batch: int = 2) -> dict[str, Any]:
    return {
        "metric": torch.randn(batch, 9, 5).to(dtype), "factors": torch.rand(batch, 9),
        "protected": 1, "split": 0, "temperature": 1.0,
    }  # fmt: skip


def merge_arguments(dtype: Any = torch.float32, batch: int = 2) -> dict[str, Any]:
    score, index = token_match(torch.randn(batch, 9, 5))
    return {
        "x": torch.randn(batch, 9, 7).to(dtype), "size": torch.ones(batch, 9), "weight": torch.rand(batch, 9),
        "score": score, "index": index, "r": 3, "protected": 1, "split": 0,
    }  # fmt: skip


def gather_arguments(dtype: Any = torch.float32, batch: int = 2) -> dict[str, Any]:
    x = torch.randn(batch, 9, 7).to(dtype)
    return {"x": x, "score": torch.rand(batch, 9), "keep": 3, "protected": 1, "ordered": False}


CALLS: dict[Any, Any] = {MATCH: token_match, MERGE: token_merge, GATHER: token_gather}
ARGUMENTS: dict[Any, Any] = {MATCH: match_arguments, MERGE: merge_arguments, GATHER: gather_arguments}


@pytest.mark.parametrize("batch", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("operator", list(CALLS))
def test_torch_accepts_the_operators(operator: Any, dtype: torch.dtype, batch: int) -> None:
    results = torch.library.opcheck(operator, (), ARGUMENTS[operator](dtype, batch))
    assert set(results.values()) == {"SUCCESS"}


def test_shapes_are_known_without_computing() -> None:
    for operator, call in CALLS.items():
        given = ARGUMENTS[operator](torch.bfloat16)
        there = {name: v.to("meta") if isinstance(v, Tensor) else v for name, v in given.items()}
        for found, expected in zip(call(**there), call(**given), strict=True):
            assert (found.shape, found.dtype, found.device.type) == (expected.shape, expected.dtype, "meta")


@pytest.mark.parametrize(
    ("operator", "name", "wrong", "message"),
    [
        (MATCH, "metric", torch.zeros(9, 5), r"metric.shape: \(9, 5\) is not served; \(b, n, c\)"),
        (MATCH, "metric", torch.zeros(2, 0, 5), r"metric.shape: \(2, 0, 5\)"),
        (MATCH, "metric", torch.zeros(1, 2**16, 2**15, device="meta"), "n \\* c below 2147483648"),
        (
            MATCH,
            "metric",
            torch.zeros(2, 9, 5).double(),
            "metric.dtype: torch.float64 .* torch.float32 or torch.float16",
        ),
        (MATCH, "metric", torch.zeros(2, 5, 9).mT, r"x.stride\(\): \(45, 1, 9\)"),
        (MATCH, "factors", torch.zeros(2, 8), r"factors.shape: \(2, 8\) .* \(2, 9\)"),
        (MATCH, "factors", torch.zeros(2, 9).half(), "factors.dtype: torch.float16"),
        (MATCH, "factors", torch.zeros(2, 9, device="meta"), "factors.device: meta"),
        (MATCH, "protected", 10, "protected: 10 is not served; 0 to n = 9 is"),
        (MATCH, "split", 9, "split: 9 is not served; 0 to n - 1 = 8 is"),
        (MATCH, "split", -1, "split: -1"),
        (MATCH, "temperature", 0.0, "temperature: 0.0 is not served; a finite number above 0"),
        (MERGE, "x", torch.zeros(2, 9), r"x.shape: \(2, 9\)"),
        (MERGE, "x", torch.zeros(2, 9, 7).long(), "x.dtype: torch.int64"),
        (MERGE, "x", torch.zeros(2, 9, 14)[..., ::2], r"x.stride\(\): \(126, 14, 2\)"),
        (MERGE, "size", torch.zeros(2, 9).half(), "size.dtype: torch.float16"),
        (MERGE, "weight", torch.zeros(2), r"weight.shape: \(2,\)"),
        (MERGE, "score", torch.zeros(2, 9), r"score.shape: \(2, 9\) is not served; \(b, sources\) = \(2, 5\)"),
        (MERGE, "index", torch.zeros(2, 5).int(), "index.dtype: torch.int32 is not served; torch.int64"),
        (MERGE, "index", torch.zeros(5, 2).long().T, r"index.stride\(\): \(1, 2\)"),
        (MERGE, "r", 5, "r: 5 is not served; 1 to 4, of n = 9 with 1 protected and split 0, is"),
        (MERGE, "r", -1, "r: -1"),
        (MERGE, "protected", 9, "r: 3 is not served; 1 to 0"),
        (GATHER, "x", torch.zeros(2, 9, 0), r"x.shape: \(2, 9, 0\)"),
        (GATHER, "score", torch.zeros(2, 9).double(), "score.dtype: torch.float64"),
        (GATHER, "score", torch.zeros(2, 9, device="meta"), "score.device: meta"),
        (GATHER, "keep", 9, "keep: 9 is not served; 0 to 8, of n = 9 with 1 protected"),
        (GATHER, "keep", -1, "keep: -1"),
        (GATHER, "protected", -1, "protected: -1"),
    ],
)
def test_what_is_not_served_is_refused(operator: Any, name: str, wrong: Any, message: str) -> None:
    given = ARGUMENTS[operator]() | {name: wrong}
    for call in (CALLS[operator], operator):
        with pytest.raises(ValueError, match=message):
            call(**given)


def test_nothing_kept_and_devices_without_a_kernel_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="keep: 0 is not served; 1 to 9"):
        token_gather(torch.zeros(1, 9, 2), torch.zeros(1, 9), 0, protected=0)
    # No device but these is at hand everywhere, so one of them leaves the list.
    monkeypatch.setattr(serving, "DEVICES", ("cuda", "meta"))
    for operator, call in CALLS.items():
        with pytest.raises(ValueError, match=r"x.device: cpu is not served; cuda or meta is"):
            call(**ARGUMENTS[operator]())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_costs_are_those_of_the_tensors(dtype: torch.dtype) -> None:
    def moved(tensors: Sequence[Tensor]) -> int:
        return sum(tensor.nbytes for tensor in tensors)

    given = match_arguments(dtype)
    with FlopCounterMode(display=False) as counter:
        found = reference.token_match(**given)
    cost = reference.token_match_cost((2, 9, 5), dtype=dtype, weighted=True)
    assert cost.bytes == moved((given["metric"], given["factors"], *found))
    assert cost.operations == counter.get_total_flops() + 2 * (5 * 4 * 5 + 2 * 9 * 5)
    given = merge_arguments(dtype)
    tensors = [value for value in given.values() if isinstance(value, Tensor)]
    cost = reference.token_merge_cost((2, 9, 7), 3, dtype=dtype, weighted=True)
    assert cost.bytes == moved((*tensors, *reference.token_merge(**given)))
    assert cost.operations == 2 * (2 * 3 * 7 + 25)
    assert reference.token_merge_cost((2, 9, 7), 0, dtype=dtype) == (0, 0)
    given = gather_arguments(dtype)
    out, index = reference.token_gather(**given)
    cost = reference.token_gather_cost((2, 9, 7), 3, dtype=dtype)
    assert cost.bytes == moved((given["score"], out, out, index))
