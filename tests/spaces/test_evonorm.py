"""EvoNorm's space: published layers equal timm's, equal keys compute the same, canonical forms lose what is dead."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from archfront.errors import InputError
from archfront.spaces.evonorm import EvoNorm
from archfront.spaces.evonorm_anchors import Anchor
from archfront.spaces.evonorm_programmes import BINARY, NAMED, OPERATIONS, Programme, ProgrammeLayer
from archfront.spaces.torchvision_compat import import_timm

SPACE = EvoNorm(width=4, resolution=8, in_channels=1)
CHANNELS = 48


def layer(name: str, channels: int = CHANNELS, **settings: Any) -> ProgrammeLayer:
    """From the genotype, so that the way through the space is checked as well."""
    return ProgrammeLayer(SPACE.programme(SPACE.known[name]), channels, **settings)


def reference(name: str, channels: int, groups: int) -> nn.Module:
    import_timm()
    from timm.layers import evo_norm

    made: nn.Module = {
        "evonorm-b0": lambda: evo_norm.EvoNorm2dB0(channels),
        "evonorm-b2": lambda: evo_norm.EvoNorm2dB2(channels),
        "evonorm-s0": lambda: evo_norm.EvoNorm2dS0(channels, groups=groups),
        "evonorm-s1": lambda: evo_norm.EvoNorm2dS1(channels, groups=groups),
        "evonorm-s2": lambda: evo_norm.EvoNorm2dS2(channels, groups=groups),
        "bn-relu": lambda: nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU()),
    }[name]()
    return made


def difference(one: Tensor | None, other: Tensor | None) -> float:
    """The largest, relative to the largest value."""
    assert one is not None
    assert other is not None
    return float(((one - other).abs().max() / other.abs().max()).detach())


# Our name for each parameter of the reference. Batch normalisation's scale and shift stand before the ReLU.
PARAMETERS = {"weight": "weight", "bias": "bias", "v": "v1", "0.weight": "v1", "0.bias": "v0"}


@pytest.mark.parametrize("name", sorted(NAMED))
def test_named_programmes_are_the_published_layers(name: str) -> None:
    torch.manual_seed(0)
    groups = 24  # The largest up to 32 that divides 48; timm's layer must be told.
    ours = layer(name, epsilon=1e-3 if name == "evonorm-b0" else 1e-5)
    theirs = reference(name, CHANNELS, groups)
    pairs = [(getattr(ours, PARAMETERS[key]), parameter) for key, parameter in theirs.named_parameters()]
    with torch.no_grad():
        for mine, parameter in pairs:
            parameter.add_(0.3 * torch.randn(CHANNELS))
            mine.copy_(parameter)
    optimizers = [torch.optim.SGD([pair[i] for pair in pairs], lr=1e-3) for i in range(2)]
    for _ in range(20):
        images = torch.randn(6, CHANNELS, 7, 5) * torch.rand(6, 1, 1, 1) * 3 + 0.5
        weights = torch.randn_like(images)
        inputs = [images.clone().requires_grad_() for _ in range(2)]
        outputs = [module(one) for module, one in zip((ours, theirs), inputs, strict=True)]
        for output, optimizer in zip(outputs, optimizers, strict=True):
            optimizer.zero_grad()
            (output * weights).sum().backward()
        assert difference(*outputs) < 2e-6
        assert difference(*(one.grad for one in inputs)) < 1e-5
        for mine, parameter in pairs:
            assert difference(mine.grad, parameter.grad) < 1e-5
        for optimizer in optimizers:
            optimizer.step()
    ours.eval()
    theirs.eval()
    assert difference(ours(images), theirs(images)) < 2e-6


def test_batch_moments_differ_in_evaluation_and_others_do_not() -> None:
    torch.manual_seed(0)
    images = 3 * torch.randn(4, 8, 6, 6) + 1
    for name, moves in (("evonorm-b0", True), ("bn-relu", True), ("evonorm-s0", False)):
        module = layer(name, 8)
        trained = module(images)
        module.eval()
        assert torch.allclose(module(images), trained, atol=1e-3) is not moves, name
        one_by_one = torch.cat([module(image[None]) for image in images])
        assert torch.allclose(module(images), one_by_one, atol=1e-6)


def test_groups_are_lowered_until_they_divide_the_channels() -> None:
    assert [layer("evonorm-s0", c).groups for c in (64, 48, 40, 7, 33)] == [32, 24, 20, 7, 11]
    assert layer("evonorm-s0", 12, groups=8).groups == 6


def test_moments_of_half_precision_values_do_not_overflow() -> None:
    images = 400 * torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    for name in ("evonorm-b0", "evonorm-s0", "evonorm-s2", "bn-relu"):
        found = layer(name, 8)(images.half())
        assert found.dtype == torch.float16
        assert difference(found.float(), layer(name, 8)(images)) < 0.01, name


def test_without_activation_only_the_affine_is_left() -> None:
    module = ProgrammeLayer(NAMED["evonorm-b0"], 5, activation=False)
    assert {name for name, _ in module.named_parameters()} == {"weight", "bias"}
    assert not list(module.buffers())
    images = torch.randn(2, 5, 3, 3)
    assert torch.equal(module(images), images)
    assert not ProgrammeLayer(NAMED["evonorm-b0"], 5, zero_init=True)(images).any()


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_value_and_the_same_value_spread_out_have_equal_results(operation: str) -> None:
    """Values are kept small; spreading one over the input's shape first must not change what becomes of it."""
    torch.manual_seed(1)
    images = torch.randn(4, 6, 5, 5)
    for small in (("add", "v0", "v1"), ("mean_hw", "x"), ("mean_hwc", "x"), ("mean_hwg", "x"), ("std_bhw", "x")):
        inputs = ("n0", "x") if operation in BINARY else ("n0",)
        spread = ("n2", "x") if operation in BINARY else ("n2",)
        lines = [(operation, *inputs), ("mul", "x", "zeros"), ("add", "n0", "n1"), (operation, *spread)]
        plain = Programme.of(small, lines[0])  # type: ignore[arg-type]
        wide = Programme.of(small, *lines[1:])  # type: ignore[arg-type]
        one, other = ProgrammeLayer(plain, 6, groups=2)(images), ProgrammeLayer(wide, 6, groups=2)(images)
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_moments_are_what_their_names_say() -> None:
    torch.manual_seed(2)
    images = 2 * torch.randn(3, 6, 4, 4) + 1
    grouped = images.reshape(3, 2, 3, 4, 4)
    for axes, value, dimensions in (
        ("bhw", images, (0, 2, 3)),
        ("hw", images, (2, 3)),
        ("hwc", images, (1, 2, 3)),
        ("hwg", grouped, (2, 3, 4)),
    ):
        mean = value.mean(dimensions, keepdim=True)
        expected = {
            "mean": mean,
            "rms": (value.square().mean(dimensions, keepdim=True) + 1e-5).sqrt(),
            "std": ((value - mean).square().mean(dimensions, keepdim=True) + 1e-5).sqrt(),
        }
        for statistic, moment in expected.items():
            found = ProgrammeLayer(Programme.of((f"{statistic}_{axes}", "x")), 6, groups=2)(images)
            wanted = moment.expand(value.shape).reshape(images.shape)
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_elementwise_operations_are_what_their_names_say() -> None:
    values = torch.tensor([-9.0, -2.0, -0.25, 0.0, 0.5, 4.0]).view(1, 1, 2, 3)
    others = torch.tensor([2.0, -4.0, 0.5, 1.0, -1.0, 3.0]).view(1, 1, 2, 3)
    images = torch.cat([values, others], dim=0)
    unary = {
        "neg": -images,
        "sigmoid": 1 / (1 + (-images).exp()),
        "tanh": ((2 * images).exp() - 1) / ((2 * images).exp() + 1),
        "exp": math.e**images,
        "abs": images.abs(),
        "square": images * images,
        "sqrt": images.sign() * images.abs().sqrt(),
    }
    for operation, expected in unary.items():
        found = ProgrammeLayer(Programme.of((operation, "x")), 1)(images)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)
    logarithm = ProgrammeLayer(Programme.of(("log", "x")), 1)(others)
    torch.testing.assert_close(logarithm, others.abs().log(), atol=1e-5, rtol=1e-5)
    shifted = {
        "add": images + images.tanh(),
        "mul": images * images.tanh(),
        "div": others / others.tanh(),
        "max": torch.maximum(images, images.tanh()),
    }
    for operation, expected in shifted.items():
        layer = ProgrammeLayer(Programme.of(("tanh", "x"), (operation, "x", "n0")), 1)
        torch.testing.assert_close(layer(others if operation == "div" else images), expected)


