from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from torch import nn

from archfront.errors import InputError
from archfront.spaces.blocks import NO_BLOCK, BlockSpace, block_descriptors
from archfront.spaces.fbnet import BLOCKS, PUBLISHED, FBNet, FBNetTiny
from archfront.spaces.registry import SPACES
from archfront.spaces.torchvision_compat import import_timm


def genotype(text: str) -> list[str]:
    return text.replace("|", " ").split()


def hooked_macs(model: nn.Module, shape: tuple[int, ...]) -> int:
    """Multiply-accumulates of convs and linears, counted here on their own."""
    total = 0

    def hook(module: nn.Module, _inputs: object, output: torch.Tensor) -> None:
        nonlocal total
        if isinstance(module, nn.Conv2d):
            total += module.weight[0].numel() * output[0].numel()
        elif isinstance(module, nn.Linear):
            total += module.in_features * module.out_features

    for module in model.modules():
        module.register_forward_hook(hook)
    model.eval()
    with torch.no_grad():
        model(torch.zeros(1, *shape, device="meta"))
    return total


@pytest.mark.parametrize(
    ("text", "head", "params", "macs"),
    [
        (PUBLISHED["fbnet-a"], 1504, 4.27029, 244.526),
        (PUBLISHED["fbnet-b"], 1984, 4.76667, 291.102),
        (PUBLISHED["fbnet-c"], 1984, 5.52542, 378.233),
    ],
)
def test_published_networks_have_their_published_size(text: str, head: int, params: float, macs: float) -> None:
    """mobile-vision's table, which counts conv and linear weights, and one operation per pooled value."""
    space = FBNet(head_channels=head)
    with torch.device("meta"):
        model = space.build(genotype(text))
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear)))
    assert round(weights / 1e6, 5) == params
    assert round((hooked_macs(model, (3, 224, 224)) + head * 49) / 1e6, 3) == macs


def test_closed_forms_equal_the_modules() -> None:
    for space in (FBNet(), FBNet(keep_expansion=True, width=0.5), FBNetTiny()):
        shapes = {shape.descriptor: shape for row in space._table for shape in row if not shape.is_identity}
        for spec in space.block_catalogue()[2:]:
            shape = shapes[spec.descriptor]
            with torch.device("meta"):
                block = space.build_block(spec.descriptor)
            assert sum(m.weight.numel() for m in block.modules() if isinstance(m, nn.Conv2d)) == shape.weights
            assert hooked_macs(block, spec.input_shape) == shape.macs


def test_fbnet_c_is_timms() -> None:
    timm = import_timm()
    theirs = timm.create_model("fbnetc_100", pretrained=False).eval()
    ours = FBNet(keep_expansion=True).build(genotype(PUBLISHED["fbnet-c"])).eval()
    assert sum(p.numel() for p in ours.parameters()) == 5_572_200
    state = theirs.state_dict()
    # Their blocks stand stage by stage in the same order as ours, so the tensors match one to one.
    assert [v.shape for v in state.values()] == [v.shape for v in ours.state_dict().values()]
    generator = torch.Generator().manual_seed(0)
    for name, value in state.items():
        if value.is_floating_point() and "running_var" not in name:
            value.copy_(torch.randn(value.shape, generator=generator) * 0.1 + (value.dim() == 1))
    theirs.load_state_dict(state)
    ours.load_state_dict(dict(zip(ours.state_dict(), state.values(), strict=True)))
    image = torch.randn(1, 3, 64, 64, generator=generator)
    with torch.no_grad():
        expected, actual = theirs(image), ours(image)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    with torch.device("meta"):
        model = FBNet(keep_expansion=True).build(genotype(PUBLISHED["fbnet-c"]))
    assert round(hooked_macs(model, (3, 224, 224)) / 1e6, 3) == 384.960


@pytest.mark.parametrize("mismatched_skip", ["conv", "forbid"])
def test_equal_keys_are_equal_networks(mismatched_skip: str) -> None:
    space = FBNetTiny(mismatched_skip=mismatched_skip)  # type: ignore[arg-type]
    rng = np.random.default_rng(1)
    population = space.sample(rng, 5)
    skips = rng.random(population.shape) < 0.4
    preserving = np.array([layer.preserves for layer in space._layers])
    population[skips & preserving] = BLOCKS.index("skip")
    canonical = space.canonical(population)
    assert np.any(population != canonical)
    assert space.keys(population) == space.keys(canonical)
    np.testing.assert_array_equal(space.canonical(canonical), canonical)
    image = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    for one, other in zip(space.to_json(population), space.to_json(canonical), strict=True):
        with torch.random.fork_rng():
            torch.manual_seed(3)
            first = space.build(one)
            torch.manual_seed(4)
            second = space.build(other)
        assert not torch.equal(first(image), second(image))
        second.load_state_dict(first.state_dict())
        assert torch.equal(first.eval()(image), second.eval()(image))


def test_other_keys_are_other_networks() -> None:
    """Skips only move within their run, and the order of the other blocks stays."""
    space = FBNetTiny()
    base = ["k3_e1"] * 12
    variants = [[*base[:position], "skip", *base[position + 1 :]] for position in range(12)]
    keys = space.keys(space.from_json(variants))
    first, second, third = set(keys[0:4]), set(keys[4:8]), set(keys[8:12])
    # A stage's first layer, where it changes the shape, is a conv in place of a skip, so it stands for itself.
    assert [len(first), len(second), len(third)] == [1, 2, 2]
    assert len(first | second | third) == 5
    swapped = space.keys(space.from_json([["k3_e3", "k5_e3", *base[2:]], ["k5_e3", "k3_e3", *base[2:]]]))
    assert swapped[0] != swapped[1]


