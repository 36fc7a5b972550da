"""Attention and unread tokens in files for ONNX Runtime: they compute the same, with fewer operators."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from archfront.evaluators.onnx_files import export_onnx, outputs
from archfront.spaces.models.registry import MODELS
from archfront.spaces.torchvision_compat import import_timm

onnx = pytest.importorskip("onnx")

TOKENS, WIDTH, HEADS = 9, 24, 3
FILE = "network.onnx"


class Attention(nn.Module):
    """Attention of one tensor, read in one of many ways."""

    def __init__(self, read: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]], scale: float | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.read, self.scale = read, scale
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.read(self.qkv(x))
        found = nn.functional.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return self.out(found.transpose(1, 2).flatten(2))


def in_turn(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All queries, all keys, all values: timm's."""
    q, k, v = x.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def chunks(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in x.chunk(3, -1))
    return q, k, v


def by_head(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of a head beside each other: GPT-NeoX's."""
    q, k, v = x.unflatten(-1, (HEADS, -1)).transpose(1, 2).chunk(3, -1)
    return q, k, v


def dealt_out(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Features of a head apart by the number of heads."""
    q, k, v = (part.unflatten(-1, (-1, HEADS)).permute(0, 3, 1, 2) for part in x.chunk(3, -1))
    return q, k, v


def keys_first(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = chunks(x)
    return k, q, v


class Apart(nn.Module):
    """Projections of their own, products written out, scaled afterwards.

    Args:
        shared: key and value of one head, which all queries read.
        latent: keys and values of tokens that all samples have in common.
    """

    def __init__(self, scale: float = 0.4, shared: bool = False, latent: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        width = WIDTH // HEADS if shared else WIDTH
        self.q, self.k, self.v = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, width), nn.Linear(WIDTH, width)
        self.scale, self.tokens = scale, nn.Parameter(torch.randn(1, 300, WIDTH)) if latent else None

    def forward(self, x: Tensor) -> Tensor:
        read = x if self.tokens is None else self.tokens
        made = (self.q(x), self.k(read), self.v(read))
        q, k, v = (one.unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for one in made)
        return ((q @ k.transpose(-1, -2) * self.scale).softmax(-1) @ v).transpose(1, 2).flatten(2)


class Grouped(nn.Module):
    """Attention within groups of tokens, which are samples before and after."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x.reshape(-1, TOKENS // 3, WIDTH)).reshape(-1, 3, TOKENS // 3, 3 * WIDTH).chunk(3, -1)
        q, k, v = parts
        return ((q @ k.transpose(-1, -2)).softmax(-1) @ v).transpose(1, 2).reshape(-1, TOKENS, WIDTH)


class AcrossSamples(nn.Module):
    """Two tokens that are told apart by a literal 2, where samples might be meant."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :2]
        q, k, v = (f(x).view(2, -1, HEADS, WIDTH // HEADS).transpose(1, 2) for f in (self.q, self.k, self.v))
        return ((q @ k.transpose(-1, -2)).softmax(-1) @ v).transpose(1, 2).reshape(-1, 2, WIDTH)


class Branches(nn.Module):
    """A branch that reads all tokens without saying so, beside one that is read alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention, self.norm = Attention(in_turn), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.attention(x))
        pooled = torch.cond(x.sum() > 0, lambda y: y.amax(1), lambda y: y.sum(1), (y,))
        return self.norm(y)[:, 0] + pooled


class Reader(nn.Module):
    """A block and a norm, of whose tokens some are read."""

    def __init__(self, read: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.attention, self.norm, self.read = Attention(in_turn), nn.LayerNorm(WIDTH), read
        self.mlp = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 40), nn.GELU(), nn.Linear(40, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return self.read(self.norm(x + self.mlp(x)))


def operators(model: nn.Module, example: Tensor, folder: Path) -> Counter[str]:
    """Operators of the file for ONNX Runtime, after it has given what torch gives, for two sizes of batches."""
    export_onnx(model.eval(), example, folder / FILE, any_batch=True, for_onnxruntime=True)
    batches = [example, torch.cat([example, example.flip(-1)[:1]])]
    with torch.no_grad():
        expected = torch.cat([model(batch) for batch in batches])
    torch.testing.assert_close(outputs(folder / FILE, "onnx", batches, 1), expected, rtol=1e-4, atol=1e-4)
    return Counter(node.op_type for node in onnx.load(str(folder / FILE)).graph.node)


@pytest.mark.parametrize("model", [Attention(in_turn), Attention(chunks), Attention(chunks, 0.7), Apart()])
def test_attention_is_one_operator_however_it_is_written(model: nn.Module, tmp_path: Path) -> None:
    found = operators(model, torch.randn(2, TOKENS, WIDTH), tmp_path)
    assert found["MultiHeadAttention"] == 1
    assert not found["Softmax"] + found["Transpose"] + found["Reshape"] + found["Shape"]


@pytest.mark.parametrize("read", [by_head, dealt_out, keys_first])
def test_other_attention_stays(read: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]], tmp_path: Path) -> None:
    found = operators(Attention(read), torch.randn(2, TOKENS, WIDTH), tmp_path)
    assert (found["MultiHeadAttention"], found["Softmax"]) == (0, 1)