@pytest.mark.parametrize("operation", ["log", "sqrt", "div"])
def test_slopes_at_zero_are_finite(operation: str) -> None:
    """v0 begins at 0, so its root, logarithm or reciprocal would have no gradient to begin with."""
    programme = Programme.of((operation, "x", "v0") if operation in BINARY else (operation, "v0"), ("add", "x", "n0"))
    module = ProgrammeLayer(programme, 3)
    module(torch.randn(2, 3, 4, 4)).square().mean().backward()
    assert module.v0.grad is not None
    assert torch.isfinite(module.v0.grad).all()


def test_equal_keys_compute_the_same() -> None:
    """Each raw genotype against the canonical one; and over a crowded space, so that many keys are equal."""
    space = EvoNorm(nodes=4, width=4)
    rng = np.random.default_rng(0)
    population = np.concatenate([space.sample(rng, 150), space.sample_spread(rng, 150)])
    images = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    for raw, genotype in zip(space.to_json(population), space.to_json(space.canonical(population)), strict=True):
        lines = [tuple(raw[i : i + 3]) if raw[i] in BINARY else tuple(raw[i : i + 2]) for i in range(0, len(raw), 3)]
        one = ProgrammeLayer(Programme.of(*lines), 4)(images)
        other = ProgrammeLayer(space.programme(genotype), 4)(images)
        torch.testing.assert_close(one, other, equal_nan=True)
    everything = space.sample(rng, 20_000)
    keys = space.keys(everything)
    # A key says what is computed: as many formulas as keys, up to the order of addition in their text.
    forms = {tuple(row) for row in space.canonical(everything).tolist()}
    assert len(forms) == len(set(keys)) < 15_000


