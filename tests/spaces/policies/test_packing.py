"""Packing: exact for every width and length, in the layout that is documented, and as large as computed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from archfront.errors import InputError
from archfront.spaces.policies.packing import LAYOUT_VERSION, pack, packed_bytes, quantised_bytes, unpack
from archfront.spaces.policies.quantiser import BITS, Quantiser


@pytest.mark.parametrize("bits", BITS)
def test_every_width_and_length_returns_to_the_bit(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    for length in range(35):
        for low in (0, -(2 ** (bits - 1))):
            codes = torch.randint(low, low + 2**bits, (2, 3, length), generator=generator, dtype=torch.int16)
            packed = pack(codes, bits, low)
            assert packed.dtype == torch.uint8
            assert packed.shape == (2, 3, -(-length * bits // 8))
            assert torch.equal(unpack(packed, bits, length, low), codes)


@settings(max_examples=100, deadline=None)
@given(bits=st.sampled_from(list(BITS)), data=st.data())
def test_the_bytes_are_a_little_endian_number(bits: int, data: st.DataObject) -> None:
    codes = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=1, max_size=40))
    number = sum(code << (i * bits) for i, code in enumerate(codes))
    expected = number.to_bytes(packed_bytes(len(codes), bits), "little")
    packed = pack(torch.tensor(codes), bits)
    assert bytes(packed.tolist()) == expected
    assert unpack(packed, bits, len(codes)).tolist() == codes


def test_version_1_stays_what_it_is() -> None:
    assert LAYOUT_VERSION == 1
    assert pack(torch.tensor([1, 2, 3, 4, 5]), 3).tolist() == [0b11010001, 0b01011000]
    assert pack(torch.tensor([-2, -1, 0, 1, 1]), 2, -2).tolist() == [0b11100100, 0b11]


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_bytes_are_those_of_the_tensors(granularity: str, symmetric: bool) -> None:
    for bits in BITS:
        for kind, size in (("float32", 4), ("float16", 2)):
            quantiser = Quantiser(bits, symmetric, granularity, 5, scale_type=kind)  # type: ignore[arg-type]
            values = torch.randn(6, 2, 3, 2, generator=torch.Generator().manual_seed(0))
            parameters = quantiser.parameters(values)
            packed = pack(quantiser.codes(values, parameters).flatten(1), bits, quantiser.low)
            zero_points = 0 if symmetric else parameters.zero_point.numel()
            expected = packed.numel() + parameters.scale.numel() * size + zero_points
            assert quantised_bytes(values.shape, quantiser) == expected
    assert quantised_bytes((64, 3, 3, 3), Quantiser(4)) == 64 * 14 + 64 * 4


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match="do not fit 3 bits"):
        pack(torch.tensor([8]), 3)
    with pytest.raises(InputError, match="do not fit 3 bits"):
        pack(torch.tensor([-5]), 3, -4)
    with pytest.raises(InputError, match="no width"):
        pack(torch.tensor([0]), 9)
    with pytest.raises(InputError, match="no width"):
        unpack(torch.zeros(1, dtype=torch.uint8), 1, 8)
    with pytest.raises(InputError, match="would have 2 bytes"):
        unpack(torch.zeros(1, dtype=torch.uint8), 3, 3)
