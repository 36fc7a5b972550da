"""Where a network's structure can be cut, against what is known of the networks and what a cut of them does."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch_pruning
from torch import Tensor, nn
from torch.nn import functional

from archfront.errors import InputError
from archfront.spaces.models.cifar_resnet import ResNet
from archfront.spaces.policies.channel_groups import find_groups
from archfront.spaces.policies.site import Choice, Site
from archfront.spaces.policies.structure import KINDS, Structure, find_structure
from archfront.spaces.torchvision_compat import import_timm

DOMAIN = (0.25, 0.5, 1.0)
IMAGE = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def structure(model: nn.Module, example: Tensor, *kinds: str) -> Structure:
    return find_structure(model, example, dict.fromkeys(kinds or KINDS, DOMAIN))


def of_kind(found: Structure, kind: str) -> list[Site]:
    return [site for site in found.sites if site.kind == kind]


def members(found: Structure, kind: str = "channels") -> dict[str, tuple[str, ...]]:
    return {site.module: site.members for site in of_kind(found, kind)}


def timm_model(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    made: nn.Module = import_timm().create_model(name, pretrained=False, num_classes=10, **options)
    return made


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


class Lambda(nn.Module):
    """Layers by name, and what is done with them."""

    def __init__(self, forward: Callable[[Any, Tensor], Any], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self._forward = forward

    def forward(self, x: Tensor) -> Any:
        return self._forward(self, x)


def conv(incoming: int, outgoing: int, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(incoming, outgoing, 3, padding=1, **options)


class Block(nn.Module):
    """An inverted residual block: its three layers' widths are two groups, one of them that of the stream."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.expand, self.norm = nn.Conv2d(width, hidden, 1), nn.BatchNorm2d(hidden)
        self.depthwise = conv(hidden, hidden, groups=hidden)
        self.project = nn.Conv2d(hidden, width, 1)

    def forward(self, x: Tensor) -> Any:
        return x + self.project(torch.relu(self.depthwise(self.norm(self.expand(x)))))


def joined(self: Any, x: Tensor) -> Any:
    both = torch.cat([self.left(x), self.right(x) + self.other(x)], 1)
    return self.head(self.norm(both).relu().mean((2, 3)))


def gated(self: Any, x: Tensor) -> Any:
    value, gate = self.both(x).chunk(2, dim=1)
    return self.head((value * gate.sigmoid()).mean((2, 3)))


def padded(self: Any, x: Tensor) -> Any:
    return self.head(self.wide(x) + functional.pad(self.narrow(x), (0, 0, 0, 0, 2, 2)))


def residual() -> nn.Module:
    """A stem, two inverted residual blocks, and a flattened 2x2 image in front of two linear layers."""
    blocks = nn.Sequential(Block(4, 8), Block(4, 12))
    return nn.Sequential(conv(3, 4), blocks, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 7), nn.Linear(7, 5))


BRANCHES = {"left": conv(3, 4), "right": conv(3, 6), "other": conv(3, 6), "norm": nn.BatchNorm2d(10)}
GROUPED = [conv(3, 8), conv(8, 16, groups=4), nn.GroupNorm(2, 16), nn.ConvTranspose2d(16, 6, 2), conv(6, 5)]
INVERTED = {
    path: (n, 1, (path, path.replace("expand", "depthwise"))) for path, n in (("1.0.expand", 8), ("1.1.expand", 12))
}
EXACT: dict[str, tuple[nn.Module, dict[str, tuple[int, int, tuple[str, ...]]]]] = {
    # Two branches side by side, each of a width of its own, one of them added to a third layer's.
    "concatenation": (
        Lambda(joined, **BRANCHES, head=nn.Linear(10, 5)),
        {"left": (4, 1, ("left",)), "right": (6, 1, ("right", "other"))},
    ),
    "residual": (residual(), {"0": (4, 1, ("0", "1.0.project", "1.1.project")), **INVERTED, "4": (7, 1, ("4",))}),
    # Of the first layer only the channels that are not added to zeros.
    "padded": (
        Lambda(padded, wide=conv(3, 8), narrow=conv(3, 4), head=conv(8, 5)),
        {"wide": (4, 1, ("wide", "narrow"))},
    ),
    # The second half gates the first: channel i goes with channel i + 6.
    "gated": (Lambda(gated, both=conv(3, 12), head=nn.Linear(6, 5)), {"both": (12, 2, ("both",))}),
    # A convolution of 4 groups, a norm of 2: as many channels of every group must go, before and after them.
    "grouped": (nn.Sequential(*GROUPED), {"0": (8, 4, ("0",)), "1": (16, 4, ("1",)), "3": (6, 1, ("3",))}),
}
"""Networks of known groups: first layer -> channels, how many go at once, all layers."""


