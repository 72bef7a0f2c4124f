"""Sums of one level per part: all of them in order, the nearest, and those that leave one part as it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from splitquant_plugins.compiled import compiled

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]


@compiled
def ordered_sums(levels: Array, sums: Array, order: Array) -> None:
    """Write all sums of one of the levels [k, c] per part, ascending, and the number of each; [c ** k].

    Sums are numbered as if the levels were digits, the first part's the highest; of equal sums the lower number comes
    first. The sums of the last parts are sorted before those of all: one list for each level of the part before, and
    these are merged two by two.
    """
    parts, width = levels.shape
    one, two = np.empty(len(sums)), np.empty(len(sums))
    first, second = np.empty(len(sums), np.int64), np.empty(len(sums), np.int64)
    one[0], first[0] = 0.0, 0
    number = 1
    for part in range(parts - 1, -1, -1):
        for c in range(width):
            for i in range(number):
                two[c * number + i] = levels[part, c] + one[i]
                second[c * number + i] = c * number + first[i]
        one, two, first, second = two, one, second, first
        run = number
        number *= width
        while run < number:
            for start in range(0, number, 2 * run):
                i, j = start, min(start + run, number)
                middle, stop = j, min(start + 2 * run, number)
                for at in range(start, stop):
                    if j == stop or (i < middle and one[i] <= one[j]):
                        two[at], second[at] = one[i], first[i]
                        i += 1
                    else:
                        two[at], second[at] = one[j], first[j]
                        j += 1
            run *= 2
            one, two, first, second = two, one, second, first
    sums[:] = one
    order[:] = first


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
