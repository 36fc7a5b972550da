"""The fused inverted residual, interpreted, against float64 from the same numbers, and as torch sees it. bfloat16 only
compiles: it is interpreted wrongly."""

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import GATES, guarded, poisoned, relative_error, worst_error
from torch import Tensor, nn

from archfront.kernels.modules.inverted_residual import InvertedResidual
from archfront.kernels.ops import inverted_residual as ops
from archfront.kernels.ops.inverted_residual import inverted_residual
from archfront.kernels.reference import inverted_residual as reference
from archfront.kernels.reference.inverted_residual import fold_convolution
from archfront.spaces.fbnet_blocks import BlockKind, BlockShape, FBNetBlock

HALF, FULL = torch.float16, torch.float32
OPERATOR = torch.ops.archfront.inverted_residual.default
Shape = tuple[int, int, int, int]


class Operands(NamedTuple):
    """What ``inverted_residual`` takes, in order."""

    x: Tensor
    expand: Tensor | None
    expand_shift: Tensor | None
    depthwise: Tensor
    depthwise_shift: Tensor
    project: Tensor
    project_shift: Tensor


def operands(shape: Shape, hidden: int, channels: int, kernel: int, dtype: torch.dtype, *, expand: bool) -> Operands:
    """With an outlier channel of x and of the hidden ones, and a second image of zeros."""
    torch.manual_seed(sum(shape) + hidden + channels)
    channels_in = shape[1]
    x = torch.randn(shape)
    x[:, channels_in // 2] *= 50
    x[1:2] = 0
    first = torch.randn(hidden, channels_in) / channels_in**0.5
    first[hidden // 2] *= 50
    return Operands(
        x.to(dtype),
        first.to(dtype) if expand else None,
        torch.randn(hidden) if expand else None,
        (torch.randn(hidden, 1, kernel, kernel) / kernel).to(dtype),
        torch.randn(hidden),
        (torch.randn(channels, hidden) / hidden**0.5).to(dtype),
        torch.randn(channels),
    )


def by_kernel(given: Operands, stride: int, residual: bool) -> Tensor:
    count, _, height, width = given.x.shape
    shape = (count, len(given.project), -(-height // stride), -(-width // stride))
    out, strayed = poisoned(shape, given.x.dtype)
    amid = [tensor if tensor is None else guarded(tensor)[0] for tensor in given]
    ops.run_kernel(*amid, out, stride=stride, residual=residual)  # type: ignore[arg-type, misc]
    assert not strayed()
    return out


def exact(given: Operands, stride: int, residual: bool) -> Tensor:
    """float64, tap by tap."""
    x, expand, expand_shift, depthwise, depthwise_shift, project, project_shift = (
        tensor if tensor is None else tensor.double() for tensor in given
    )
    assert x is not None
    assert depthwise is not None
    y = x
    if expand is not None and expand_shift is not None:
        y = (torch.einsum("nchw,ec->nehw", x, expand) + expand_shift[:, None, None]).relu()
    kernel = depthwise.shape[-1]
    padded = nn.functional.pad(y, [kernel // 2] * 4)
    height, width = y.shape[2:]
    total = torch.zeros_like(y)
    for i in range(kernel):
        for j in range(kernel):
            total += padded[:, :, i : i + height, j : j + width] * depthwise[:, 0, i, j, None, None]
    hidden = (total[:, :, ::stride, ::stride] + depthwise_shift[:, None, None]).relu()  # type: ignore[index]
    result = torch.einsum("nehw,oe->nohw", hidden, project) + project_shift[:, None, None]  # type: ignore[index]
    return result + x if residual else result


def assert_close(found: Tensor, truth: Tensor) -> None:
    gate = GATES[found.dtype]
    assert relative_error(found, truth) <= gate
    # Rounding to dtype may take half a unit of the largest number.
    assert worst_error(found, truth) <= gate * max(1.0, float(truth.abs().max() / truth.square().mean().sqrt()))


@pytest.mark.parametrize("dtype", [FULL, HALF])
@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    ("shape", "hidden", "channels"), [((2, 12, 7, 9), 40, 12), ((1, 17, 8, 8), 17, 33), ((2, 5, 4, 3), 5, 5)]
)
def test_inverted_residual(
    shape: Shape, hidden: int, channels: int, stride: int, kernel: int, dtype: torch.dtype
) -> None:
    expand, residual = hidden != shape[1], stride == 1 and channels == shape[1]
    given = operands(shape, hidden, channels, kernel, dtype, expand=expand)
    truth = exact(given, stride, residual)
    out = by_kernel(given, stride, residual)
    assert_close(out, truth)
    assert torch.equal(out, by_kernel(given, stride, residual))
    assert_close(reference.inverted_residual(*given, stride=stride, residual=residual), truth)


def test_the_most_channels_that_are_served() -> None:
    given = operands((1, 64, 3, 3), 70, 64, 3, FULL, expand=True)
    assert_close(by_kernel(given, 1, True), exact(given, 1, True))


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 20), st.integers(1, 40), st.integers(1, 20), st.integers(1, 9), st.integers(1, 9), st.booleans())
def test_odd_sizes(channels_in: int, hidden: int, channels: int, height: int, width: int, expand: bool) -> None:
    hidden = hidden if expand else channels_in
    given = operands((1, channels_in, height, width), hidden, channels, 3, FULL, expand=expand)
    for stride in (1, 2):
        # Near zero a sum of a few numbers is their rounding.
        error = by_kernel(given, stride, False).double() - exact(given, stride, False)
        assert float(error.norm()) <= GATES[FULL] * max(1.0, float(exact(given, stride, False).norm()))


def test_a_nan_stays_one_where_its_taps_reach() -> None:
    given = operands((1, 4, 7, 7), 8, 4, 3, FULL, expand=True)
    given.x[0, 1, 3, 3] = torch.nan
    out = by_kernel(given, 1, False)
    assert out[0, :, 2:5, 2:5].isnan().all()
    out[0, :, 2:5, 2:5] = 0
    assert out.isfinite().all()


def test_nothing_comes_of_no_images() -> None:
    given = operands((0, 4, 5, 5), 8, 6, 3, HALF, expand=True)
    assert by_kernel(given, 2, False).shape == (0, 6, 3, 3)


def block(kind: BlockKind, channels: int, stride: int) -> Any:
    torch.manual_seed(0)
    made = FBNetBlock(BlockShape(kind, 8, channels, stride, 9, 9)).eval().requires_grad_(False)
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                assert tensor is not None
                tensor.copy_(torch.rand_like(tensor) + 0.1)
    return made


def folded(source: Any) -> InvertedResidual:
    layers = [fold_convolution(layer[0], layer[1]) for layer in source.body]
    expand = layers[0] if len(layers) == 3 else None
    stride = source.body[-2][0].stride[0]
    return InvertedResidual.from_folded(expand, layers[-2], layers[-1], stride=stride, residual=source.residual)


@pytest.mark.parametrize(("channels", "stride"), [(8, 1), (12, 2)])
@pytest.mark.parametrize("kind", [BlockKind(3, 6), BlockKind(5, 3), BlockKind(3, 1)])
def test_blocks_of_fbnet_are_the_same(kind: BlockKind, channels: int, stride: int) -> None:
    source = block(kind, channels, stride)
    made = folded(source)
    assert (made.expand is None) == (kind.expansion == 1)
    x = torch.randn(2, 8, 9, 9)
    torch.testing.assert_close(made(x), source(x), rtol=1e-5, atol=1e-5)
    assert not list(made.parameters())
    empty = InvertedResidual(
        8, 8 * kind.expansion, channels, kernel=kind.kernel, stride=stride, expand=kind.expansion != 1,
        residual=source.residual,
    )  # fmt: skip
    empty.load_state_dict(made.state_dict())
    assert torch.equal(empty(x), made(x))
    assert repr(empty) == repr(made)
    half = made.half()
    assert half.project.dtype == HALF
    assert half.project_shift.dtype == half.depthwise_shift.dtype == FULL
    torch.testing.assert_close(half(x.half()).float(), source(x), rtol=0.01, atol=0.01)


def test_a_convolutions_bias_is_folded() -> None:
    convolution, norm = nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6).eval()
    nn.init.uniform_(norm.weight, 0.5, 2)
    norm.running_var.uniform_(0.1, 2)  # type: ignore[union-attr]
    norm.running_mean.uniform_(-1, 1)  # type: ignore[union-attr]
    weight, shift = fold_convolution(convolution, norm)
    x = torch.randn(2, 4, 3, 3)
    found = nn.functional.conv2d(x, weight, shift)
    torch.testing.assert_close(found, norm(convolution(x)).detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [0, 2])
@pytest.mark.parametrize("expand", [False, True])
def test_torch_accepts_the_operator(count: int, expand: bool) -> None:
    given = operands((count, 6, 5, 4), 12 if expand else 6, 7, 3, HALF, expand=expand)
    arguments = {"stride": 2, "residual": False}
    checks = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    results = torch.library.opcheck(OPERATOR, tuple(given), arguments, test_utils=checks)
    assert set(results.values()) == {"SUCCESS"}
    computed = OPERATOR(*given, **arguments)
    shaped = OPERATOR(*(tensor if tensor is None else tensor.to("meta") for tensor in given), **arguments)
    assert (shaped.device.type, shaped.shape, shaped.dtype) == ("meta", computed.shape, computed.dtype)
    assert shaped.stride() == computed.stride()


def test_it_compiles_whole_and_exports_for_any_number_of_images() -> None:
    network = nn.Sequential(folded(block(BlockKind(3, 6), 8, 1)), folded(block(BlockKind(5, 1), 12, 2))).eval()
    x = torch.randn(2, 8, 9, 9)
    compiled: Any = torch.compile(network, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), network(x))
    exported = torch.export.export(network, (x,), dynamic_shapes=({0: torch.export.Dim("n")},))
    assert [node.target for node in exported.graph.nodes].count(OPERATOR) == 2
    other = torch.randn(5, 8, 9, 9)
    torch.testing.assert_close(exported.module()(other), network(other))


@pytest.mark.parametrize(
    ("field", "wrong", "message"),
    [
        ("x", torch.zeros(6, 5, 4), r"x.shape: \(6, 5, 4\) is not served; \(n, c, h, w\)"),
        ("x", torch.zeros(2, 65, 5, 4), r"x.shape: \(2, 65, 5, 4\) .* c of 1 to 64"),
        ("x", torch.zeros(2, 6, 5, 4).double(), "x.dtype: torch.float64"),
        ("x", torch.zeros(2, 6, 5, 4).to(memory_format=torch.channels_last), r"x.stride\(\): .* \.contiguous\(\)"),
        ("expand", None, "expand, expand_shift: one alone is not served; both or neither is"),
        (
            "expand",
            torch.zeros(12, 7),
            r"expand.shape: \(12, 7\) is not served; \(e, c\) with e = 12 of project",
        ),
        ("expand", torch.zeros(12, 6).half(), "expand.dtype: torch.float16 is not served; torch.float32"),
        ("expand_shift", torch.zeros(6), r"expand_shift.shape: \(6,\) is not served; \(12,\) is"),
        ("depthwise", torch.zeros(12, 1, 7, 7), r"depthwise.shape: \(12, 1, 7, 7\) is not served; \(12, 1, 3, 3\) or"),
        ("depthwise_shift", torch.zeros(12).half(), "depthwise_shift.dtype: torch.float16"),
        ("project", torch.zeros(65, 12), r"project.shape: \(65, 12\) .* o of 1 to 64"),
        ("project_shift", torch.zeros(6), r"project_shift.shape: \(6,\) is not served; \(7,\) is"),
        ("project_shift", torch.zeros(7, device="meta"), "project_shift.device: meta is not served; cpu"),
    ],
)
def test_operands_that_are_not_served_are_refused(field: str, wrong: Tensor | None, message: str) -> None:
    given = operands((2, 6, 5, 4), 12, 7, 3, FULL, expand=True)._asdict() | {field: wrong}
    for function in (inverted_residual, OPERATOR):
        with pytest.raises(ValueError, match=message):
            function(*given.values(), stride=1, residual=False)


def test_settings_that_are_not_served_are_refused() -> None:
    given = operands((2, 6, 5, 4), 12, 7, 3, FULL, expand=True)
    with pytest.raises(ValueError, match="stride: 3 is not served; 1 or 2 is"):
        inverted_residual(*given, stride=3, residual=False)
    with pytest.raises(ValueError, match="residual: True with stride 1, 6 channels in and 7 out is not served"):
        inverted_residual(*given, stride=1, residual=True)
    with pytest.raises(ValueError, match=r"project.shape: \(7, 12\) is not served; \(o, c\) with c = 6 of x"):
        inverted_residual(*given._replace(expand=None, expand_shift=None), stride=1, residual=False)
    image = torch.zeros(1, 6, 2**14, 2**14, device="meta")
    others = [tensor if tensor is None else tensor.to("meta") for tensor in given[1:]]
    with pytest.raises(ValueError, match=r"x.shape: .* max\(c, o\) \* h \* w below 1073741824"):
        inverted_residual(image, *others, stride=1, residual=False)  # type: ignore[arg-type]


@pytest.mark.parametrize("expand", [False, True])
def test_costs_are_those_of_the_tensors(expand: bool) -> None:
    hidden = 12 if expand else 6
    given = operands((2, 6, 5, 4), hidden, 6, 3, HALF, expand=expand)
    out = inverted_residual(*given, stride=1, residual=True)
    kind: dict[str, Any] = {"kernel": 3, "stride": 1, "expand": expand, "residual": True, "dtype": HALF}
    cost = reference.inverted_residual_cost((2, 6, 5, 4), hidden=hidden, channels=6, **kind)
    assert cost.bytes == sum(tensor.nbytes for tensor in (*given, out) if tensor is not None)
    macs = BlockShape(BlockKind(3, hidden // 6), 6, 6, 1, 5, 4).macs
    # Of a pixel, shifts and comparisons of the hidden channels; shift and x of the last.
    others = hidden * 2 * (1 + expand) + 6 * 2
    assert cost.operations == 2 * (2 * macs + 20 * others)
