"""Folded ranges of channels: codes are those of a quantiser for each channel, and only safe places are folded."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tests.support.small_models import bits, data_of
from torch import Tensor, nn

from archfront.errors import InputError
from archfront.evaluators.compression.compressible import Compressible
from archfront.evaluators.compression.recovery.channel_wise_inputs import LayerNormFolding, readers_of_norms
from archfront.evaluators.compression.recovery.float_weights import float_weights
from archfront.evaluators.compression.recovery.recovery import Case
from archfront.evaluators.compression.recovery.registry import RECOVERIES
from archfront.evaluators.compression.recovery.rounding import Gptq
from archfront.spaces.policies.bits import Bits
from archfront.spaces.policies.quantised import LayerBits, float_weight, input_bits, quantise
from archfront.spaces.policies.quantiser import ActivationQuantiser, Quantiser

NORMS = {
    "vit": {
        "blocks.0.norm1": ["blocks.0.attn.qkv"],
        "blocks.0.norm2": ["blocks.0.mlp.fc1"],
        "blocks.1.norm1": ["blocks.1.attn.qkv"],
        "blocks.1.norm2": ["blocks.1.mlp.fc1"],
    },
    "decoder": {
        "blocks.0.norm1": ["blocks.0.attention.q", "blocks.0.attention.k", "blocks.0.attention.v"],
        "blocks.0.norm2": ["blocks.0.mlp.fc1"],
        "blocks.1.norm1": ["blocks.1.attention.q", "blocks.1.attention.k", "blocks.1.attention.v"],
        "blocks.1.norm2": ["blocks.1.mlp.fc1"],
        "norm": ["head"],
    },
}


def case_of(name: str, weights: int, activations: int, calibration: int = 64) -> Case:
    space = bits(name, weights=[weights], activations=[activations])
    network = Compressible(space, data_of(name), calibration)
    batches, labels = network.inputs("train", calibration)
    variant = space.variant([column.choices[0] for column in space.columns])
    student = space.transform(copy.deepcopy(network.model), variant, batches).eval()
    return Case(student=student, teacher=network.model, batches=batches, labels=labels)


def held_out(name: str, count: int) -> Tensor:
    [batch], _ = Compressible(Bits(model=bits(name).config["model"]), data_of(name), 1).inputs("validation", count)
    return batch


def noted_codes(model: nn.Module, readers: Sequence[str]) -> list[Tensor]:
    """What the input quantisers of layers will have given, call by call, as codes of 8 bits."""
    noted: list[Tensor] = []

    def note(ranges: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(ranges, ActivationQuantiser)
        noted.append(((inputs[0] / ranges.scale).round() + ranges.zero_point).clamp(0, 255))

    for ranges in {id(one): one for one in (model.get_submodule(f"{r}.input_quantiser") for r in readers)}.values():
        ranges.register_forward_pre_hook(note)
    return noted


@pytest.mark.parametrize("name", ["vit", "decoder"])
def test_a_folded_network_computes_as_with_a_quantiser_for_each_channel(name: str) -> None:
    case = case_of(name, weights=32, activations=8)
    by_channel, per_tensor = copy.deepcopy(case.student), copy.deepcopy(case.student)
    observed: list[ActivationQuantiser] = []

    class Noted(LayerNormFolding):
        def observed(self, norm: nn.LayerNorm, inputs: Sequence[Tensor], bits: int) -> ActivationQuantiser:
            observed.append(super().observed(norm, inputs, bits))
            return observed[-1]

    Noted().recover(case)
    for following, ranges in zip(NORMS[name].values(), observed, strict=True):
        assert ranges.channel_axis == -1
        assert len(ranges.scale) == 32
        for reader in following:
            by_channel.get_submodule(reader).add_module("input_quantiser", ranges)
    batch = held_out(name, 128)
    readers = [reader for readers in NORMS[name].values() for reader in readers]
    codes = [noted_codes(model, readers) for model in (by_channel, case.student)]
    with torch.no_grad():
        expected, found, before = (model(batch) for model in (by_channel, case.student, per_tensor))
    # A value between two codes falls to either side, as the processor rounds, and all that follows in its sample.
    flips = torch.stack([(one - other).abs().flatten(1).amax(1) for one, other in zip(*codes, strict=True)])
    alike = flips.amax(0) == 0
    assert len(flips) == len(readers)
    assert int(alike.sum()) >= 4
    assert float(flips[0].max()) <= 1
    torch.testing.assert_close(found[alike], expected[alike], rtol=0, atol=1e-4)
    assert float((before - expected).abs().max()) > 1e-2
    for reader in readers:
        made = case.student.get_submodule(reader).get_submodule("input_quantiser")
        assert isinstance(made, ActivationQuantiser)
        assert made.scale.shape == made.zero_point.shape == (1,)


def test_four_bits_lose_less_than_with_one_range_for_all_channels() -> None:
    case = case_of("vit", weights=32, activations=4, calibration=256)
    batch = held_out("vit", 256)
    with torch.no_grad():
        own = case.teacher(batch)
        before = float((case.student(batch) - own).square().mean())
        LayerNormFolding().recover(case)
        after = float((case.student(batch) - own).square().mean())
    assert after < 0.85 * before


def test_float_weights_behind_quantised_ones_are_folded() -> None:
    """Without input quantisers and weights' codes, the folded network is the float one."""
    case = case_of("vit", weights=4, activations=6)
    parameters = {path: float_weight(case.student.get_submodule(path)) for path in ("blocks.0.attn.qkv", "head")}
    LayerNormFolding().recover(case)
    for path, parameter in parameters.items():
        layer = case.student.get_submodule(path)
        assert float_weight(layer) is parameter
        assert len(layer.weight[0].unique()) <= 16  # type: ignore[union-attr, index]
    layers = [module for module in case.student.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    for layer in layers:
        layer._forward_pre_hooks.clear()
    batch = held_out("vit", 8)
    with torch.no_grad(), float_weights(layers):
        torch.testing.assert_close(case.student(batch), case.teacher(batch), rtol=0, atol=1e-4)


class Odd(nn.Module):
    """Normalisations that are read by a reader alone, by a shortcut too, by a float layer too, by a view, and twice."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.shortcut, self.mixed, self.viewed, self.twice, self.shared = (
            nn.LayerNorm(4) for _ in range(6)
        )
        self.a, self.b, self.c, self.d, self.e, self.f, self.g = (nn.Linear(4, 4) for _ in range(7))
        self.table = nn.Embedding(4, 4)
        self.g.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(self.plain(x))
        y = self.shortcut(x)
        x = y + self.b(y)
        y = self.mixed(x)
        x = self.c(y) + self.d(y)
        x = self.e(self.viewed(x)[:, :1])
        x = self.f(self.twice(x)) + self.f(self.twice(x + 1))
        shared: Tensor = self.g(self.shared(x)) + self.table(torch.zeros(1, dtype=torch.int64))
        return shared


def odd(activations: Sequence[str] = "abcefg", widths: Any = 4) -> nn.Module:
    torch.manual_seed(0)
    model = Odd().eval()
    wanted = {path: LayerBits(activations=widths) for path in activations}
    return quantise(model, wanted, lambda width: Quantiser(bits=width))


def test_a_normalisation_is_left_where_anything_else_reads_it() -> None:
    assert readers_of_norms(odd(), torch.randn(2, 3, 4)) == {"plain": ["a"]}
    assert readers_of_norms(odd("bcdefg"), torch.randn(2, 3, 4)) == {"mixed": ["c", "d"]}
    assert readers_of_norms(odd(""), torch.randn(2, 3, 4)) == {}


@pytest.mark.parametrize("name", ["vit", "decoder"])
def test_readers_are_found(name: str) -> None:
    case = case_of(name, weights=32, activations=8, calibration=8)
    assert readers_of_norms(case.student, case.batches[0]) == NORMS[name]


def test_readers_with_fewer_bits_have_the_same_range() -> None:
    model = odd("")
    quantise(model, {"c": LayerBits(activations=8), "d": LayerBits(activations=3)}, lambda width: Quantiser(bits=width))
    batches = [torch.randn(8, 3, 4)]
    with torch.no_grad():
        model.get_submodule("mixed").weight.copy_(torch.tensor([0.1, 1, 5, 30]))  # type: ignore[operator]
    LayerNormFolding(clip=100).recover(Case(student=model, teacher=odd(""), batches=batches, labels=torch.zeros(8)))
    first, second = (model.get_submodule(f"{path}.input_quantiser") for path in "cd")
    assert isinstance(first, ActivationQuantiser)
    assert isinstance(second, ActivationQuantiser)
    assert [input_bits(model.get_submodule(path)) for path in "cd"] == [8, 3]
    assert float(second.scale * 7) == pytest.approx(float(first.scale * 255), rel=1e-5)
    assert int(second.zero_point) == pytest.approx(int(first.zero_point) * 7 / 255, abs=0.5)


def test_no_scale_is_above_the_clip() -> None:
    norm = nn.LayerNorm(5, elementwise_affine=True)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 1, 1, 1, 100]))
    inputs = [torch.randn(100, 5)]
    whole, clipped = (LayerNormFolding(clip=clip).observed(norm, inputs, 8) for clip in (100, 75))
    assert float(whole.scale.max()) > 50 * float(whole.scale.median())
    assert float(clipped.scale.max()) == pytest.approx(float(whole.scale.sort().values[3]))
    assert torch.equal(clipped.zero_point, whole.zero_point)


def test_nothing_to_fold_changes_nothing_and_chosen_codes_are_not_left_behind() -> None:
    case = case_of("decoder", weights=4, activations=32, calibration=8)
    before = copy.deepcopy(case.student.state_dict())
    LayerNormFolding().recover(case)
    assert all(torch.equal(tensor, before[name]) for name, tensor in case.student.state_dict().items())
    case = case_of("decoder", weights=4, activations=8, calibration=8)
    Gptq().recover(case)
    with pytest.raises(InputError, match=r"layer-norm-folding.*finds codes.*blocks.0.attention.q"):
        LayerNormFolding().recover(case)
    assert isinstance(
        RECOVERIES.build({"name": "layer-norm-folding", "percentile": 99.0}, "recovery"), LayerNormFolding
    )
    with pytest.raises(InputError, match=r"recovery\.percentile"):
        RECOVERIES.build({"name": "layer-norm-folding", "percentile": 10}, "recovery")
