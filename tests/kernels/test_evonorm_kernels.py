"""EvoNorm's kernels, interpreted, against float64 from the same numbers, and as torch sees them. bfloat16 only
compiles: it is interpreted wrongly."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import GATES, guarded, poisoned, relative_error, worst_error
from torch import Tensor, nn

from archfront.kernels.modules.evonorm import EvoNormB0, EvoNormS0
from archfront.kernels.ops import evonorm
from archfront.kernels.ops.evonorm import Launch, evonorm_b0, evonorm_s0, plan_b0, plan_s0
from archfront.kernels.reference import evonorm as reference
from archfront.spaces.torchvision_compat import import_timm

HALF, FULL = torch.float16, torch.float32
OPERATORS = torch.ops.archfront
Shape = tuple[int, int, int, int]

# Of numpy, for which the sigmoid of far negative numbers passes through infinity.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")


def operands(shape: Shape, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x with an outlier channel and an image of zeros; v, running variance, weight and bias."""
    torch.manual_seed(sum(shape))
    channels = shape[1]
    x = torch.randn(shape) + torch.randn(channels, 1, 1)
    x[:, channels // 2] *= 50
    x[1:2] = 0
    return x.to(dtype), torch.randn(channels), torch.rand(channels) + 0.1, torch.randn(channels), torch.randn(channels)


def by_s0(given: tuple[Tensor, ...], groups: int, launch: Launch | None = None) -> Tensor:
    x, v, _, weight, bias = (guarded(tensor)[0] for tensor in given)
    out, strayed = poisoned(tuple(x.shape), x.dtype)
    evonorm.run_s0(x, v, weight, bias, out, groups=groups, eps=1e-5, launch=launch)
    assert not strayed()
    return out


def by_b0(given: tuple[Tensor, ...], launch: Launch | None = None) -> Tensor:
    out, strayed = poisoned(tuple(given[0].shape), given[0].dtype)
    evonorm.run_b0(*(guarded(tensor)[0] for tensor in given), out, eps=1e-3, launch=launch)  # type: ignore[misc, arg-type]
    assert not strayed()
    return out


def exact_s0(given: tuple[Tensor, ...], groups: int) -> Tensor:
    """float64, group by group."""
    x, v, _, weight, bias = (tensor.double() for tensor in given)
    parts = []
    for part in x.chunk(groups, 1):
        mean = part.mean((1, 2, 3), keepdim=True)
        parts.append(part / ((part - mean).square().mean((1, 2, 3), keepdim=True) + 1e-5).sqrt())
    return torch.cat(parts, 1) / (1 + (-x * v[:, None, None]).exp()) * weight[:, None, None] + bias[:, None, None]


def exact_b0(given: tuple[Tensor, ...]) -> Tensor:
    """float64."""
    x, v, running, weight, bias = (tensor.double() for tensor in given)
    deviation = ((x - x.mean((2, 3), keepdim=True)).square().mean((2, 3), keepdim=True) + 1e-3).sqrt()
    left = (running + 1e-3).sqrt()[:, None, None].expand_as(x)
    right = x * v[:, None, None] + deviation
    return x / torch.where(right > left, right, left) * weight[:, None, None] + bias[:, None, None]


def assert_close(found: Tensor, exact: Tensor) -> None:
    gate = GATES[found.dtype]
    assert relative_error(found, exact) <= gate
    # Rounding to dtype may take half a unit of the largest number.
    assert worst_error(found, exact) <= gate * max(1.0, float(exact.abs().max() / exact.square().mean().sqrt()))


@pytest.mark.parametrize("dtype", [FULL, HALF])
@pytest.mark.parametrize(
    ("shape", "groups"), [((2, 16, 7, 9), 4), ((3, 12, 7, 5), 4), ((1, 6, 1, 1), 6), ((2, 5, 3, 11), 1)]
)
def test_s0(shape: Shape, groups: int, dtype: torch.dtype) -> None:
    """Held whole, and in tiles of two sizes."""
    given, exact = operands(shape, dtype), exact_s0(operands(shape, dtype), groups)
    for launch in (plan_s0(torch.Size(shape), groups), *(plan_s0(torch.Size(shape), groups, 1, n) for n in (32, 128))):
        out = by_s0(given, groups, launch)
        assert_close(out, exact)
        assert torch.equal(out, by_s0(given, groups, launch))
    x, v, _, weight, bias = given
    assert_close(reference.evonorm_s0(x, v, weight, bias, groups=groups, eps=1e-5), exact)


@pytest.mark.parametrize("dtype", [FULL, HALF])
@pytest.mark.parametrize("shape", [(2, 16, 7, 9), (3, 13, 7, 5), (1, 6, 1, 1), (1, 1, 33, 1)])
def test_b0(shape: Shape, dtype: torch.dtype) -> None:
    given, exact = operands(shape, dtype), exact_b0(operands(shape, dtype))
    for launch in (plan_b0(torch.Size(shape)), *(plan_b0(torch.Size(shape), 0, tile) for tile in (16, 64))):
        out = by_b0(given, launch)
        assert_close(out, exact)
        assert torch.equal(out, by_b0(given, launch))
    assert_close(reference.evonorm_b0(*given, eps=1e-3), exact)


def test_large_groups_and_planes_are_read_in_tiles() -> None:
    shape = (1, 2, 65, 66)
    given = operands(shape, FULL)
    assert not plan_s0(torch.Size(shape), 1).constants["HELD"]
    assert_close(by_s0(given, 1), exact_s0(given, 1))
    plane = (1, 1, 91, 92)
    given = operands(plane, FULL)
    assert not plan_b0(torch.Size(plane)).constants["HELD"]
    assert_close(by_b0(given), exact_b0(given))


@pytest.mark.parametrize("tile", [None, 256])
def test_variances_survive_a_mean_far_from_zero(tile: int | None) -> None:
    """Where a mean of squares less the square of the mean leaves nothing of the variance. What of float32 itself is
    lost there is allowed for."""
    shape = (2, 8, 16, 16)
    x, *others = operands(shape, FULL)
    given = (torch.randn(shape) + 1000, *others)
    launches = (None, None) if tile is None else (plan_s0(x.shape, 4, 1, tile), plan_b0(x.shape, 0, tile))
    assert relative_error(by_s0(given, 4, launches[0]), exact_s0(given, 4)) <= 1e-4
    assert relative_error(by_b0(given, launches[1]), exact_b0(given)) <= 1e-4


def test_nan_shows_in_its_group_or_plane_and_nowhere_else() -> None:
    given = operands((2, 4, 3, 3), FULL)
    given[0][0, 1, 2, 2] = torch.nan
    s0, b0 = by_s0(given, 2), by_b0(given)
    assert s0[0, :2].isnan().all()
    assert s0[0, 2:].isfinite().all()
    assert b0[0, 1].isnan().all()
    assert b0[0, [0, 2, 3]].isfinite().all()
    assert s0[1].isfinite().all()
    assert b0[1].isfinite().all()


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5), st.integers(1, 19), st.integers(1, 19))
def test_odd_sizes(count: int, groups: int, width: int, height: int, across: int) -> None:
    *others, bias = operands((count, groups * width, height, across), FULL)
    # One number and a bias may nearly cancel.
    given = (*others, torch.zeros_like(bias))
    for found, exact in ((by_s0(given, groups), exact_s0(given, groups)), (by_b0(given), exact_b0(given))):
        # Of few numbers all may be less than float32 tells from zero.
        assert float((found.double() - exact).norm()) <= GATES[FULL] * max(1.0, float(exact.norm()))


