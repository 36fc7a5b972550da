"""Traces of modules: what they count, how they group, and what happens where tracing cannot go."""

import json
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from archfront.errors import InputError
from archfront.evaluators.latency.operators import call_bytes, describe, runnable
from archfront.evaluators.latency.tracing import SitePolicy, fusion_groups, trace
from archfront.spaces.named_models import build_model, input_shape
from archfront.spaces.torchvision_compat import import_timm


def conv_net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 5))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        x = x + self.out(torch.softmax(q @ k.transpose(1, 2) / 4, dim=-1) @ v)
        down: Tensor = self.down(nn.functional.gelu(self.up(x)))
        return x + down


class Undecided(nn.Module):
    """Which layer runs depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.a(x) if float(x.sum()) > 1e9 else self.b(x)
        return found


def test_a_trace_counts_what_is_known_by_hand() -> None:
    found = trace(conv_net(), (3, 8, 8), batch=2)
    assert found.params == 3 * 8 * 9 + 8 + 16 + 512 * 5 + 5
    assert found.macs == 2 * (8 * 8 * 8 * 27 + 512 * 5)
    conv = found.operators[0]
    assert conv.kind == "conv"
    assert (conv.read_bytes, conv.written_bytes) == (4 * (2 * 3 * 64 + 8 * 27 + 8), 4 * 2 * 8 * 64)
    assert conv.weight_bytes == 4 * (8 * 27 + 8)
    assert [operator.module for operator in found.operators[:3]] == ["0", "1", "2"]
    assert found.groups[conv.group] == "conv-norm-activation"
    assert found.modules == 6
    assert found.warnings == ()


def test_the_model_is_left_as_it_was() -> None:
    model = conv_net().train()
    model[1].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trace(model, (3, 8, 8))
    assert model.training
    assert not model[1].training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not model[0]._forward_hooks


def test_models_on_the_meta_device_and_large_ones_need_no_memory() -> None:
    with torch.device("meta"):
        model = nn.Sequential(*[nn.Linear(2**16, 2**16) for _ in range(4)])  # 64 GiB of weights
    found = trace(model, (2**16,))
    assert found.macs == 4 * 2**32
    assert found.weight_bytes == 4 * (2**32 + 2**16) * 4


def test_attention_and_mlp_are_groups() -> None:
    found = trace(Attention(), (10, 16))
    assert "attention" in found.groups
    assert "mlp" in found.groups
    assert {operator.tokens for operator in found.operators if operator.kind == "linear"} <= {10, None}


def test_groups_end_where_a_result_is_used_twice() -> None:
    # A convolution whose output goes both to its activation and to a residual sum cannot be swallowed.
    group, names = fusion_groups(["conv", "activation", "elementwise"], [[], [0], [0, 1]])
    assert group[0] != group[1]
    assert names[0] == "conv"
    group, names = fusion_groups(["conv", "norm", "activation"], [[], [0], [1]])
    assert group == [0, 0, 0]
    assert names == ["conv-norm-activation"]


def test_policies_mark_their_operators() -> None:
    found = trace(conv_net(), (3, 8, 8), policies={"0": SitePolicy(weight_bits=4, activation_bits=8, sparsity=0.5)})
    conv, norm = found.operators[:2]
    assert (conv.weight_bits, conv.activation_bits, conv.sparsity) == (4, 8, 0.5)
    assert (norm.weight_bits, norm.sparsity) == (32, 0.0)


def test_data_dependent_control_flow_is_traced_on_values_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    model = Undecided()
    found = trace(model, (4,))
    assert found.macs == 32
    assert "real tensors" in found.warnings[0]
    assert "Undecided" in caplog.text
    with torch.device("meta"):
        assert trace(Undecided(), (4,)).macs == 32


def test_a_wrong_input_shape_is_named() -> None:
    with pytest.raises(InputError, match=r"Sequential.*cannot run on an input of \(1, 4, 8, 8\)"):
        trace(conv_net(), (4, 8, 8))


@pytest.mark.parametrize(
    "name", ["resnet18", "vit_tiny_patch16_224", "efficientnet_b0", "swin_tiny_patch4_window7_224"]
)
def test_every_operator_of_a_network_can_run_alone(name: str) -> None:
    with torch.device("meta"):
        model = build_model(f"timm:{name}")
    found = trace(model, input_shape(model))
    small = {o.call: o for o in found.operators if o.macs < 20e6}
    for call, operator in small.items():
        assert call_bytes(call) == operator.read_bytes
        with torch.inference_mode():
            made = runnable(call)()
        if operator.written_bytes:
            tensors = [t for t in (made if isinstance(made, (tuple, list)) else [made]) if isinstance(t, Tensor)]
            assert sum(t.numel() * t.element_size() for t in tensors) == operator.written_bytes


def test_calls_are_canonical() -> None:
    x, w = torch.randn(2, 3), torch.randn(4, 3)
    one = describe("aten.mm.default", [x, w.t()], {})
    assert one == describe("aten.mm.default", [x + 1, torch.zeros(4, 3).t()], {})
    assert one != describe("aten.mm.default", [x, torch.zeros(3, 4)], {})
    assert json.loads(one)[1][1] == {"t": ["f32", [3, 4], [1, 3]]}
    with pytest.raises(ValueError, match=r"no operator aten\.nothing\.default"):
        runnable('["aten.nothing.default", [], {}]')


def test_unknown_models_are_named() -> None:
    with pytest.raises(InputError, match="resnet18"):
        build_model("timm:resnet19")
    with pytest.raises(InputError, match="timm:<model>"):
        build_model("resnet18")


@pytest.mark.slow
def test_multiply_adds_and_parameters_agree_with_torch_for_two_hundred_models() -> None:
    """Every sixth of timm's models, but those on which torch's own counter fails."""
    timm = import_timm()
    wrong, compared, refused = [], 0, []
    for name in timm.list_models()[::6]:
        with torch.device("meta"):
            model = timm.create_model(name).eval()
        shape = input_shape(model)
        counter = FlopCounterMode(display=False)
        try:
            with warnings.catch_warnings(), torch.no_grad(), counter:
                model(torch.empty(1, *shape, device="meta"))
        except Exception as error:
            refused.append(f"{name}: {error!r}")
            continue
        found = trace(model, shape)
        if any("lstm" in operator.target for operator in found.operators):
            continue  # torch has no formula for the fused kernel that a processor takes
        compared += 1
        params = sum(p.numel() for p in model.parameters())
        if (found.macs, found.params) != (counter.get_total_flops() // 2, params) or found.warnings:
            wrong.append((name, found.macs, counter.get_total_flops() // 2, found.warnings))
    assert wrong == []
    assert compared >= 200, refused
