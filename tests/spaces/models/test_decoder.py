"""The decoder: what it sees, what it weighs, and that it can be traced and read back."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, fx

from archfront.errors import InputError
from archfront.spaces.models.registry import MODELS

SMALL: dict[str, Any] = {"name": "decoder", "context": 12, "dim": 16, "depth": 3, "heads": 2}


def tokens(count: int, length: int = 12) -> Tensor:
    return torch.randint(96, (count, length), generator=torch.Generator().manual_seed(0))


def test_no_place_sees_a_later_one() -> None:
    model = MODELS.build(SMALL, "model").build()
    before = tokens(2)
    with torch.no_grad():
        logits = model(before)
        for place in range(12):
            after = before.clone()
            after[:, place] = (after[:, place] + 1) % 96
            changed = (model(after) - logits).abs().amax(dim=(0, 2))
            assert float(changed[:place].max() if place else 0) <= 1e-6
            # All later ones look back as far as here.
            assert float(changed[place:].min()) > 1e-5


@pytest.mark.parametrize("length", [12, 5])
def test_a_traced_graph_takes_any_number_of_rows(length: int) -> None:
    source = MODELS.build(SMALL, "model")
    model = source.build()
    traced = fx.symbolic_trace(model)
    with torch.no_grad():
        for count in (1, 3, 7):
            torch.testing.assert_close(traced(tokens(count, length)), model(tokens(count, length)), rtol=0, atol=0)
    paths = {node.target for node in traced.graph.nodes if node.op == "call_module"}
    layers = ("attention.q", "attention.k", "attention.v", "attention.proj", "mlp.fc1", "mlp.fc2")
    assert {f"blocks.2.{layer}" for layer in layers} | {"tokens", "head"} <= paths


@pytest.mark.parametrize(
    ("config", "shape", "outputs"),
    [
        (SMALL, (5, 12), (5, 12, 96)),
        ({"name": "decoder"}, (5, 64), (5, 64, 96)),
        ({"name": "cifar-resnet", "depth": 8}, (5, 3, 32, 32), (5, 10)),
        ({"name": "vit", "resolution": 8, "in_channels": 2}, (5, 2, 8, 8), (5, 10)),
    ],
)
def test_the_example_fits_the_network_on_any_device(
    config: dict[str, Any], shape: tuple[int, ...], outputs: tuple[int, ...]
) -> None:
    source = MODELS.build(config, "model")
    assert tuple(source.example().shape) == (1, *shape[1:])
    assert source.example().device.type == "cpu"
    with torch.device("meta"):
        given = source.architecture().eval()(source.example(5))
        assert source.example(5).device.type == "meta"
    assert tuple(source.example(5).shape) == shape
    assert not source.example(5).any()
    assert tuple(given.shape) == outputs


@pytest.mark.parametrize(
    ("context", "dim", "depth", "mlp_ratio", "classes"), [(64, 128, 4, 4, 96), (12, 16, 3, 2, 7), (1, 4, 1, 1, 1)]
)
def test_parameters_are_counted_in_closed_form(
    context: int, dim: int, depth: int, mlp_ratio: int, classes: int
) -> None:
    numbers = {"context": context, "dim": dim, "depth": depth, "mlp_ratio": mlp_ratio, "classes": classes}
    with torch.device("meta"):
        model = MODELS.build({"name": "decoder", **numbers}, "model").architecture()
    attention, mlp, norm = 4 * (dim * dim + dim), 2 * mlp_ratio * dim * dim + mlp_ratio * dim + dim, 2 * dim
    ends = (classes + context) * dim + norm + (dim + 1) * classes
    assert sum(p.numel() for p in model.parameters()) == ends + depth * (attention + mlp + 2 * norm)


def test_fresh_weights_are_a_function_of_the_seed_and_scaled_to_the_depth() -> None:
    config = {"name": "decoder", "depth": 8}
    first, again, other = (MODELS.build({**config, "seed": seed}, "model").build().state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])
    adding = ("attention.proj.weight", "mlp.fc2.weight")
    for name, tensor in first.items():
        if name.endswith("bias"):
            assert not tensor.any()
        elif "norm" not in name:
            expected = 0.02 / math.sqrt(16) if name.endswith(adding) else 0.02
            assert float(tensor.std()) == pytest.approx(expected, rel=0.05)
    with torch.no_grad():
        # About as sure of every token: a network that starts from near the uniform loss.
        assert float(MODELS.build(config, "model").build()(tokens(4, 64)).std()) < 1


def test_weights_are_read_back(tmp_path: Path) -> None:
    state = MODELS.build({**SMALL, "seed": 3}, "model").build().state_dict()
    save_file(state, tmp_path / "a.safetensors")
    source = MODELS.build({**SMALL, "weights": str(tmp_path / "a.safetensors")}, "model")
    assert all(torch.equal(tensor, state[name]) for name, tensor in source.build().state_dict().items())
    assert source.identity != MODELS.build(SMALL, "model").identity
    wider = MODELS.build({**SMALL, "context": 13, "weights": str(tmp_path / "a.safetensors")}, "model")
    with pytest.raises(InputError, match=r"model\.weights.*positions of shape \(12, 16\), not \(13, 16\)"):
        wider.build()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"heads": 3}, r"model\.heads: 3 does not divide dim 16"),
        ({"depth": 0}, r"model\.depth: 0 is not positive"),
        ({"mlp_ratio": 2.5}, r"model\.mlp_ratio"),
        ({"seed": -1}, r"model\.seed"),
        ({"normalisation": "half"}, r"model\.normalisation"),
    ],
)
def test_what_cannot_be_made_is_named(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        MODELS.build({**SMALL, **arguments}, "model")