@pytest.mark.parametrize(
    "model",
    [Apart(0.0), Apart(shared=True), Apart(latent=True), Grouped(), AcrossSamples(), Attention(chunks).double()],
    ids=["scale 0", "shared keys", "latent keys", "groups", "across samples", "float64"],
)
def test_what_the_operator_does_not_serve_stays(model: nn.Module, tmp_path: Path) -> None:
    example = torch.randn(2, TOKENS, WIDTH, dtype=next(model.parameters()).dtype)
    assert operators(model, example, tmp_path)["MultiHeadAttention"] == 0


def test_files_with_branches_stay(tmp_path: Path) -> None:
    found = operators(Branches(), torch.randn(2, TOKENS, WIDTH), tmp_path)
    assert (found["If"], found["MultiHeadAttention"]) == (1, 0)


def test_masks_stay(tmp_path: Path) -> None:
    decoder = MODELS.build({"name": "decoder", "dim": 32, "depth": 2, "context": 16}, "model")
    found = operators(decoder.build(), decoder.example(2), tmp_path)
    assert (found["MultiHeadAttention"], found["Softmax"]) == (0, 2)


def test_a_transformer_of_timm(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = import_timm().create_model("vit_tiny_patch16_224", img_size=64, depth=3, num_classes=5)
    found = operators(model, torch.randn(2, 3, 64, 64), tmp_path)
    assert (found["MultiHeadAttention"], found["Softmax"]) == (3, 0)


def one_token(folder: Path) -> int:
    """How many values of the file have one token."""
    graph = onnx.shape_inference.infer_shapes(onnx.load(str(folder / FILE))).graph
    shapes = [[dim.dim_value for dim in info.type.tensor_type.shape.dim] for info in graph.value_info]
    return sum(len(shape) == 3 and shape[1] == 1 for shape in shapes)


@pytest.mark.parametrize("token", [0, 4, -1])
def test_one_token_is_computed_alone_from_its_query_on(token: int, tmp_path: Path) -> None:
    found = operators(Reader(lambda x: x[:, token]), torch.randn(2, TOKENS, WIDTH), tmp_path)
    assert found["Gather"] == 2  # of the queries, and of what is added to attention
    assert one_token(tmp_path) > 12


@pytest.mark.parametrize(
    "read", [lambda x: x.mean(1), lambda x: x[:, 0] + x[:, 1], lambda x: x[:, 0] * x.amax(1)],
    ids=["mean", "two tokens", "one and all"],
)  # fmt: skip
def test_what_reads_more_gets_more(read: Callable[[Tensor], Tensor], tmp_path: Path) -> None:
    operators(Reader(read), torch.randn(2, TOKENS, WIDTH), tmp_path)
    assert one_token(tmp_path) == 0
