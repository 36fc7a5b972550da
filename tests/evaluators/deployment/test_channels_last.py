"""Int8 files with channels last compute what the same files in ONNX's own operators do."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional

from archfront.evaluators.deployment.channels_last import use_channels_last
from archfront.evaluators.deployment.int8_files import write_static
from archfront.evaluators.deployment.shortcuts import merge_shortcuts
from archfront.evaluators.onnx_files import export_onnx, outputs


class Residual(nn.Module):
    """Every kind of convolution between sums, and what is none between: pools, concatenations, a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.depthwise = nn.Conv2d(16, 16, 5, padding=2, groups=16, bias=False)
        self.dilated = nn.Conv2d(16, 16, 3, padding=2, dilation=2)
        self.uneven = nn.Conv2d(16, 12, (1, 3), stride=(2, 1), padding=(0, 1))
        self.other = nn.Conv2d(16, 12, 1, stride=(2, 1))
        self.squeeze = nn.Conv2d(12, 12, 1)
        self.last = nn.Conv2d(24, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.stem(x))
        x = functional.relu(self.grouped(x) + x)
        x = x + functional.relu6(self.depthwise(x))
        x = functional.relu(self.dilated(functional.max_pool2d(x, 2)))
        x = functional.relu(self.uneven(x)) + self.other(x)
        x = x * self.squeeze(x.mean(dim=(2, 3), keepdim=True))
        x = self.last(torch.cat([x, functional.avg_pool2d(x, 3, stride=1, padding=1)], dim=1))
        found: Tensor = self.head(functional.relu(x).mean(dim=(2, 3)))
        return found


