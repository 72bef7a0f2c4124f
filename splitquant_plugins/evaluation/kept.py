"""A sequence whose items are made when they are asked for, and remembered while they fit into memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor

Item = TypeVar("Item")
KEPT_BYTES = 1 << 30


class Kept(Sequence[Item]):
    """`length` items, item i made by `make(i)`; the first that take at most `most` bytes together are made once."""

    def __init__(self, length: int, make: Callable[[int], Item], most: int = KEPT_BYTES) -> None:
        self._length = length
        self._make = make
        self._left = most
        self._items: dict[int, Item] = {}

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(self._length))]
        number = index + self._length if index < 0 else index
        if not 0 <= number < self._length:
            raise IndexError(index)
        if number in self._items:
            return self._items[number]
        item = self._make(number)
        size = _bytes(item)
        if size <= self._left:
            self._left -= size
            self._items[number] = item
        return item


def _bytes(item: Any) -> int:
    tensors = item.values() if isinstance(item, Mapping) else [item]
    return sum(each.numel() * each.element_size() for each in tensors if isinstance(each, Tensor))
