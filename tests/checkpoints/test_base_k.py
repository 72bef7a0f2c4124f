"""Digits to the base k, in bytes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from splitquant_plugins.checkpoints.base_k import digits_per_byte, pack_digits, packed_length, unpack_digits


@given(st.integers(2, 16) | st.just(256), st.integers(0, 40), st.integers(0, 2**31))
def test_numbers_come_back(k, count, seed):
    numbers = torch.randint(k, (count,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    packed = pack_digits(numbers, k)
    assert packed.dtype == torch.uint8
    assert packed.numel() == packed_length(count, k)
    assert torch.equal(unpack_digits(packed, k, count), numbers)


def test_five_trits_in_a_byte_by_hand():
    assert pack_digits(torch.tensor([[1, 2, 0], [0, 2, 1]]), 3).tolist() == [1 + 2 * 3 + 2 * 81, 1]
    assert (digits_per_byte(2), digits_per_byte(3), digits_per_byte(4), digits_per_byte(16)) == (8, 5, 4, 2)
    assert 8 / digits_per_byte(3) < 1.01 * math.log2(3) + 0.01


@pytest.mark.parametrize("numbers", [[3], [-1], [0, 255]])
def test_what_is_no_digit_is_refused(numbers):
    with pytest.raises(ValueError, match="no digits to the base 3"):
        pack_digits(torch.tensor(numbers), 3)


def test_bytes_that_hold_no_such_digits_are_refused():
    with pytest.raises(ValueError, match="the byte 243 holds no 5 digits"):
        unpack_digits(torch.tensor([243], dtype=torch.uint8), 3, 5)
    with pytest.raises(ValueError, match=r"6 digits to the base 3 are not packed in \(1,\)"):
        unpack_digits(torch.tensor([1], dtype=torch.uint8), 3, 6)
    with pytest.raises(ValueError, match="base of 2"):
        digits_per_byte(1)