@pytest.mark.parametrize("name", EXACT)
def test_the_groups_of_small_networks(name: str) -> None:
    model, expected = EXACT[name]
    sites = structure(model, IMAGE, "channels").sites
    assert {s.module: (s.facts["channels"], s.facts["step"], s.members) for s in sites} == expected
    assert all(site.id == f"{site.module}:channels" and site.domain == DOMAIN for site in sites)


def test_a_resnet_with_padded_shortcuts_has_one_stream() -> None:
    """Option A adds the 16 channels of stage 1 to channels 8 to 23 of stage 2, and those to 16 more of stage 3.

    The number of zeros around them stands in the code. So a channel of one stage takes its likes in the others with
    it, and those that only zeros meet must stay: 16 can go in all, of 16, of 32 and of 64.
    """
    found = structure(ResNet(3, 10), IMAGE, "channels")
    stream = ("conv1", *(f"layer{stage}.{block}.conv2" for stage in (1, 2, 3) for block in range(3)))
    alone = {f"layer{stage}.{block}.conv1": 8 * 2**stage for stage in (1, 2, 3) for block in range(3)}
    assert members(found) == {"conv1": stream, **{path: (path,) for path in alone}}
    assert {site.module: site.facts["channels"] for site in found.sites} == {"conv1": 16, **alone}
    assert found.left_alone == {"linear": "its channels are the network's outputs"}