@pytest.mark.parametrize(
    "space", [FBNet(), FBNetTiny(macro=[[16, 2, 1], [24, 3, 2], [24, 1, 2]])], ids=["full", "pairs"]
)
def test_canonical_equals_a_plain_sort(space: FBNet) -> None:
    population = space.sample(np.random.default_rng(0), 300)
    population[np.random.default_rng(1).random(population.shape) < 0.3] = BLOCKS.index("skip")
    for row, canonical in zip(space.to_json(population), space.to_json(space.canonical(population)), strict=True):
        expected, run = [], []
        for name, layer in [*zip(row, space._layers, strict=True), (None, None)]:
            if layer is not None and layer.preserves:
                run.append(name)
                continue
            expected += sorted(run, key=lambda choice: choice == "skip")
            run = []
            if name is not None:
                expected.append(name)
        assert canonical == expected


def test_config_builds_the_same_space_again() -> None:
    for space in (FBNet(width=0.75, classes=7), FBNetTiny(layers=10, blocks=["k3_e2", "k7_e4_g2", "skip"])):
        config = json.loads(json.dumps({"name": space.name, **space.config}))
        again = SPACES.build(config, "space")
        assert again.digest == space.digest
        assert again.size == space.size
    assert FBNetTiny().digest != FBNetTiny(layers=10).digest
    assert FBNet().size == 9**22


def test_blocks_of_a_network_compose_to_it() -> None:
    space = FBNetTiny()
    assert isinstance(space, BlockSpace)
    population = space.sample(np.random.default_rng(5), 6)
    population[0] = BLOCKS.index("skip")
    catalogue = space.block_catalogue()
    assert len({spec.descriptor for spec in catalogue}) == len(catalogue)
    indices = space.block_indices(population)
    assert indices.shape == (6, 14)
    for row, given in zip(indices, space.to_json(population), strict=True):
        model = space.build(given)
        specs = [catalogue[i] for i in row if i != NO_BLOCK]
        assert [spec.descriptor for spec in specs] == block_descriptors(space, given)
        blocks = [space.build_block(spec.descriptor) for spec in specs]
        assert sum(p.numel() for b in blocks for p in b.parameters()) == sum(p.numel() for p in model.parameters())
        for spec, block in zip(specs, blocks, strict=True):
            assert block.eval()(torch.zeros(2, *spec.input_shape)).shape == (2, *spec.output_shape)
        for before, after in itertools.pairwise(specs):
            assert before.output_shape == after.input_shape
    with pytest.raises(InputError, match="descriptor"):
        space.build_block("k3_e9")


def test_description_follows_the_shapes() -> None:
    space = FBNetTiny()
    rows = space.describe(["skip", "k3_e6", *["skip"] * 10])
    assert [rows[0].name, rows[1].name, rows[-1].shape] == ["stem", "stage1.0", (10,)]
    assert [(row.kind, row.size == 0) for row in rows[1:6]] == [
        ("skip", True),
        ("k3_e6", False),
        ("skip", True),
        ("skip", True),
        ("conv1x1", False),
    ]
    assert len(rows) == 15


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"blocks": ["k3_e1", "k4_e1"]}, r"space\.blocks\[1\].*k4_e1.*even"),
        ({"blocks": ["k3_e1", "conv"]}, r"space\.blocks\[1\].*'conv'.*k<kernel>"),
        ({"blocks": []}, r"space\.blocks"),
        ({"blocks": ["skip", "skip"]}, r"space\.blocks"),
        ({"macro": [[16, 1]]}, r"space\.macro.*channels, blocks, stride"),
        ({"macro": []}, r"space\.macro"),
        ({"macro": [[15, 2, 1]]}, r"space\.blocks.*k3_e1_g2.*groups"),
        ({"stem": [16]}, r"space\.stem"),
        ({"width": 0.0}, r"space\.width"),
        ({"resolution": 0}, r"space\.resolution"),
        ({"head_channels": -1}, r"space\.head_channels"),
        ({"layers": 2}, r"space\.layers"),
        ({"layers": 12, "macro": [[16, 1, 1]]}, r"space\.layers"),
        ({"mismatched_skip": "drop"}, r"space\.mismatched_skip"),
        ({"stages": 3}, r"space\.stages"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, object], field: str) -> None:
    with pytest.raises(InputError, match=field):
        SPACES.build({"name": "fbnet-tiny", **arguments}, "space")


def test_bad_genotypes_are_named() -> None:
    space = FBNetTiny(mismatched_skip="forbid")
    with pytest.raises(InputError, match=r"genotype\[4\] \(layer4\).*'skip'"):
        space.from_json([["skip"] * 12])
    with pytest.raises(InputError, match="12"):
        space.from_json([["skip"] * 11])
    with pytest.raises(InputError, match="Did you mean 'k3_e6'"):
        space.from_json([["k3_e66", *["k3_e1"] * 11]])


def test_a_million_genotypes_are_quick() -> None:
    """Draw, canonical form and key; about a second, so that the strategies are never what a search waits for."""
    from time import process_time

    space = FBNet()
    start = process_time()
    keys = space.keys(space.sample(np.random.default_rng(0), 200_000))
    assert process_time() - start < 1
    assert len(set(keys)) == 200_000


def test_spread_samples_have_every_depth() -> None:
    space = FBNetTiny()
    rng = np.random.default_rng(0)
    skip = space.blocks.index("skip")
    depths = (space.sample_spread(rng, 4000) != skip).sum(axis=1)
    shares = np.bincount(depths, minlength=13) / 4000
    assert shares.min() > 0.03, "every depth from 0 to 12 occurs about as often"
    uniform = (space.sample(rng, 4000) != skip).sum(axis=1)
    assert np.mean(uniform < 6) < 0.01
