"""The space of bits: its sites and ties, its costs, and the networks that it makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.small_models import DECODER, RESNET, VIT, bits, trained
from tests.support.space_contract import check_models, check_space
from torch import nn

from archfront.errors import InputError
from archfront.spaces.policies.bits import Bits
from archfront.spaces.policies.layers import find_layers
from archfront.spaces.policies.quantised import LayerBits, quantise
from archfront.spaces.policies.site import Site, complete, tied_groups

RESNET18 = {"name": "timm", "model": "resnet18"}


@pytest.mark.parametrize("options", [{}, {"activations": "float", "keep": {"head": 8}}, {"activations": [4, 8, 32]}])
def test_the_contract(options: dict[str, Any]) -> None:
    space = Bits(model=dict(VIT), **options)
    check_space(space)
    check_models(space, space.sample(np.random.default_rng(0), 2))


def test_ties_are_those_of_hawq() -> None:
    """HAWQ-V3's programme for ResNet-18 ties convolution 4 to 6, 9 to 11 and 14 to 16, of 19 without the first."""
    space = Bits(model=RESNET18, weights=[4, 8], keep={"conv1": 8, "fc": 8})
    paths = [site.module for site in space.sites]
    # Where a pass meets them, a block's shortcut comes last.
    assert paths[4:7] == ["layer2.0.conv1", "layer2.0.conv2", "layer2.0.downsample.0"]
    assert [g for g in tied_groups(space.sites) if len(g) > 1] == [(4, 6), (9, 11), (14, 16)]
    assert len(space.columns) == 16
    assert len(Bits(model=RESNET18, tie=False, keep={"conv1": 8, "fc": 8}).columns) == 19
    assert len(Bits(model=RESNET18, activations="float", keep={"conv1": 8, "fc": 8}).columns) == 19


def test_blocks_are_one_decision_each() -> None:
    """Of Layer-Wise Quantization; what lies outside of them, and what is kept, is not part of any."""
    decoder = {**DECODER, "depth": 3}
    space = Bits(model=decoder, activations="float", tie="blocks")
    assert tied_groups(space.sites) == [tuple(range(6 * i, 6 * i + 6)) for i in range(3)] + [(18,)]
    assert {site.tied for site in space.sites[6:12]} == {"block blocks.1"}
    assert space.policy([2, 4, 8, 2])["blocks.1.mlp.fc2:weights"] == 4
    kept = Bits(model=decoder, activations="float", tie="blocks", keep={"blocks.0.attention.q": 8, "head": 8})
    assert tied_groups(kept.sites) == [tuple(range(5)), tuple(range(5, 11)), tuple(range(11, 17))]
    # Weights and inputs are tied separately.
    both = Bits(model=decoder, activations=[4, 8], tie="blocks")
    assert tied_groups(both.sites)[:2] == [tuple(range(0, 12, 2)), tuple(range(1, 12, 2))]
    assert len(both.columns) == 8
    assert Bits(**both.config).digest == both.digest != Bits(model=decoder, activations=[4, 8]).digest
    check_space(both)


