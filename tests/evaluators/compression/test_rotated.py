"""RSQ: a rotated network is the same function, tokens that receive attention count more, and rounding loses less."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.support.small_models import bits, data_of
from torch import Tensor, nn

from archfront.errors import InputError
from archfront.evaluators.compression.compressible import Compressible
from archfront.evaluators.compression.recovery.float_weights import float_weights
from archfront.evaluators.compression.recovery.gptq import gptq
from archfront.evaluators.compression.recovery.recovery import Case, inputs_of
from archfront.evaluators.compression.recovery.registry import RECOVERIES
from archfront.evaluators.compression.recovery.residual_stream import residual_stream
from archfront.evaluators.compression.recovery.rotated import Rsq, token_weights, weighted_hessian
from archfront.evaluators.compression.recovery.rotation import random_rotation
from archfront.evaluators.compression.recovery.rounding import Gptq
from archfront.evaluators.compression.scores.logits import cross_entropy
from archfront.spaces.models.registry import MODELS
from archfront.spaces.policies.measured_costs import measured_costs
from archfront.spaces.policies.quantised import float_weight, quantised_layers, with_float_weights
from archfront.spaces.policies.quantiser import Quantiser
from archfront.spaces.torchvision_compat import import_timm


def network_of(name: str, calibration: int = 64, **options: Any) -> Compressible:
    return Compressible(bits(name, **options), data_of(name), calibration)


def case_of(name: str, weights: int, calibration: int = 64, **options: Any) -> Case:
    network = network_of(name, calibration, **{"weights": [weights], "activations": "float"} | options)
    batches, labels = network.inputs("train", calibration)
    variant = network.space.variant([column.choices[0] for column in network.space.columns])  # type: ignore[attr-defined]
    student = network.space.transform(copy.deepcopy(network.model), variant, batches).eval()
    return Case(student=student, teacher=network.model, batches=batches, labels=labels)


def vision_transformer(**options: Any) -> nn.Module:
    """timm's, with gains, biases and tokens that matter."""
    import_timm()
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    model: nn.Module = VisionTransformer(
        img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=24, depth=2, num_heads=2, **options
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and "norm" in name:
                parameter.uniform_(0.3, 2)
            elif "token" in name or "pos" in name or name.endswith("bias"):
                parameter.normal_()
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("name", ["decoder", "vit"])
def test_a_rotated_network_is_the_same_function(name: str) -> None:
    network = network_of(name, activations="float")
    [batch], _ = network.inputs("validation", 32)
    rotated = copy.deepcopy(network.model)
    stream = residual_stream(rotated)
    stream.rotate(random_rotation(stream.width, seed=3))
    with torch.no_grad():
        torch.testing.assert_close(rotated(batch), network.model(batch), rtol=0, atol=1e-4)
    block = "blocks.1"
    [before], [after] = inputs_of(network.model, block, [batch]), inputs_of(rotated, block, [batch])
    assert float((after - before).abs().max()) > 0.1
    assert not any(isinstance(module, nn.LayerNorm) for module in rotated.modules())


@pytest.mark.parametrize(
    "options",
    [
        {"init_values": 0.3, "reg_tokens": 2},
        {"global_pool": "avg", "qkv_bias": False, "no_embed_class": True},
        {"class_token": False, "global_pool": "avg", "fc_norm": False, "proj_bias": False},
    ],
)
def test_variants_of_vision_transformers_are_the_same_function(options: dict[str, Any]) -> None:
    """Factors of channels are folded, other tokens are rotated, and means over tokens commute with it."""
    model = vision_transformer(**options)
    rotated = copy.deepcopy(model)
    stream = residual_stream(rotated)
    stream.rotate(random_rotation(24, seed=0))
    images = torch.randn(3, 1, 8, 8)
    torch.testing.assert_close(rotated(images), model(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pre_norm": True}, "norm_pre"),
        ({"qk_norm": True}, r"blocks\.0\.attn\.q_norm"),
        ({"global_pool": "max"}, "global_pool"),
        ({"final_norm": False}, "fc_norm"),
        ({"global_pool": "map", "class_token": False}, "global_pool"),
    ],
)
def test_other_streams_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=rf"recovery\.rsq.*{words}.*gptq"):
        residual_stream(vision_transformer(**options))


