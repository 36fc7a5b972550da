"""The evaluator of policies: what it reports is what a network built from the policy does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.small_models import DATA, RESNET, VIT, bits, digits

from archfront.errors import InputError
from archfront.evaluators.compression.compressible import Compressible
from archfront.evaluators.compression.evaluator import Compression
from archfront.evaluators.evaluator import Evaluated, EvaluationContext, Task
from archfront.spaces.choices import Choices
from archfront.spaces.policies.bits import Bits


def tasks(genotypes: list[Any], fidelity: int = 0, *, final: bool = False) -> list[Task]:
    return [
        Task(number=i, genotype=g, key=str(i), fidelity=fidelity, repeat=0, seed=0, final=final)
        for i, g in enumerate(genotypes)
    ]


def values(found: Any) -> list[Mapping[str, float]]:
    assert all(isinstance(one, Evaluated) for one in found)
    return [{name: metric.value for name, metric in one.metrics.items()} for one in found]


def test_accuracies_are_those_of_networks_built_from_the_policies() -> None:
    space = bits("resnet", weights=[2, 4, 8, 32], activations="float")
    context = EvaluationContext(space=space, data=DATA)
    genotypes = [*space.to_json(space.sample(np.random.default_rng(0), 4)), [32] * len(space.columns)]
    found = values(Compression().evaluate(tasks(genotypes), context))
    data = digits(RESNET)
    images, labels = data.part("validation")
    rights = []
    for genotype, metrics in zip(genotypes, found, strict=True):
        with torch.no_grad():
            right = space.build(genotype).eval()(data.normalised(images)).argmax(1) == labels
        rights.append(right.float())
        assert metrics["accuracy"] == pytest.approx(100 * float(right.float().mean()))
    assert found[-1]["accuracy_drop"] == 0
    for metrics, right in zip(found, rights, strict=True):
        assert metrics["accuracy_drop"] == pytest.approx(100 * float((rights[-1] - right).mean()), abs=1e-4)
    assert found[0]["model_mb"] == pytest.approx(space.bit_costs(space.from_json(genotypes[:1]))["model_mb"][0])


def test_the_deviation_is_that_of_the_paired_difference() -> None:
    space = bits("resnet", weights=[2, 32], activations="float")
    network = Compressible(space, digits(RESNET), 16)
    genotype = [32] * len(space.columns)
    genotype[1] = 2
    [judged] = network.judged("validation", [space.layer_bits(genotype)], None)
    batches, labels = network.inputs("validation")
    with torch.no_grad():
        own = torch.cat([network.model(b) for b in batches]).argmax(1) == labels
        after = torch.cat([space.build(genotype).eval()(b) for b in batches]).argmax(1) == labels
    difference = (own.float() - after.float()).numpy()
    assert judged.drop_std == pytest.approx(100 * difference.std(ddof=1) / np.sqrt(len(labels)), rel=1e-4)


def test_fidelity_is_a_number_of_images_and_final_tasks_alone_see_the_test_part() -> None:
    space = bits("vit")
    context = EvaluationContext(space=space, data=DATA)
    evaluator = Compression(fidelities=[10, 40])
    genotype = [8] * len(space.columns)
    [few], [more], [final] = (
        values(evaluator.evaluate(tasks([genotype], fidelity, final=last), context))
        for fidelity, last in ((10, False), (40, False), (40, True))
    )
    assert few["accuracy"] in {10.0 * k for k in range(11)}
    assert more["accuracy"] in {2.5 * k for k in range(41)}
    assert "test_accuracy" not in more
    [judged] = Compressible(space, digits(VIT), 256).judged("test", [space.layer_bits(genotype)], None)
    assert final["test_accuracy"] == judged.accuracy
    assert final["test_accuracy_drop"] == judged.drop


def test_activations_are_quantised_in_calibrated_ranges() -> None:
    space = bits("resnet", weights=[32], activations=[2, 8, 32])
    found = values(
        Compression().evaluate(
            tasks([[32, bits_] * len(space.layers.found) for bits_ in (2, 8, 32)]),
            EvaluationContext(space=space, data=DATA),
        )
    )
    two, eight, none = (metrics["accuracy_drop"] for metrics in found)
    assert none == 0
    assert abs(eight) < 2 < two


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"calibration": 10**6}, r"compression\.calibration.*train samples"),
        ({"fidelities": [10**6]}, r"compression\.fidelities.*validation samples"),
    ],
)
def test_more_images_than_there_are(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        Compression(**options).check(EvaluationContext(space=bits("vit"), data=DATA))


def test_what_it_cannot_serve() -> None:
    with pytest.raises(InputError, match="is missing"):
        Compression().check(EvaluationContext(space=bits("vit")))
    with pytest.raises(InputError, match="no policies, which"):
        Compression().check(EvaluationContext(space=Choices(columns={"a": [1, 2]}), data=DATA))
    with pytest.raises(InputError, match="does not rise"):
        Compression(fidelities=[20, 10])
    with pytest.raises(InputError, match=r"compression\.images"):
        Compression(images=0)


@pytest.mark.parametrize("model", ["tf_mobilenetv3_small_minimal_100", "nf_resnet26"])
def test_layers_with_a_forward_of_their_own_keep_it(model: str) -> None:
    """Convolutions that pad by themselves, or standardise their weight."""
    source = {"name": "timm", "model": model, "resolution": 32, "in_channels": 3, "classes": 10}
    space = Bits(model=source, weights=[4, 32], activations="float", keep={})
    network = Compressible(space, digits({**source, "resolution": 32}), 8)
    images = torch.randn(2, 3, 32, 32)
    for bits_ in (4, 32):
        genotype = [bits_] * len(space.columns)
        [found] = network.outputs(images, [space.layer_bits(genotype)])
        with torch.no_grad():
            assert torch.equal(found, space.build(genotype).eval()(images))


def test_kept_layers_beside_float_activations() -> None:
    space = bits("resnet", weights=[2, 8], activations="float", keep={"conv1": 8, "linear": 32})
    [found] = values(
        Compression().evaluate(tasks([[8] * len(space.columns)]), EvaluationContext(space=space, data=DATA))
    )
    assert abs(found["accuracy_drop"]) < 2
    macs = {layer.path: layer.macs for layer in space.layers.found}
    expected = sum(count * (32 if path == "linear" else 8) * 32 for path, count in macs.items()) / 1e9
    assert found["gbops"] == pytest.approx(expected)


def test_rows_that_are_not_finite_are_wrong() -> None:
    space = bits("resnet", weights=[8, 32], activations="float")
    network = Compressible(space, digits(RESNET), 16)
    bias = network._shared._network.get_submodule("linear").bias
    own = network.model.get_submodule("linear").bias
    assert isinstance(bias, torch.Tensor)
    assert isinstance(own, torch.Tensor)
    with torch.no_grad():
        bias[3] = torch.nan
        own[3] = torch.nan
    [judged] = network.judged("validation", [space.layer_bits([32] * len(space.columns))], 100)
    assert (judged.accuracy, judged.drop) == (0.0, 0.0)
