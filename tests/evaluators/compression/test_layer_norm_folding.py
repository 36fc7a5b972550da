"""Folding scales into a layer normalisation changes neither float outputs nor any channel's codes."""

import copy

import pytest
import torch
from torch import Tensor, nn

from archfront.errors import InputError
from archfront.evaluators.compression.recovery.layer_norm_folding import fold_channel_scales
from archfront.spaces.policies.quantiser import ActivationQuantiser


def pair(affine: bool, bias: bool) -> tuple[nn.LayerNorm, list[nn.Linear], Tensor]:
    torch.manual_seed(0)
    norm = nn.LayerNorm(16, elementwise_affine=affine)
    if affine:
        with torch.no_grad():
            # Channels of very different ranges, as after the layer normalisations of vision transformers.
            norm.weight.copy_(torch.logspace(-1.5, 1.5, 16))
            norm.bias.copy_(torch.randn(16))
    readers = [nn.Linear(16, 24, bias=bias), nn.Linear(16, 8, bias=bias)]
    return norm, readers, torch.randn(6, 10, 16)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_outputs_stay_and_codes_are_those_of_channel_scales(affine: bool, bias: bool) -> None:
    norm, readers, inputs = pair(affine, bias)
    observer = ActivationQuantiser(6, channel_axis=2)
    before = norm(inputs).detach()
    observer.observe(before)
    observer.freeze()
    outputs = [reader(before).detach() for reader in readers]
    scale, zero_point = observer.scale, observer.zero_point
    codes = (torch.round(before / scale) + zero_point).clamp(0, 63)

    common = fold_channel_scales(norm, readers, scale, zero_point)
    after = norm(inputs).detach()
    for reader, expected in zip(readers, outputs, strict=True):
        assert float((reader(after).detach() - expected).norm() / expected.norm()) < 1e-5
    assert not torch.allclose(after, before)
    assert common.scale.shape == (1, 1)
    assert float(common.scale) == pytest.approx(float(scale.mean()), rel=1e-6)
    assert int(common.zero_point) == round(float(zero_point.double().mean()))
    # Unclipped: both clip at the ends of the channel's own range.
    moved = torch.round(after / common.scale) + common.zero_point
    unclipped = torch.round(before / scale) + zero_point
    # Values half-way between two codes may go either way, by the rounding of one bit.
    assert float((moved != unclipped).float().mean()) < 2e-3
    assert int((moved.clamp(0, 63) - codes).abs().max()) <= 1


def test_parameters_are_changed_in_place() -> None:
    norm, readers, _ = pair(True, True)
    held = [*norm.parameters(), *readers[0].parameters()]
    fold_channel_scales(norm, readers, torch.linspace(0.1, 2, 16), torch.arange(16))
    assert [id(p) for p in (*norm.parameters(), *readers[0].parameters())] == [id(p) for p in held]


def test_equal_channels_change_nothing() -> None:
    norm, readers, _ = pair(True, True)
    state = copy.deepcopy(norm.state_dict()), copy.deepcopy(readers[0].state_dict())
    fold_channel_scales(norm, readers, torch.full((16,), 0.25), torch.full((16,), 7))
    for module, before in zip((norm, readers[0]), state, strict=True):
        for name, tensor in module.state_dict().items():
            assert torch.equal(tensor, before[name])


def test_what_does_not_match_is_refused() -> None:
    norm, readers, _ = pair(True, True)
    ones = torch.ones(16)
    with pytest.raises(InputError, match="positive"):
        fold_channel_scales(norm, readers, ones - 1, ones)
    with pytest.raises(InputError, match="16 channels"):
        fold_channel_scales(norm, readers, ones[1:], ones)
    with pytest.raises(InputError, match="readers"):
        fold_channel_scales(norm, [nn.Linear(8, 8)], ones, ones)
    with pytest.raises(InputError, match="readers"):
        fold_channel_scales(norm, [], ones, ones)