def test_other_networks_and_quantised_inputs_are_refused() -> None:
    resnet = MODELS.build({"name": "cifar-resnet", "depth": 8}, "model").build()
    with pytest.raises(InputError, match=r"recovery\.rsq.*neither the model 'decoder' nor"):
        residual_stream(resnet)
    case = case_of("decoder", 4, 8, activations="follow")
    with pytest.raises(InputError, match=r"blocks\.0\.attention\.q with quantised inputs.*activations to float"):
        Rsq().recover(case)
    rounded = case_of("decoder", 4, 8)
    Gptq().recover(rounded)
    with pytest.raises(InputError, match="'rsq' finds codes"):
        Rsq().recover(rounded)
    with pytest.raises(InputError, match=r"recovery\.damping"):
        RECOVERIES.build({"name": "rsq", "damping": -1}, "recovery")


@pytest.mark.parametrize("name", ["decoder", "vit"])
def test_float_weights_behind_codes_are_rotated(name: str) -> None:
    case = case_of(name, 4, 16)
    plain = copy.deepcopy(case.student)
    held = {path: float_weight(layer) for path, layer, _ in quantised_layers(case.student)}
    Rsq().recover(case)
    for path, layer, holder in quantised_layers(case.student):
        assert float_weight(layer) is held[path]
        assert holder.fixed is not None
        rows = layer.weight.detach().flatten(1)  # type: ignore[union-attr]
        assert all(len(row.unique()) <= 16 for row in rows)
    assert measured_costs(case.student, case.batches[0][:1])["model_mb"] == pytest.approx(
        measured_costs(plain, case.batches[0][:1])["model_mb"]
    )
    with torch.no_grad():
        own = case.teacher(case.batches[0])
        torch.testing.assert_close(with_float_weights(case.student)(case.batches[0]), own, rtol=0, atol=1e-4)
        # A copy that it was made of is as it was.
        assert torch.isfinite(plain(case.batches[0])).all()


def test_a_student_without_quantised_layers_is_left_to_the_bit() -> None:
    case = case_of("decoder", 32, 8)
    Rsq().recover(case)
    state = case.teacher.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in case.student.state_dict().items())


@pytest.mark.parametrize("name", ["decoder", "vit"])
def test_probabilities_are_those_of_the_networks_own_attention(name: str) -> None:
    """Mixing the values by them gives what the projection reads."""
    case = case_of(name, 32, 4)
    for attention in residual_stream(case.teacher).attentions:
        [features] = inputs_of(case.teacher, attention.reader, case.batches)
        probabilities = attention.probabilities(features).detach()
        assert probabilities.shape[1] == attention.heads
        torch.testing.assert_close(probabilities.sum(-1), torch.ones(probabilities.shape[:-1]))
        parts = case.teacher.get_submodule(attention.reader.rpartition(".")[0])
        layer = parts.v if name == "decoder" else parts.qkv
        assert isinstance(layer, nn.Linear)
        values = layer(features).chunk(1 if name == "decoder" else 3, -1)[-1]
        mixed = probabilities @ values.unflatten(-1, (attention.heads, -1)).transpose(1, 2)
        path = attention.reader.rpartition(".")[0] + ".proj"
        [read] = inputs_of(case.teacher, path, case.batches)
        torch.testing.assert_close(mixed.transpose(1, 2).flatten(2), read, rtol=1e-4, atol=1e-5)
        if name == "decoder":
            assert float(probabilities[..., 0, 1:].abs().max()) == 0