class OptionA(nn.Module):
    """A shortcut without weights."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stride = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.stem(x))
        return self.stride(x) + functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 3, 5))


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(functional.relu(self.one(x) + self.two(x)))
        return found


def written(model: nn.Module, folder: Path) -> tuple[Path, list[str], Tensor]:
    """Its float file, the paths of its layers and a batch."""
    torch.manual_seed(0)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.normal_(layer.weight, std=1.5 / layer.weight[0].numel() ** 0.5)
    batch = torch.randn(4, 3, 12, 16)
    export_onnx(model.eval(), batch, folder / "float.onnx", any_batch=True)
    return folder / "float.onnx", [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)], batch


def counted(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(str(path)).graph.node)


@pytest.mark.parametrize("model", [Residual, OptionA])
def test_the_same_is_computed(model: type[nn.Module], tmp_path: Path) -> None:
    source, paths, batch = written(model(), tmp_path)
    before, after = tmp_path / "first.onnx", tmp_path / "last.onnx"
    write_static(source, before, [batch.numpy()], dict.fromkeys(paths))
    rewritten = onnx.load(str(before))
    use_channels_last(rewritten)
    onnx.save(rewritten, str(after))
    for count in (1, 3):
        expected, found = (outputs(file, "onnx", [batch[:count]], 1) for file in (before, after))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    own = outputs(source, "onnx", [batch], 1)
    assert float((outputs(after, "onnx", [batch], 1) - own).norm() / own.norm()) < 0.1


def test_convolutions_and_the_sums_between_them_keep_channels_last(tmp_path: Path) -> None:
    source, paths, batch = written(Residual(), tmp_path)
    target = tmp_path / "int8.onnx"
    write_static(source, target, [batch.numpy()], dict.fromkeys(paths), channels_last=True)
    found = counted(target)
    assert (found["QLinearConv"], found["Conv"]) == (len(paths) - 2, 1)
    assert (found["QLinearAdd"], found["Add"]) == (3, 0)
    assert (found["QLinearGlobalAveragePool"], found["ReduceMean"]) == (2, 0)


def test_what_reads_few_channels_stays_in_float_beside_others(tmp_path: Path) -> None:
    source, paths, batch = written(Residual(), tmp_path)
    target = tmp_path / "int8.onnx"
    given = [batch.numpy()]
    assert write_static(source, target, given, dict.fromkeys(paths), channels_last=True) == paths[1:]
    assert write_static(source, target, given, dict.fromkeys(paths)) == paths
    assert write_static(source, target, given, {"stem": None}, channels_last=True) == ["stem"]
    assert counted(target)["QLinearConv"] == 1


def test_an_activation_that_codes_do_not_hold_stays(tmp_path: Path) -> None:
    """A ReLU whose output has codes for what is below zero: without it these would be used."""
    source, paths, batch = written(Sum(), tmp_path)
    target = tmp_path / "int8.onnx"
    write_static(source, target, [batch.numpy()], dict.fromkeys(paths))
    model = onnx.load(str(target))
    [summed] = [node.output[0] for node in model.graph.node if node.op_type == "Add"]
    [quantiser] = [node for node in model.graph.node if node.op_type == "QuantizeLinear" and node.input[0] == summed]
    place = list(model.graph.node).index(quantiser)
    model.graph.node.insert(place, helper.make_node("Relu", [summed], ["cut"], "relu"))
    quantiser.input[0] = "cut"
    for zero, sums in ((0, 1), (64, 0)):
        constant = next(one for one in model.graph.initializer if one.name == quantiser.input[2])
        constant.CopyFrom(numpy_helper.from_array(np.array(zero, dtype=np.uint8), constant.name))
        onnx.save(model, str(target))
        expected = outputs(target, "onnx", [batch], 1)
        other = onnx.load(str(target))
        assert use_channels_last(other) == 3
        onnx.save(other, str(tmp_path / "last.onnx"))
        assert counted(tmp_path / "last.onnx")["QLinearAdd"] == sums
        np.testing.assert_allclose(outputs(tmp_path / "last.onnx", "onnx", [batch], 1), expected, rtol=1e-5, atol=1e-6)


def test_a_shortcut_becomes_a_convolution(tmp_path: Path) -> None:
    source, _, batch = written(OptionA(), tmp_path)
    expected = outputs(source, "onnx", [batch], 1)
    model = onnx.load(str(source))
    within = merge_shortcuts(model, list(model.graph.node))
    assert {node.op_type for node in within} == {node.op_type for node in model.graph.node}
    merged = tmp_path / "merged.onnx"
    onnx.save(model, str(merged))
    found = counted(merged)
    assert (found["Conv"], found["Slice"], found["Pad"]) == (3, 0, 0)
    np.testing.assert_allclose(outputs(merged, "onnx", [batch], 1), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("starts", "ends", "axes", "pads", "value"),
    [
        ([0, 0], [2**63 - 1] * 2, [2, 3], [0, 3, 0, 0, 0, 5, 0, 0], 1.0),
        ([0, 0], [2**63 - 1] * 2, [2, 3], [0, 3, 1, 0, 0, 5, 0, 0], 0.0),
        ([1, 0], [2**63 - 1] * 2, [2, 3], [0, 3, 0, 0, 0, 5, 0, 0], 0.0),
        ([0, 0], [6, 2**63 - 1], [2, 3], [0, 3, 0, 0, 0, 5, 0, 0], 0.0),
        ([0, 0], [2**63 - 1] * 2, [1, 2], [0, 3, 0, 0, 0, 5, 0, 0], 0.0),
    ],
    ids=["padded with ones", "rows padded", "from the second on", "to the sixth", "channels"],
)
def test_what_is_no_shortcut_computes_the_same(
    starts: list[int], ends: list[int], axes: list[int], pads: list[int], value: float, tmp_path: Path
) -> None:
    constants = {"starts": starts, "ends": ends, "axes": axes, "steps": [2, 2], "pads": pads}
    initializers = [numpy_helper.from_array(np.array(v, dtype=np.int64), k) for k, v in constants.items()]
    initializers.append(numpy_helper.from_array(np.array(value, dtype=np.float32), "value"))
    nodes = [
        helper.make_node("Slice", ["x", "starts", "ends", "axes", "steps"], ["sliced"], "slice"),
        helper.make_node("Pad", ["sliced", "pads", "value"], ["y"], "pad"),
    ]
    ends_ = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, s) for n, s in (("x", [1, 8, 9, 9]), ("y", None))]
    graph = helper.make_graph(nodes, "g", ends_[:1], ends_[1:], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    batch = torch.arange(648.0).reshape(1, 8, 9, 9)
    found = []
    for merged in (False, True):
        if merged:
            merge_shortcuts(model, nodes)
        onnx.save(model, str(tmp_path / f"{merged}.onnx"))
        found.append(outputs(tmp_path / f"{merged}.onnx", "onnx", [batch], 1))
    np.testing.assert_array_equal(found[1], found[0])
