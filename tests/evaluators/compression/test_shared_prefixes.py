"""Policies run together are what each is alone, bit for bit, and share what they have in common."""

from __future__ import annotations

import pytest
import torch
from tests.support.small_models import VIT
from torch import Tensor, nn

from archfront.errors import InputError
from archfront.evaluators.compression.shared_prefixes import SharedPrefixes
from archfront.spaces.models.registry import MODELS

MODELS_TRIED = [
    {"name": "cifar-resnet", "depth": 8},
    dict(VIT),
    {"name": "timm", "model": "resnet18", "resolution": 32},
    {"name": "timm", "model": "mobilenetv3_small_050", "resolution": 32},
    {"name": "timm", "model": "densenet121", "resolution": 32},
]


def scaled(_path: str, layer: nn.Module, factor: float, features: Tensor) -> Tensor:
    """A layer whose policy is what its output is multiplied by."""
    kept = type(layer).forward
    output: Tensor = kept(layer, features) * factor
    return output


def alone(model: nn.Module, policy: dict[str, float], images: Tensor) -> Tensor:
    handles = [
        model.get_submodule(path).register_forward_hook(lambda _m, _i, out, f=factor: out * f)
        for path, factor in policy.items()
    ]
    with torch.no_grad():
        output: Tensor = model(images)
    for handle in handles:
        handle.remove()
    return output


def layers_of(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]


@pytest.mark.parametrize("config", MODELS_TRIED, ids=lambda config: str(config.get("model", config["name"])))
def test_together_as_alone(config: dict[str, object]) -> None:
    source = MODELS.build(config, "model")
    model = source.build()
    paths = layers_of(model)
    shared = SharedPrefixes(model, paths, scaled)
    assert shared.shares
    images = torch.randn(2, source.in_channels, source.resolution, source.resolution)
    generator = torch.Generator().manual_seed(0)
    policies = [
        {path: float(torch.randint(1, 3, (), generator=generator)) / 2 + 0.5 for path in paths} for _ in range(6)
    ]
    policies += [dict(policies[0]), {**policies[0], paths[-1]: 7.0}]
    found = shared.outputs(images, policies)
    for policy, output in zip(policies, found, strict=True):
        assert torch.equal(output, alone(model, policy, images))
    # The last two: one is there already, the other differs in its last layer alone.
    assert shared.sharing.computed <= 6 * len(paths) + 1


def test_what_cannot_be_traced_is_run_as_a_whole() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            return self.second(y) if y.sum() > 0 else y

    torch.manual_seed(0)
    model = Branching().eval()
    with pytest.warns(UserWarning, match="cannot be traced"):
        shared = SharedPrefixes(model, ["first", "second"], scaled)
    assert not shared.shares
    inputs = torch.randn(3, 4)
    policies = [{"first": 1.0, "second": 2.0}, {"first": -1.0, "second": 2.0}]
    with pytest.warns(UserWarning, match="second did not run"):
        found = shared.outputs(inputs, policies)
    for policy, output in zip(policies, found, strict=True):
        assert torch.equal(output, alone(model, policy, inputs))


def test_values_that_are_written_in_place_are_not_shared() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.act = nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            y = self.act(self.first(x))
            y += 1
            z = self.second(y)
            y *= 2
            return z + nn.functional.relu(y, inplace=True)

    model = InPlace().eval()
    inputs = torch.randn(3, 4)
    policies = [{"first": 1.0, "second": factor} for factor in (1.0, 2.0, 3.0)]
    shared = SharedPrefixes(model, ["first", "second"], scaled)
    assert shared.shares
    for policy, output in zip(policies, shared.outputs(inputs, policies), strict=True):
        assert torch.equal(output, alone(model, policy, inputs))
    assert shared.sharing.computed == 4


def test_a_policy_names_every_layer() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).eval()
    with pytest.raises(InputError, match="lacks 1"):
        SharedPrefixes(model, ["0", "1"], scaled).outputs(torch.zeros(1, 2), [{"0": 1.0}])


def test_functions_that_work_in_place_are_run_as_a_whole() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            z = self.second(y)
            torch.sigmoid_(y)
            return z + y

    model = InPlace().eval()
    inputs = torch.randn(3, 4)
    policies = [{"first": 1.0, "second": factor} for factor in (1.0, 2.0, 3.0)]
    with pytest.warns(UserWarning, match="sigmoid_ works in place"):
        shared = SharedPrefixes(model, ["first", "second"], scaled)
    for policy, output in zip(policies, shared.outputs(inputs, policies), strict=True):
        assert torch.equal(output, alone(model, policy, inputs))


def test_no_layer_is_bypassed_and_outputs_that_are_no_logits_are_refused() -> None:
    encoder = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).eval()
    with pytest.warns(UserWarning, match="as a whole"):
        shared = SharedPrefixes(encoder, ["linear1", "linear2"], scaled)
    inputs = torch.randn(2, 3, 4)
    one, two = shared.outputs(inputs, [{"linear1": f, "linear2": 1.0} for f in (1.0, 2.0)])
    assert torch.allclose(one, encoder(inputs), atol=1e-5)
    assert not torch.allclose(one, two, atol=1e-2)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.only = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.only(x), x

    with pytest.raises(InputError, match="something else than one tensor"):
        SharedPrefixes(Two(), ["only"], scaled)