def test_a_cut_channel_is_one_that_nobody_reads() -> None:
    """Of ResNet-20 without a channel: as it is where no layer reads that channel. A wrong index would not be."""
    torch.manual_seed(0)
    network = ResNet(3, 10).eval()
    tensors = dict(network.state_dict())
    *groups, last = find_groups(network, IMAGE, [path for path, _ in network.named_modules()])
    assert (len(groups), last.writers) == (10, ("linear",))
    for group in groups:
        unread, without = dict(tensors), dict(tensors)
        for cut in group.cuts:
            gone = torch.from_numpy(cut.owners == group.units // 3)
            if cut.axis == 1 and cut.tensor.removesuffix(".weight") in group.readers:
                unread[cut.tensor] = unread[cut.tensor].index_fill(1, gone.nonzero()[:, 0], 0)
            without[cut.tensor] = without[cut.tensor].index_select(cut.axis, (~gone).nonzero()[:, 0])
        cut_output, output = (torch.func.functional_call(network, t, (IMAGE,)) for t in (without, unread))
        torch.testing.assert_close(cut_output, output, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(output, network(IMAGE), rtol=1e-3)


def test_a_resnet_with_projected_shortcuts_has_a_stream_for_each_stage() -> None:
    found = structure(timm_model("resnet18"), IMAGE, "channels")
    layers = [tuple(f"layer{stage}.{x}" for x in ("0.conv2", "0.downsample.0", "1.conv2")) for stage in (2, 3, 4)]
    streams = {of_stage[0]: of_stage for of_stage in (("conv1", "layer1.0.conv2", "layer1.1.conv2"), *layers)}
    alone = [f"layer{stage}.{block}.conv1" for stage in (1, 2, 3, 4) for block in (0, 1)]
    assert members(found) == streams | {path: (path,) for path in alone}
    assert list(found.left_alone) == ["fc"]


def cut_by_the_library(model: nn.Module, path: str, channels: list[int]) -> nn.Module:
    """A copy without these output channels of one layer, and what Torch-Pruning cuts with them."""
    network = copy.deepcopy(model)
    graph = torch_pruning.DependencyGraph().build_dependency(network, example_inputs=(IMAGE,), verbose=False)
    layer = network.get_submodule(path)
    graph.get_pruning_group(layer, graph.get_pruner_of_module(layer).prune_out_channels, channels).prune()
    return network


TO_CUT = ("resnet20", "resnet18", "mobilenetv2_035", "mobilenetv3_small_050", "densenet")


@pytest.mark.parametrize("name", [*TO_CUT, "concatenation", "residual", "gated"])
def test_the_library_cuts_what_a_site_says(name: str) -> None:
    """Without one unit every member, and no other layer, has fewer outputs; all units take ``params``."""
    ours = {
        "resnet20": ResNet(3, 10),
        "densenet": timm_model("densenet121", growth_rate=6, block_config=(2, 2), bn_size=2),
        **{name: model for name, (model, _) in EXACT.items()},
    }
    model = (ours[name] if name in ours else timm_model(name)).eval()
    found = structure(model, IMAGE, "channels")
    layers = {p: m for p, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    for site in found.sites:
        channels, step = int(site.facts["channels"]), int(site.facts["step"])
        network = cut_by_the_library(model, site.module, [1] if step == 1 else [1, 1 + channels // step])
        widths = {p: len(network.get_parameter(f"{p}.weight")) for p in layers}
        assert {p for p, layer in layers.items() if widths[p] < len(layer.weight)} == set(site.members)
        assert site.facts["params"] == (parameters(model) - parameters(network)) * channels / step
        assert network(IMAGE).shape == model(IMAGE).shape
    assert len({member for site in found.sites for member in site.members}) == len(layers) - 1


def test_groups_of_a_convolution_lose_as_many() -> None:
    """ResNeXt's convolutions of 32 groups: of 128 channels 32 go at once, one of each group."""
    network = timm_model("resnext50_32x4d")
    part = nn.Sequential(network.get_submodule("conv1"), network.get_submodule("layer1.0"), nn.AdaptiveAvgPool2d(1))
    found = structure(nn.Sequential(part, nn.Flatten(), nn.Linear(256, 10)).eval(), IMAGE, "channels")
    alone = {path: (path,) for path in ("0.0", "0.1.conv1", "0.1.conv2")}
    assert members(found) == {**alone, "0.1.conv3": ("0.1.conv3", "0.1.downsample.0")}
    inner = 128 * 4 * 9 + 2 * 128  # and of a layer without groups before it, or behind it
    assert found.sites[1].facts == {"channels": 128, "step": 32, "params": 64 * 128 + inner}
    assert found.sites[2].facts == {"channels": 128, "step": 32, "params": 128 * 256 + inner}


def test_a_vision_transformer() -> None:
    model = timm_model("vit_tiny_patch16_224", img_size=32)
    found = structure(model, IMAGE)
    width, hidden, blocks = 192, 768, [f"blocks.{i}" for i in range(12)]
    assert [len(of_kind(found, kind)) for kind in KINDS] == [0, 12, 12, 1, 12, 12]
    assert of_kind(found, "heads")[11].facts == {"heads": 3, "head_dim": 64, "params": 4 * width**2 + 3 * width}
    assert members(found, "heads") == {f"{b}.attn": (f"{b}.attn.qkv", f"{b}.attn.proj") for b in blocks}
    assert members(found, "mlp") == {f"{b}.mlp.fc1": (f"{b}.mlp.fc1", f"{b}.mlp.fc2") for b in blocks}
    assert of_kind(found, "mlp")[11].facts == {"width": hidden, "params": 2 * width * hidden + hidden}
    (stream,) = of_kind(found, "embedding")
    # All but the biases of what it is not the output of.
    assert stream.facts == {"width": width, "params": parameters(model) - 12 * (3 * width + hidden) - 10}
    layers = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    assert set(stream.members) == {"patch_embed.proj", "norm", "head", *(f"{b}.{x}" for b in blocks for x in layers)}
    sizes = {b: {"params": parameters(model.get_submodule(b))} for b in blocks}
    assert {site.module: site.facts for site in of_kind(found, "blocks")} == sizes
    assert [dict(site.facts) for site in of_kind(found, "tokens")] == [{"tokens": 5, "prefix": 1}] * 12
    assert not found.left_alone


def test_the_kinds_asked_for_and_no_others() -> None:
    model = timm_model("vit_tiny_patch16_224", img_size=32, depth=2)
    assert [site.kind[0] for site in structure(model, IMAGE, "tokens", "heads").sites] == ["t", "t", "h", "h"]
    heads = structure(model, IMAGE, "heads")
    hidden = {f"blocks.{i}.mlp.{name}" for i in range(2) for name in ("fc1", "fc2")}
    assert set(heads.left_alone) == {"pos_embed", "cls_token", "patch_embed.proj", "head"} | hidden
    assert heads.left_alone["head"] == "no site of the kinds asked for (heads) covers it"
    # What no other kind was asked for is a width like any other, but for the heads' own.
    widths = structure(model, IMAGE, "channels")
    assert [site.facts["channels"] for site in widths.sites] == [192, 768, 768]
    assert "kind heads" in widths.left_alone["blocks.0.attn.qkv"]
    assert structure(model, IMAGE, "mlp").left_alone["blocks.1.attn.proj"] == widths.left_alone["blocks.0.attn.qkv"]


@pytest.mark.parametrize("batch_first", [True, False])
def test_torchs_own_encoder(batch_first: bool) -> None:
    width, hidden, tokens = 12, 20, 7
    layer = nn.TransformerEncoderLayer(width, 3, hidden, batch_first=batch_first)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    model = nn.Sequential(nn.Linear(5, width), encoder, nn.Linear(width, 4))
    found = structure(model, torch.randn(1, tokens, 5) if batch_first else torch.randn(tokens, 1, 5))
    layers = ["1.layers.0", "1.layers.1"]
    assert members(found, "mlp") == {f"{p}.linear1": (f"{p}.linear1", f"{p}.linear2") for p in layers}
    assert members(found, "heads") == {f"{p}.self_attn": (f"{p}.self_attn", f"{p}.self_attn.out_proj") for p in layers}
    assert of_kind(found, "heads")[0].facts == {"heads": 3, "head_dim": 4, "params": 4 * width**2 + 3 * width}
    (stream,) = of_kind(found, "embedding")
    assert stream.facts["params"] == parameters(model) - 2 * (3 * width + hidden) - 4
    assert [site.module for site in of_kind(found, "blocks")] == layers
    assert [dict(site.facts) for site in of_kind(found, "tokens")] == [{"tokens": tokens, "prefix": 0}] * 2


class Attention(nn.Module):
    """By heads, with layers of its own for queries, keys and values; ``shared`` heads read one head's keys."""

    def __init__(self, width: int, heads: int, shared: int = 1) -> None:
        super().__init__()
        self.heads, self.shared = heads, shared
        self.q, self.proj = nn.Linear(width, width), nn.Linear(width, width)
        self.k, self.v = nn.Linear(width, width // shared), nn.Linear(width, width // shared)

    def forward(self, x: Tensor) -> Any:
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = (f(x).unflatten(-1, (self.heads // self.shared, -1)).transpose(1, 2) for f in (self.k, self.v))
        k, v = (t.repeat_interleave(self.shared, 1) for t in (k, v))
        return self.proj(functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class DecoderBlock(nn.Module):
    def __init__(self, width: int, hidden: int, **options: Any) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.RMSNorm(width)
        self.attention = Attention(width, 4, **options)
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Any:
        x = x + self.attention(self.norm1(x))
        y = self.norm2(x)
        return x + self.down(functional.silu(self.gate(y)) * self.up(y))


class Decoder(nn.Module):
    """Of text; its last layer has the weights of its first."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(11, 16), nn.Parameter(torch.randn(6, 16))
        self.layers = nn.ModuleList([DecoderBlock(16, 24, **options) for _ in range(2)])
        self.head = nn.Linear(16, 11, bias=False)
        self.head.weight = self.words.weight

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        x = self.words(tokens) + self.places
        for layer in self.layers:
            x = layer(x)
        return {"logits": self.head(x)}


WORDS = torch.arange(6)[None]


def test_a_decoder_of_text() -> None:
    model = Decoder()
    found = structure(model, WORDS)
    layers = ["layers.0", "layers.1"]
    assert members(found, "heads") == {
        f"{p}.attention": tuple(f"{p}.attention.{x}" for x in ("q", "proj", "k", "v")) for p in layers
    }
    assert of_kind(found, "heads")[1].facts == {"heads": 4, "head_dim": 4, "params": 4 * 16**2 + 3 * 16}
    assert members(found, "mlp") == {f"{p}.gate": (f"{p}.gate", f"{p}.up", f"{p}.down") for p in layers}
    assert of_kind(found, "mlp")[0].facts == {"width": 24, "params": 3 * 16 * 24}
    (stream,) = of_kind(found, "embedding")
    assert (stream.module, stream.facts["width"]) == ("words", 16)
    # The tied weight once; all but the three biases in each block.
    assert stream.facts["params"] == parameters(model) - 2 * 3 * 16
    assert {"words", "head", "layers.0.norm1", "layers.1.norm2", "layers.0.down"} <= set(stream.members)
    assert ([site.module for site in of_kind(found, "tokens")], found.left_alone) == (layers, {})


def test_heads_are_told_apart_by_what_they_do() -> None:
    class Fused(nn.Module):
        """Query, key and value of one head stand together, not those of all heads."""

        def __init__(self, heads: int, late: bool = False) -> None:
            super().__init__()
            self.num_heads, self.late, self.norm = heads, late, nn.LayerNorm(12)
            self.qkv, self.out = nn.Linear(12, 36), nn.Linear(12, 12)

        def forward(self, x: Tensor) -> Any:
            qkv = self.qkv(x if self.late else self.norm(x)).unflatten(-1, (self.num_heads, 3, -1))
            y = functional.scaled_dot_product_attention(*qkv.permute(3, 0, 2, 1, 4)).transpose(1, 2).flatten(2)
            return self.out(self.norm(y) if self.late else y)

    class Mixed(Fused):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x).roll(1, -1) + self.qkv(x)[..., :12].cumsum(-1)

    def found(attention: nn.Module) -> Structure:
        return structure(nn.Sequential(attention, nn.Linear(12, 3)), torch.randn(1, 5, 12), "heads")

    assert members(found(Fused(3)), "heads") == {"0": ("0.qkv", "0.out")}
    assert members(found(Fused(3, late=True)), "heads") == {"0": ("0.norm", "0.qkv", "0.out")}
    assert "has one head" in found(Fused(1)).left_alone["0.qkv"]
    assert "told apart" in found(Mixed(3)).left_alone["0.out"]
    left = structure(Decoder(shared=2), WORDS, "heads").left_alone["layers.0.attention.k"]
    assert "of its own for each of its 4 heads" in left


def test_blocks_are_what_can_be_skipped() -> None:
    both = Lambda(lambda self, x: self.a(x) + self.b(x), a=conv(4, 4), b=conv(4, 4))
    stages = [nn.Sequential(Block(4, 8), Block(4, 8)), nn.Sequential(Block(4, 6)), nn.Sequential(conv(4, 4), both)]
    found = structure(nn.Sequential(conv(3, 4), *stages, conv(4, 2)), IMAGE, "blocks")
    # Not the first stage, although it adds to its input too; not those that keep the shape, but not their input.
    assert [site.module for site in found.sites] == ["1.0", "1.1", "2.0"]
    resnet = structure(timm_model("resnet18"), IMAGE, "blocks")
    assert [site.module for site in resnet.sites] == ["layer1.0", *(f"layer{stage}.1" for stage in (1, 2, 3, 4))]
    # One with another in it, which it adds to its input, is one.
    outer = Lambda(lambda self, x: x + self.inner(x), inner=nn.Sequential(Block(4, 8), conv(4, 4)))
    nested = structure(nn.Sequential(conv(3, 4), outer, conv(4, 2)), IMAGE, "blocks")
    assert [site.module for site in nested.sites] == ["1"]


def halves(self: Any, x: Tensor) -> Any:
    first, second = self.a(x).split([2, 4], dim=1)
    return self.end(torch.cat([self.b(first), second], 1))


def recurrent(self: Any, x: Tensor) -> Any:
    return self.end(self.rnn(self.a(x).mean(3).transpose(1, 2))[0])


OUT = "its channels are the network's outputs"
LOST, FEW = "its channels cannot be followed", "its channels cannot be fewer"
LEFT: dict[str, tuple[nn.Module, dict[str, str]]] = {
    "added to the image": (
        Lambda(lambda self, x: self.b(x + self.a(x)), a=conv(3, 3), b=conv(3, 2)),
        {"a": f"{LOST} through all operations", "b": OUT},
    ),
    # The library numbers the parts in the order in which autograd comes to them.
    "split": (
        Lambda(halves, a=conv(3, 6), b=conv(2, 3), end=conv(7, 2)),
        {"a": f"{LOST} to b", "b": f"{LOST} to b", "end": OUT},
    ),
    "view": (Lambda(lambda self, x: self.b(self.a(x).view(x.shape)), a=conv(3, 3), b=conv(3, 2)), {"a": FEW, "b": OUT}),
    "slice": (Lambda(lambda self, x: self.b(self.a(x)[:, :2]), a=conv(3, 6), b=conv(2, 2)), {"a": "in part", "b": OUT}),
    "roll": (Lambda(lambda self, x: self.b(self.a(x).roll(1, 1)), a=conv(3, 4), b=conv(4, 2)), {"a": LOST, "b": OUT}),
    "an unknown layer": (
        Lambda(recurrent, a=conv(3, 4), rnn=nn.LSTM(4, 5, batch_first=True), end=nn.Linear(5, 2)),
        {"a": "come to rnn, a LSTM", "rnn": "no site", "end": OUT},
    ),
    "computed": (
        nn.Sequential(nn.utils.parametrizations.weight_norm(conv(3, 4)), conv(4, 2)),
        {"0.parametrizations.weight": "computes its weight from others", "1": OUT},
    ),
    "never run": (Lambda(lambda self, x: self.b(x), a=conv(3, 3), b=conv(3, 2)), {"a": "is never run", "b": OUT}),
    "one group": (nn.Sequential(conv(3, 4), nn.GroupNorm(4, 4), conv(4, 2)), {"0": "only go all at once", "2": OUT}),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_cannot_be_cut_is_left_alone_and_why(name: str) -> None:
    model, expected = LEFT[name]
    found = structure(model, IMAGE, "channels")
    assert set(found.left_alone) == set(expected)
    assert all(words in found.left_alone[path] for path, words in expected.items())
    assert not {path for site in found.sites for path in site.members} & set(expected)


def test_the_model_stays_as_it_was() -> None:
    model = timm_model("vit_tiny_patch16_224", img_size=32, depth=2).train()
    model.get_submodule("blocks.1").eval().requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    flags = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    tensors = [id(t) for t in model.state_dict(keep_vars=True).values()]
    drawn = torch.get_rng_state()
    with torch.no_grad():
        assert len(structure(model, IMAGE).sites) == 9
        assert not torch.is_grad_enabled()
    assert flags == ([m.training for m in model.modules()], [p.requires_grad for p in model.parameters()])
    assert tensors == [id(t) for t in model.state_dict(keep_vars=True).values()]
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(drawn, torch.get_rng_state())


def test_half_precision_and_frozen_weights_are_no_hindrance() -> None:
    found = structure(residual().bfloat16().requires_grad_(False), IMAGE.bfloat16(), "channels")
    assert members(found) == {path: layers for path, (_, _, layers) in EXACT["residual"][1].items()}


def decide(self: Any, x: Tensor) -> Any:
    if x.sum() > 0:
        raise ValueError("the image is too bright")
    return self.a(x)


STRANGE = [
    (Lambda(decide, a=conv(3, 2)), r"model: 'Lambda' fails on an input of shape \(1, 3, 32, 32\).*too bright"),
    (conv(4, 2), "model: 'Conv2d' fails on an input"),
    (Lambda(lambda self, x: self.a(x).argmax(1), a=conv(3, 2)), "cannot be followed.*no output depends on"),
    (Lambda(lambda self, x: self.a(x).detach(), a=conv(3, 2)), "cannot be followed.*Give a plain module"),
    (Lambda(lambda self, x: self.a(x) / 0, a=conv(3, 2)), "cannot be followed.*not finite"),
]


@pytest.mark.parametrize(("model", "words"), STRANGE)
def test_a_model_that_cannot_be_followed_is_named(model: nn.Module, words: str) -> None:
    with pytest.raises(InputError, match=words):
        structure(model, IMAGE.abs(), "channels")


DOMAINS: list[tuple[dict[str, tuple[Choice, ...]], str]] = [
    ({}, "domains.*asks for nothing.*channels"),
    ({"chanels": (0.5, 1.0)}, r"domains\.chanels.*Did you mean 'channels'"),
    ({"heads": ()}, r"domains\.heads: \(\) is empty"),
    ({"mlp": (0.5, 1.0, 1)}, r"domains\.mlp.*says a choice twice"),
]


@pytest.mark.parametrize(("domains", "words"), DOMAINS)
def test_domains_that_cannot_be_are_named(domains: dict[str, tuple[Choice, ...]], words: str) -> None:
    with pytest.raises(InputError, match=words):
        find_structure(conv(3, 2), IMAGE, domains)


def test_the_library_is_imported_late_and_changes_nothing() -> None:
    script = """
import random, sys, warnings, logging, torch, numpy
import archfront.spaces.policies.structure
assert "torch_pruning" not in sys.modules
def state():
    torch_state = torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads(), torch.initial_seed()
    rest = list(warnings.filters), logging.root.level, logging.root.handlers[:], random.getstate()
    return *torch_state, *rest, torch.get_rng_state().tolist(), str(numpy.random.get_state())
before = state()
import torch_pruning
assert state() == before
"""
    run = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