def test_nothing_comes_of_no_images() -> None:
    given = operands((0, 4, 3, 3), HALF)
    assert by_s0(given, 2).shape == by_b0(given).shape == (0, 4, 3, 3)


def of_timm(name: str, channels: int, **settings: Any) -> Any:
    """A layer of timm's with random parameters and statistics."""
    import_timm()
    from timm.layers import evo_norm

    layer = getattr(evo_norm, name)(channels, **settings)
    for tensor in (*layer.parameters(), *layer.buffers()):
        tensor.data.copy_(torch.rand_like(tensor) + 0.2)
    return layer.eval()


@pytest.mark.parametrize("name", ["EvoNorm2dS0", "EvoNorm2dS0a", "EvoNorm2dB0"])
def test_layers_of_timm_are_the_same(name: str) -> None:
    torch.manual_seed(0)
    layer = of_timm(name, 12, groups=4)
    made: nn.Module = EvoNormB0.from_timm(layer) if name == "EvoNorm2dB0" else EvoNormS0.from_timm(layer)
    x = torch.randn(3, 12, 7, 9)
    torch.testing.assert_close(made(x), layer(x))
    torch.testing.assert_close(made.half()(x.half()).float(), layer(x), rtol=5e-3, atol=5e-3)
    assert not made.training
    assert not list(made.parameters())
    assert made(x.to(memory_format=torch.channels_last)).shape == x.shape
    other = EvoNormB0(12) if name == "EvoNorm2dB0" else EvoNormS0(12, 4, eps=layer.eps)
    other.load_state_dict(made.state_dict())
    assert torch.equal(other.half()(x), made(x))
    assert repr(other) == repr(made)


def test_other_layers_are_refused() -> None:
    for kind, layer, message in (
        (EvoNormS0, of_timm("EvoNorm2dB1", 4), "layer: EvoNorm2dB1 is not served; EvoNorm2dS0 or EvoNorm2dS0a is"),
        (EvoNormB0, of_timm("EvoNorm2dS0", 4, groups=2), "layer: EvoNorm2dS0 is not served; EvoNorm2dB0 is"),
        (EvoNormS0, of_timm("EvoNorm2dS0", 4, groups=2, apply_act=False), "layer: apply_act=False is not served"),
    ):
        with pytest.raises(ValueError, match=message):
            kind.from_timm(layer)