@pytest.mark.parametrize("name", ["decoder", "vit"])
def test_weighted_rounding_lowers_the_weighted_error(name: str) -> None:
    """On the layers' own inputs, against rounding for all tokens alike, and the other way round: in the mean of all
    layers, as GPTQ takes column after column and need not find the best codes of each."""
    case = case_of(name, 32, 128)
    stream = residual_stream(case.teacher)
    ratios, others = [], []
    for path, layer in case.teacher.named_modules():
        attention = stream.attention_of(path)
        if not isinstance(layer, nn.Linear) or attention is None:
            continue
        inputs = inputs_of(case.teacher, path, case.batches)
        weights = token_weights(case.teacher, attention, case.batches)
        assert weights[0].shape == inputs[0].shape[:2]
        assert float(weights[0].std()) > 0.1
        whole = layer.weight.detach()
        weighted, alike = (
            gptq(whole, weighted_hessian(layer, inputs, mine), Quantiser(bits=3))[2] - whole for mine in (weights, None)
        )

        def error(change: Tensor, by: Tensor, inputs: list[Tensor] = inputs) -> float:
            return float(((torch.cat(inputs) @ change.T).square().sum(-1) * by).sum())

        by, ones = torch.cat(weights), torch.ones(())
        ratios.append(error(weighted, by) / error(alike, by))
        others.append(error(alike, ones) / error(weighted, ones))
    assert len(ratios) == {"decoder": 12, "vit": 8}[name]
    assert sum(ratios) / len(ratios) < 0.98
    assert sum(others) / len(others) < 0.99


@pytest.mark.parametrize("bits_", [2, 3])
def test_a_decoder_loses_less_than_with_the_nearest_codes(bits_: int) -> None:
    network = network_of("decoder", activations="float")
    [batch], labels = network.inputs("validation", 128)
    case = case_of("decoder", bits_, 128)
    with torch.no_grad():
        own, nearest = (float(cross_entropy(model(batch), labels)) for model in (case.teacher, case.student))
        Rsq().recover(case)
        found = float(cross_entropy(case.student(batch), labels))
    assert own < found < own + 0.6 * (nearest - own)


def test_options_are_parts_of_it() -> None:
    """Neither rotation nor importance: plain GPTQ. The seed draws the rotation."""
    plain, without = case_of("decoder", 3, 32), case_of("decoder", 3, 32)
    Gptq().recover(plain)
    Rsq(rotate=False, importance=False).recover(without)
    assert _codes(plain) == _codes(without)
    weighted = case_of("decoder", 3, 32)
    Rsq(rotate=False).recover(weighted)
    assert _codes(weighted) != _codes(plain)
    rotated = []
    for seed in (0, 0, 1):
        case = case_of("decoder", 3, 32)
        case.seed = seed
        Rsq(importance=False).recover(case)
        rotated.append(_codes(case))
    assert rotated[0] == rotated[1] != rotated[2]


def test_weights_put_in_place_meanwhile_are_the_ones_behind() -> None:
    case = case_of("vit", 3, 4)
    layers = [layer for _, layer, _ in quantised_layers(case.student)]
    before = [layer.weight.detach().clone() for layer in layers]  # type: ignore[union-attr, operator]
    kinds = [type(layer) for layer in layers]
    with torch.no_grad(), float_weights([*layers, case.student.get_submodule("norm")]):
        for layer in layers:
            assert layer.weight is layer._parameters["weight"]
            layer._parameters["weight"].mul_(2)  # type: ignore[union-attr]
    assert [type(layer) for layer in layers] == kinds
    for layer, weight in zip(layers, before, strict=True):
        torch.testing.assert_close(layer.weight, 2 * weight)
    assert torch.isfinite(case.student(case.batches[0])).all()


def _codes(case: Case) -> list[list[float]]:
    return [
        holder.fixed.flatten().tolist() for _, _, holder in quantised_layers(case.student) if holder.fixed is not None
    ]
