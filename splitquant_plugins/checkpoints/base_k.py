"""Numbers below k, packed as digits of bytes to the base k: five in a byte for k = 3, 1.6 bits each (log2 3 = 1.585).

A byte holds as many digits as fit, the first the lowest; the last byte is filled with zeros. Powers of two waste
nothing and are digits like others: eight in a byte for k = 2, four for k = 4.
"""

from __future__ import annotations

import torch
from torch import Tensor

_VALUES = 256  # of a byte


def digits_per_byte(k: int) -> int:
    """Return how many numbers below k a byte holds; ValueError unless k is 2 to 256."""
    if not 2 <= k <= _VALUES:
        raise ValueError(f"k = {k}: digits are to a base of 2 to {_VALUES}")
    digits, values = 0, k
    while values <= _VALUES:
        digits, values = digits + 1, values * k
    return digits


def packed_length(count: int, k: int) -> int:
    """Bytes that so many numbers below k take."""
    return -(-count // digits_per_byte(k))


def pack_digits(numbers: Tensor, k: int) -> Tensor:
    """Pack whole numbers 0 to k - 1 of any shape into bytes, a flat tensor; ValueError where one is out of range."""
    flat = numbers.reshape(-1)
    if flat.numel() and (int(flat.min()) < 0 or int(flat.max()) >= k):
        raise ValueError(f"numbers from {int(flat.min())} to {int(flat.max())} are no digits to the base {k}")
    width = digits_per_byte(k)
    rows = torch.zeros(packed_length(flat.numel(), k) * width, dtype=torch.uint8, device=flat.device)
    rows[: flat.numel()] = flat.to(torch.uint8)
    rows = rows.view(-1, width)
    packed = rows[:, -1].clone()
    for place in range(width - 2, -1, -1):
        packed = packed * k + rows[:, place]  # below 256, for k ** width is at most that
    return packed


def unpack_digits(packed: Tensor, k: int, count: int) -> Tensor:
    """Return the first `count` numbers, as bytes, of a flat tensor of bytes that `pack_digits` returned.

    ValueError where it has another length, or a byte holds no such digits.
    """
    width = digits_per_byte(k)
    if packed.dtype != torch.uint8 or packed.shape != (packed_length(count, k),):
        raise ValueError(f"{count} digits to the base {k} are not packed in {tuple(packed.shape)} {packed.dtype}")
    if packed.numel() and int(packed.max()) >= k**width:
        raise ValueError(f"the byte {int(packed.max())} holds no {width} digits to the base {k}")
    rows = torch.empty(packed.numel(), width, dtype=torch.uint8, device=packed.device)
    rest = packed
    for place in range(width - 1):
        higher = torch.div(rest, k, rounding_mode="floor")
        rows[:, place] = rest - higher * k
        rest = higher
    rows[:, -1] = rest
    return rows.view(-1)[:count]
