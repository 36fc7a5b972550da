"""Packing of 8-, 4-, 3- and 2-bit codes: exact, in the order that is written down, and refused where it is not."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from archfront.kernels import packing
from archfront.kernels.packing import LAYOUT_VERSION, PLANES, code_range, pack, packed_shape, unpack

BITS = sorted(PLANES)


def random_codes(channels: int, columns: int, bits: int, signed: bool) -> Tensor:
    low, high = code_range(bits, signed)
    return torch.randint(low, high + 1, (channels, columns))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 600), st.sampled_from(BITS), st.booleans(), st.integers(0, 2**31))
def test_what_is_packed_comes_back(channels: int, columns: int, bits: int, signed: bool, seed: int) -> None:
    torch.manual_seed(seed)
    codes = random_codes(channels, columns, bits, signed)
    packed = pack(codes, bits, signed=signed)
    assert (packed.shape, packed.dtype) == (packed_shape(channels, columns, bits), torch.uint8)
    assert packed.is_contiguous()
    assert torch.equal(unpack(packed, bits, columns, signed=signed), codes.to(torch.int16))


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_every_code_comes_back(bits: int, signed: bool) -> None:
    low, high = code_range(bits, signed)
    codes = torch.arange(low, high + 1).repeat(2, 3)
    assert torch.equal(unpack(pack(codes, bits, signed=signed), bits, codes.shape[1], signed=signed), codes.short())


@pytest.mark.parametrize(("bits", "block"), [(8, 32), (4, 64), (3, 256), (2, 128)])
def test_bytes_are_as_many_as_bits_say(bits: int, block: int) -> None:
    assert packing.block_columns(bits) == block
    for columns in (block, 5 * block):
        slabs, channels, span = packed_shape(7, columns, bits)
        assert slabs * channels * span * 8 == 7 * columns * bits
    assert packed_shape(7, block + 1, bits) == packed_shape(7, 2 * block, bits)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_a_byte_has_the_codes_a_span_apart_lowest_first(bits: int) -> None:
    codes = random_codes(3, 512, bits, signed=False)
    packed = pack(codes, bits, signed=False)
    parts = 8 // bits
    for column in (0, 31, 32, 200, 511):
        block, within = divmod(column, 32 * parts)
        part, byte = divmod(within, 32)
        found = packed[block, :, byte] >> (part * bits) & (2**bits - 1)
        assert torch.equal(found.long(), codes[:, column])


def test_three_bits_are_planes_of_two_and_one() -> None:
    codes = random_codes(3, 512, 3, signed=False)
    packed = pack(codes, 3, signed=False)
    assert torch.equal(packed[:4], pack(codes & 3, 2, signed=False))
    for column in (0, 31, 32, 255, 256, 511):
        part, byte = divmod(column % 256, 32)
        assert torch.equal((packed[4 + column // 256, :, byte] >> part & 1).long(), codes[:, column] >> 2)


@pytest.mark.parametrize(
    ("codes", "bits", "signed", "message"),
    [
        (torch.tensor([[0, 8]]), 4, True, "codes: 0 to 8 is not served; -8 to 7 is, 4 bits signed"),
        (torch.tensor([[-9, 7]]), 4, True, "codes: -9 to 7"),
        (torch.tensor([[-1, 3]]), 2, False, "codes: -1 to 3 is not served; 0 to 3 is, 2 bits unsigned"),
        (torch.tensor([[256]]), 8, False, "codes: 256 to 256"),
        (torch.tensor([[1]]), 5, False, "bits: 5 is not served; 8, 4, 3, 2 are"),
        (torch.tensor([[1.0]]), 4, False, "codes.dtype: torch.float32"),
        (torch.tensor([[True]]), 4, False, "codes.dtype: torch.bool"),
        (torch.tensor([1]), 4, False, r"codes.shape: \(1,\)"),
        (torch.zeros(0, 4, dtype=torch.int8), 4, False, r"codes.shape: \(0, 4\)"),
    ],
)
def test_what_cannot_be_packed_is_refused(codes: Tensor, bits: int, signed: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack(codes, bits, signed=signed)


def test_what_cannot_be_unpacked_is_refused() -> None:
    packed = pack(torch.zeros(3, 70, dtype=torch.int8), 4, signed=True)
    with pytest.raises(ValueError, match=f"layout version: {LAYOUT_VERSION + 1} is not served; {LAYOUT_VERSION} is"):
        unpack(packed, 4, 70, signed=True, version=LAYOUT_VERSION + 1)
    with pytest.raises(ValueError, match=r"packed: torch.uint8 \(2, 3, 32\) is not served; .* with 3 slabs"):
        unpack(packed, 4, 129, signed=True)
    with pytest.raises(ValueError, match=r"packed: torch.int8"):
        unpack(packed.view(torch.int8), 4, 70, signed=True)