def test_layers_that_read_one_tensor_stay_tied_outside_of_blocks() -> None:
    """A network of a stem of two layers, a block of two, and two heads, of which one reads what the block reads."""

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))
            self.blocks = nn.Sequential(nn.ModuleDict({"x": nn.Linear(4, 4), "y": nn.Linear(4, 4)}))

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            pixels = image.flatten(1)[:, :4]
            read = self.a(pixels) + self.b(pixels)
            block = self.blocks[0]
            assert isinstance(block, nn.ModuleDict)
            made: torch.Tensor = self.c(block["y"](block["x"](read))) + self.d(read)
            return made

    class Stub(Bits):
        def __init__(self, **options: Any) -> None:
            super().__init__(model=dict(VIT), **options)

        def _on_meta(self) -> tuple[nn.Module, torch.Tensor]:
            return Network(), torch.zeros(1, 1, 2, 2)

    def groups(**options: Any) -> list[list[str]]:
        space = Stub(weights=[4, 8], **options)
        return [[space.sites[i].id for i in group] for group in tied_groups(space.sites)]

    follow = groups(tie="blocks", activations="follow")
    assert [[name.partition(":")[0] for name in group] for group in follow] == [
        ["a", "b"], ["blocks.0.x", "blocks.0.y", "d"], ["c"],
    ]  # fmt: skip
    weights = [g for g in groups(tie="blocks", activations=[4]) if g[0].endswith("weights")]
    assert [len(group) for group in weights] == [1, 1, 2, 1, 1]
    assert [len(group) for group in groups(tie="blocks", activations="float")] == [1, 1, 2, 1, 1]
    assert [len(group) for group in groups(activations="follow")] == [2, 2, 1, 1]


def test_costs_are_hawqs() -> None:
    """Model sizes of ResNet-18 in MiB as in HAWQ-V3's programme: 19 layers, 10.62 Mi parameters."""
    space = Bits(model=RESNET18, weights=[4, 8], keep={"conv1": 8, "fc": 8})
    low, high = space.from_json([[4] * 16, [8] * 16])
    sizes = space.bit_costs(np.stack([low, high]))["model_mb"]
    fixed = (9_408 + 512_000) / 2**20
    inside = (11_678_912 - 9_408 - 512_000) / 2**20
    assert sizes == pytest.approx([inside / 2 + fixed, inside + fixed])