def calls(count: int) -> dict[str, tuple[tuple[Tensor, ...], dict[str, Any]]]:
    x, v, running, weight, bias = operands((count, 6, 5, 4), HALF)
    return {
        "evonorm_s0": ((x, v, weight, bias), {"groups": 3, "eps": 1e-5}),
        "evonorm_b0": ((x, v, running, weight, bias), {"eps": 1e-3}),
    }


@pytest.mark.parametrize("count", [0, 2])
@pytest.mark.parametrize("name", evonorm.OPERATORS)
def test_torch_accepts_the_operators(name: str, count: int) -> None:
    given, arguments = calls(count)[name]
    checks = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    results = torch.library.opcheck(getattr(OPERATORS, name).default, given, arguments, test_utils=checks)
    assert set(results.values()) == {"SUCCESS"}
    computed = getattr(evonorm, name)(*given, **arguments)
    shaped = getattr(evonorm, name)(*(tensor.to("meta") for tensor in given), **arguments)
    assert (shaped.device.type, shaped.shape, shaped.dtype) == ("meta", computed.shape, computed.dtype)
    assert shaped.stride() == computed.stride()


def test_they_compile_whole_and_export_for_any_number_of_images() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(EvoNormS0(8, 4), nn.Conv2d(8, 6, 3), EvoNormB0(6)).eval().requires_grad_(False)
    x = torch.randn(2, 8, 9, 9)
    compiled: Any = torch.compile(network, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), network(x))
    exported = torch.export.export(network, (x,), dynamic_shapes=({0: torch.export.Dim("n")},))
    targets = [node.target for node in exported.graph.nodes]
    assert {OPERATORS.evonorm_s0.default, OPERATORS.evonorm_b0.default} <= set(targets)
    other = torch.randn(5, 8, 9, 9)
    torch.testing.assert_close(exported.module()(other), network(other))


@pytest.mark.parametrize(
    ("position", "wrong", "message"),
    [
        (0, torch.zeros(6, 5, 4), r"x.shape: \(6, 5, 4\) is not served; \(n, c, h, w\)"),
        (0, torch.zeros(2, 6, 0, 4), r"x.shape: \(2, 6, 0, 4\)"),
        (0, torch.zeros(2, 6, 5, 4).double(), "x.dtype: torch.float64"),
        (0, torch.zeros(2, 6, 5, 4).to(memory_format=torch.channels_last), r"x.stride\(\): .* \.contiguous\(\)"),
        (1, torch.zeros(5), r"v.shape: \(5,\) is not served; \(c,\) with c = 6 of x"),
        (1, torch.zeros(6).int(), "v.dtype: torch.int32"),
        (-2, torch.zeros(6, device="meta"), "weight.device: meta is not served; cpu"),
        (-1, torch.zeros(12)[::2], r"bias.stride\(\): \(2,\)"),
    ],
)
def test_operands_that_are_not_served_are_refused(position: int, wrong: Tensor, message: str) -> None:
    for name in evonorm.OPERATORS:
        given, arguments = calls(2)[name]
        changed = list(given)
        changed[position] = wrong
        for function in (getattr(evonorm, name), getattr(OPERATORS, name).default):
            with pytest.raises(ValueError, match=message):
                function(*changed, **arguments)


def test_settings_that_are_not_served_are_refused() -> None:
    given, _ = calls(2)["evonorm_s0"]
    for groups in (0, 4, 12):
        with pytest.raises(ValueError, match=f"groups: {groups} is not served; a divisor of c = 6 of x is"):
            evonorm_s0(*given, groups=groups, eps=1e-5)
    for eps in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=f"eps: {eps} is not served; a number above 0 is"):
            evonorm_s0(*given, groups=2, eps=eps)
    large = torch.zeros(1, 2, 2**15, 2**15, device="meta")
    vectors = [torch.zeros(2, device="meta")] * 4
    with pytest.raises(ValueError, match=r"x.shape: .* c / groups \* h \* w below 1073741824"):
        evonorm_s0(large, *vectors[:3], groups=2, eps=1e-5)
    with pytest.raises(ValueError, match=r"x.shape: .* h \* w below 1073741824"):
        evonorm_b0(large, *vectors, eps=1e-3)


def test_costs_are_those_of_the_tensors() -> None:
    for name, cost_of, each in (
        ("evonorm_s0", reference.evonorm_s0_cost, 9),
        ("evonorm_b0", reference.evonorm_b0_cost, 10),
    ):
        given, _ = calls(2)[name]
        cost = cost_of((2, 6, 5, 4), dtype=HALF)
        assert cost.bytes == given[0].nbytes + sum(tensor.nbytes for tensor in given)
        assert cost.operations == each * given[0].numel()