def genotype(*lines: tuple[str, ...], nodes: int) -> list[str]:
    return [part for line in lines for part in (*line, "x")[:3]] + ["add", "x", "x"] * (nodes - len(lines))


def test_canonical_forms_lose_names_order_and_what_is_dead() -> None:
    space = EvoNorm(nodes=4, width=4)
    plain = genotype(("sigmoid", "x"), ("mul", "x", "n0"), ("std_hw", "x"), ("div", "n1", "n2"), nodes=4)
    others = {
        "order of nodes": genotype(("std_hw", "x"), ("sigmoid", "x"), ("mul", "x", "n1"), ("div", "n2", "n0"), nodes=4),
        "order of factors": genotype(
            ("sigmoid", "x"), ("mul", "n0", "x"), ("std_hw", "x"), ("div", "n1", "n2"), nodes=4
        ),
        "unused input": [*plain[:2], "v1", *plain[3:8], "n1", *plain[9:]],
    }
    expected = space.keys(space.from_json([plain]))
    for what, other in others.items():
        assert other != plain, what
        assert space.keys(space.from_json([other])) == expected, what
    swapped = [*plain[:-2], "n2", "n1"]
    assert space.keys(space.from_json([swapped])) != expected
    dead = [
        genotype(("exp", "v0"), ("exp", "n0"), ("square", "v1"), ("tanh", "x"), nodes=4),
        genotype(("tanh", "x"), ("div", "n0", "zeros"), ("tanh", "n1"), ("tanh", "x"), nodes=4),
    ]
    assert len(set(space.keys(space.from_json(dead)))) == 1
    assert space.programme(dead[1]) == Programme.of(("tanh", "x"))
    twice = genotype(("exp", "x"), ("exp", "x"), ("neg", "n1"), ("add", "n0", "n2"), nodes=4)
    once = genotype(("exp", "x"), ("neg", "n0"), ("abs", "x"), ("add", "n1", "n0"), nodes=4)
    assert space.keys(space.from_json([twice])) == space.keys(space.from_json([once]))
    assert len(space.programme(twice).nodes) == 3