def test_bit_operations_and_stored_bytes() -> None:
    space = Bits(model=dict(VIT), weights=[2, 32], activations=[8, 32])
    whole = space.from_json([[32] * len(space.columns)])
    layers = space.layers.found
    found = {name: values[0] for name, values in space.bit_costs(whole).items()}
    assert found["gbops"] == pytest.approx(sum(layer.macs for layer in layers) * 32 * 32 / 1e9)
    state = space.source.build().state_dict()
    assert found["size_bytes"] == sum(t.numel() * t.element_size() for t in state.values())
    halved = space.bit_costs(space.from_json([[2, 8] * (len(space.columns) // 2)]))["gbops"][0]
    assert halved == pytest.approx(found["gbops"] / 64)


def test_no_bits_change_nothing() -> None:
    space = bits("resnet", weights=[2, 32], activations=[8, 32])
    model, given_back = space.source.build(), space.build([32] * len(space.columns))
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(images), given_back.eval()(images))
    assert [type(m) for m in model.modules()] == [type(m) for m in given_back.modules()]


def test_weights_take_so_many_values_and_inputs_too() -> None:
    space = Bits(model=dict(RESNET), weights=[2, 3], activations=[4])
    genotype = space.to_json(space.sample(np.random.default_rng(1), 1))[0]
    model = space.build(genotype)
    seen: dict[str, int] = {}
    for path, mine in space.layer_bits(genotype).items():
        layer = model.get_submodule(path)
        weight = layer.weight
        assert isinstance(weight, torch.Tensor)
        assert all(len(row.unique()) <= 2**mine.weights for row in weight.flatten(1))

        def count(module: nn.Module, inputs: tuple[torch.Tensor, ...], path: str = path) -> None:
            seen[path] = len(inputs[0].unique())

        layer.register_forward_pre_hook(count)
    model(torch.randn(2, 3, 32, 32))
    assert len(seen) == len(space.layers.found)
    assert all(1 < count <= 16 for count in seen.values())


def test_gradients_reach_the_weights_behind() -> None:
    space = Bits(model=dict(RESNET))
    layers = {path: LayerBits(weights=4, activations=8) for path in space.layer_bits([4] * len(space.columns))}
    model = quantise(space.source.build(), layers, space.quantiser)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    behind = [p for name, p in model.named_parameters() if name.endswith("parametrizations.weight.original")]
    assert len(behind) == len(layers)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in behind)


def test_layers_that_cannot_be_given_bits_are_listed() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.unused, self.table = nn.Linear(4, 4), nn.Linear(4, 4), nn.Embedding(3, 4)
            self.same = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.relu(self.first(x))
            return self.same(y) + self.same(y) + self.table.weight[0, :2]

    found = find_layers(Odd(), torch.zeros(1, 4))
    assert [layer.path for layer in found.found] == ["first", "same"]
    assert [layer.calls for layer in found.found] == [1, 2]
    assert set(found.left_alone) == {"unused", "table"}
    shared = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    shared[1].weight = shared[0].weight
    nn.utils.parametrizations.weight_norm(shared[2])
    rest = find_layers(shared, torch.zeros(1, 4))
    assert [layer.path for layer in rest.found] == ["3"]
    assert rest.left_alone["0"] == "shares its weight with 1"
    assert "computes its weight" in rest.left_alone["2"]
    halves = find_layers(nn.Sequential(nn.Linear(4, 4)).to(torch.bfloat16), torch.zeros(1, 4, dtype=torch.bfloat16))
    assert (halves.found[0].float_bytes, halves.other_bytes) == (32, 8)
    with pytest.raises(InputError, match="fails on an input of shape"):
        find_layers(Odd(), torch.zeros(1, 5))
    with pytest.raises(InputError, match="runs no linear"):
        find_layers(nn.ReLU(), torch.zeros(1, 5))


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_policies_and_genotypes_are_one(data: st.DataObject) -> None:
    space = _TIED
    genotype = [data.draw(st.sampled_from(column.choices)) for column in space.columns]
    policy = space.policy(genotype)
    assert set(policy) == {site.id for site in space.sites}
    assert space.genotype(policy) == genotype


_TIED = Bits(model=RESNET18, activations=[4, 8])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weights": [8, 4]}, r"space\.weights.*does not rise"),
        ({"weights": [1, 8]}, r"space\.weights: 1 is no width"),
        ({"activations": []}, r"space\.activations.*does not rise"),
        ({"keep": {"hed": 8}}, r"space\.keep\.hed.*head"),
        ({"keep": {"head": 9}}, r"space\.keep\.head.*no width"),
        ({"group": 0}, "group"),
        ({"group": 10**20}, "group"),
        ({"model": {**VIT, "in_channels": 5, "normalisation": "imagenet"}}, "of 3 channels"),
        ({"model": {**VIT, "dim": 10**12}}, r"space\.model.*cannot be built"),
        ({"model": {**VIT, "mlp_ratio": -1.0}}, "mlp_ratio"),
        ({"model": {**VIT, "seed": 10**22}}, "seed"),
    ],
)
def test_what_cannot_be_is_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        Bits(**{"model": dict(VIT), **options})


def test_tied_sites_and_unknown_ones() -> None:
    sites = [Site(id=name, kind="weight-bits", domain=(4, 8), tied="x") for name in "ab"]
    assert complete(sites, {}) == {"a": 8, "b": 8}
    with pytest.raises(InputError, match="are tied, and differ"):
        complete(sites, {"a": 4})
    with pytest.raises(InputError, match="for no site"):
        complete(sites, {"c": 4})
    with pytest.raises(InputError, match="not allowed there"):
        complete(sites, {"a": 5, "b": 5})
    other = Site(id="c", kind="weight-bits", domain=(2, 8), tied="x")
    with pytest.raises(InputError, match="one domain"):
        tied_groups([*sites, other])


def test_digests_follow_the_weights_not_their_place(tmp_path: Path) -> None:
    model = trained("resnet")
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(Path(model["weights"]).read_bytes())
    first, second, third = (Bits(model=m) for m in (model, {**model, "weights": str(copy)}, dict(RESNET)))
    assert first.digest == second.digest != third.digest
