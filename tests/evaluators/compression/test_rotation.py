"""A rotated pre-norm transformer computes what it did, with its outliers spread; tokens weigh what they receive."""

import copy

import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from archfront.errors import InputError
from archfront.evaluators.compression.recovery.rotation import (
    attention_received,
    centre_linear_out,
    centre_rows,
    fold_layer_norm,
    hadamard,
    random_rotation,
    rotate_linear_in,
    rotate_linear_out,
    rotate_rows,
)


class Block(nn.Module):
    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.norm1: nn.Module = nn.LayerNorm(width, eps=1e-3)
        self.norm2: nn.Module = nn.LayerNorm(width, eps=1e-3)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=bias), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width, bias=bias), nn.Linear(2 * width, width)

    def forward(self, stream: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(stream)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        stream = stream + self.out(attended)
        outputs: Tensor = stream + self.down(functional.gelu(self.up(self.norm2(stream))))
        return outputs


class Transformer(nn.Module):
    """Pre-norm, with patches, positions and a class token."""

    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, stride=2)
        self.token, self.positions = nn.Parameter(torch.randn(1, 1, width)), nn.Parameter(torch.randn(17, width))
        self.blocks = nn.ModuleList(Block(width, bias) for _ in range(3))
        self.norm: nn.Module = nn.LayerNorm(width)
        self.head = nn.Linear(width, 5)

    def stream(self, images: Tensor) -> Tensor:
        stream: Tensor = self.patches(images).flatten(2).transpose(1, 2)
        stream = torch.cat([self.token.expand(len(images), 1, -1), stream], 1) + self.positions
        for block in self.blocks:
            stream = block(stream)
        return stream

    def forward(self, images: Tensor) -> Tensor:
        outputs: Tensor = self.head(self.norm(self.stream(images))[:, 0])
        return outputs


def rotate(model: Transformer, rotation: Tensor) -> None:
    writers: list[nn.Linear | nn.Conv2d] = [model.patches]
    readers: list[nn.Linear] = [model.head]
    for block in model.blocks:
        assert isinstance(block, Block)
        assert isinstance(block.norm1, nn.LayerNorm)
        assert isinstance(block.norm2, nn.LayerNorm)
        block.norm1, block.norm2 = fold_layer_norm(block.norm1, [block.qkv]), fold_layer_norm(block.norm2, [block.up])
        writers += [block.out, block.down]
        readers += [block.qkv, block.up]
    assert isinstance(model.norm, nn.LayerNorm)
    model.norm = fold_layer_norm(model.norm, [model.head])
    for writer in writers:
        centre_linear_out(writer)
        rotate_linear_out(writer, rotation)
    for vectors in (model.token, model.positions):
        centre_rows(vectors)
        rotate_rows(vectors, rotation)
    for reader in readers:
        rotate_linear_in(reader, rotation)


@pytest.mark.parametrize(("width", "bias"), [(32, True), (32, False), (24, True)])
def test_a_rotated_transformer_is_the_same_function(width: int, bias: bool) -> None:
    torch.manual_seed(0)
    model = Transformer(width, bias).requires_grad_(False)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.uniform_(0.2, 3)
                module.bias.normal_()
        # A massive channel, which all writers feed.
        model.positions[:, 3] += 60
    images = torch.randn(7, 1, 8, 8)
    rotated = copy.deepcopy(model)
    rotate(rotated, random_rotation(width, seed=1))
    expected = model(images)
    assert float((rotated(images) - expected).norm() / expected.norm()) < 1e-4
    before, after = model.stream(images), rotated.stream(images)
    assert float((after - before).abs().max()) > 1
    peaks = [float((s.abs().amax(-1) / s.norm(dim=-1)).mean()) for s in (before, after)]
    assert peaks[1] < 0.6 * peaks[0]


def test_a_folded_normalisation_is_the_same_on_centred_streams() -> None:
    torch.manual_seed(0)
    norm, reader, stream = nn.LayerNorm(8, eps=0.3), nn.Linear(8, 3), torch.randn(5, 8)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    stream = stream - stream.mean(-1, keepdim=True)
    expected = reader(norm(stream))
    torch.testing.assert_close(reader(fold_layer_norm(norm, [reader])(stream)), expected)


def test_rotations_are_orthogonal_and_drawn_by_their_seed() -> None:
    for n in (1, 2, 32, 24, 7):
        matrix = random_rotation(n, seed=3)
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(n, dtype=torch.float64))
        assert torch.equal(matrix, random_rotation(n, seed=3))
        if n > 2:
            assert not torch.equal(matrix, random_rotation(n, seed=4))
    assert torch.equal(hadamard(4) * 2, torch.tensor([[1.0, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]))
    torch.testing.assert_close(random_rotation(32, seed=0).abs(), torch.full((32, 32), 32**-0.5, dtype=torch.float64))
    # One channel alone becomes all channels alike.
    alone = torch.zeros(32, dtype=torch.float64)
    alone[5] = 10
    torch.testing.assert_close((alone @ random_rotation(32, 0)).abs(), torch.full((32,), 10 / 32**0.5).double())


def test_tokens_weigh_what_they_receive() -> None:
    attention = torch.rand(3, 2, 5, 6, generator=torch.Generator().manual_seed(0)).softmax(-1)
    weights = attention_received(attention)
    for one, got in zip(attention, weights, strict=True):
        received = [sum(float(one[h, q, k]) for h in range(2) for q in range(5)) for k in range(6)]
        shares = [0.005 + 0.995 * (r - min(received)) / (max(received) - min(received)) for r in received]
        assert got.tolist() == pytest.approx([6 * s / sum(shares) for s in shares], rel=1e-4)
    torch.testing.assert_close(weights.mean(1), torch.ones(3))
    assert torch.equal(attention_received(torch.full((1, 2, 4, 4), 0.25)), torch.ones(1, 4))


def test_what_does_not_match_is_refused() -> None:
    with pytest.raises(InputError, match="power of two"):
        hadamard(12)
    with pytest.raises(InputError, match="width"):
        random_rotation(0, 0)
    for rotate_one in (rotate_linear_in, rotate_linear_out):
        with pytest.raises(InputError, match="8 channels"):
            rotate_one(nn.Linear(8, 8), torch.eye(4))
    with pytest.raises(InputError, match="8 channels"):
        rotate_rows(nn.Parameter(torch.ones(3, 8)), torch.eye(4))
    with pytest.raises(InputError, match="readers"):
        fold_layer_norm(nn.LayerNorm(8), [nn.Linear(4, 4)])
    with pytest.raises(InputError, match="attention"):
        attention_received(torch.ones(2, 3, 3))
    with pytest.raises(InputError, match="least"):
        attention_received(torch.ones(2, 2, 3, 3), 0)
