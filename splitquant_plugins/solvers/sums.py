"""Sums of one level per part: all of them in order, the nearest, and those that leave one part as it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from splitquant_plugins.compiled import compiled

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]


@compiled
def digit_of(number: int, part: int, parts: int, width: int) -> int:
    """Which level of a part a sum has; sums are numbered as if the levels were digits, the first part's the highest."""
    for _ in range(parts - 1 - part):
        number //= width
    return number % width


@compiled
def ordered_sums(levels: Array, sums: Array, order: Array) -> None:
    """Write all sums of one of the levels [k, c] per part, ascending, and the number of each; [c ** k]."""
    parts, width = levels.shape
    every = np.empty(len(sums))
    for number in range(len(sums)):
        total = 0.0
        for part in range(parts):
            total += levels[part, digit_of(number, part, parts, width)]
        every[number] = total
    order[:] = np.argsort(every, kind="mergesort")
    for place in range(len(sums)):
        sums[place] = every[order[place]]


@compiled
def sums_of_groups(codes: Array, scale: Array, zero: Array, sums: Array, order: Array) -> None:
    """`ordered_sums` [groups, c ** k] of the levels scale * code + zero; codes [c], scale and zero [groups, k]."""
    levels = np.empty((scale.shape[1], len(codes)))
    for group in range(len(scale)):
        for part in range(len(levels)):
            levels[part] = codes * scale[group, part] + zero[group, part]
        ordered_sums(levels, sums[group], order[group])


@compiled
def nearest_level(weight: float, levels: Array) -> int:
    """The place of the level nearest to a weight; `levels` are ascending."""
    first, last = 0, len(levels) - 1
    while first < last:
        middle = (first + last) // 2
        if 0.5 * levels[middle] + 0.5 * levels[middle + 1] < weight:
            first = middle + 1
        else:
            last = middle
    return first


@compiled
def sums_of_others(table: Array, part: int) -> Array:
    """Sums [3, c ** (k - 1)] over all parts but one; `table` [3, k, c]: levels, and what they can stand for."""
    parts, width = table.shape[1], table.shape[2]
    found = np.zeros((3, width ** (parts - 1)))
    for number in range(found.shape[1]):
        rest = number
        for other in range(parts - 1, -1, -1):
            if other != part:
                found[:, number] += table[:, other, rest % width]
                rest //= width
    return found


@compiled
def digits_of_others(number: int, part: int, width: int, digits: Array) -> None:
    """The levels [k] that a sum of `sums_of_others` is of; that of `part` stays as it is."""
    for other in range(len(digits) - 1, -1, -1):
        if other != part:
            digits[other] = number % width
            number //= width


@compiled
def cheapest_with(
    end: float, level: float, others: Array, weight: float, now: float, slope: float, curve: float
) -> tuple[float, int]:
    """What it costs to give a part the value `end`, which is rounded to `level`, and with which of the `others`.

    `others` [3, n]: see `sums_of_others`. A step s away from the sum `now` costs 2 slope s + curve s². The parts have
    to add up to the weight; the cost is infinite where no others can make up for the end.
    """
    least, which = np.inf, -1
    rest = weight - end
    for number in range(others.shape[1]):
        if others[1, number] <= rest <= others[2, number]:
            step = level + others[0, number] - now
            cost = step * (2.0 * slope + curve * step)
            if cost < least:
                least, which = cost, number
    return least, which