def test_a_mutant_differs_in_one_node_and_a_child_takes_whole_nodes() -> None:
    rng = np.random.default_rng(3)
    parents, others = SPACE.sample(rng, 300), SPACE.sample(rng, 300)
    changed = (SPACE.mutate(rng, parents) != parents).reshape(300, SPACE.nodes, 3).any(axis=2)
    assert (changed.sum(axis=1) == 1).all()
    assert changed.any(axis=0).all()
    children = SPACE.crossover(rng, parents, others).reshape(300, SPACE.nodes, 3)
    first, second = ((children == p.reshape(300, SPACE.nodes, 3)).all(axis=2) for p in (parents, others))
    assert (first | second).all()
    assert 0.4 < first.mean() < 0.6


def test_spread_programmes_have_every_length() -> None:
    population = SPACE.sample_spread(np.random.default_rng(0), 300)
    lengths = [len(SPACE.programme(g).nodes) for g in SPACE.to_json(population)]
    assert set(lengths) == set(range(1, 11))


def test_every_anchor_takes_the_programme_in_all_its_places() -> None:
    torch.manual_seed(0)
    images = torch.randn(4, 1, 8, 8)
    for kind in ("resnet", "mobilenet", "efficientnet"):
        model = EvoNorm(anchor=kind, width=4, depth=2, resolution=8, in_channels=1).build(SPACE.known["evonorm-b0"])
        assert not any(isinstance(m, (nn.BatchNorm2d, nn.ReLU)) for m in model.modules())
        layers = [m for m in model.modules() if isinstance(m, ProgrammeLayer)]
        assert sum(m.programme is not None for m in layers) == {"resnet": 13}.get(kind, 14)
        assert sum(m.programme is None for m in layers) == {"resnet": 0}.get(kind, 6)
        assert any(not m.weight.any() for m in layers)
        assert model(images).shape == (4, 10)
        loud = SPACE.build_anchor(SPACE.known["evonorm-b0"], Anchor(kind=kind, width=4), zero_init=False)
        assert all(m.weight.all() for m in loud.modules() if isinstance(m, ProgrammeLayer))


def test_every_kind_of_bad_input_is_named() -> None:
    for settings, field in (
        ({"nodes": 0}, r"space\.nodes"),
        ({"resolution": 3}, r"space\.resolution"),
        ({"epsilon": 0.0}, r"space\.epsilon"),
        ({"momentum": 1.5}, r"space\.momentum"),
        ({"anchor": "vgg"}, r"anchor\.kind"),
        ({"depth": 0}, r"anchor\.depth"),
    ):
        with pytest.raises(InputError, match=field):
            EvoNorm(**settings)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"Members with a name: .*bn-relu"):
        SPACE.genotypes_of(["bn-rel"])
    assert "bn-relu" not in EvoNorm(nodes=7).known
    with pytest.raises(InputError, match="n0"):
        Programme.of(("exp", "n0"))
    with pytest.raises(InputError, match="Give 2"):
        Programme.of(("add", "x"))


def test_descriptions_show_the_formula() -> None:
    layers = SPACE.describe(SPACE.known["evonorm-s0"])
    assert layers[-1].details["formula"] == "(x * sigmoid(x * v1)) / std_hwg(x)"
    assert [row.name for row in layers] == ["n0", "n1", "n2", "n3", "n4", "affine"]
