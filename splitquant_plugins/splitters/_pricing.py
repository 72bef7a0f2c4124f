"""What a codebook costs: all sums of one level per part, in order, and the error of rounding a group to them.

A long group is summarised once by even bins with running totals. The error of a codebook then takes one look-up for
each of its levels, however many values the group has. Of a short group, each value is rounded to the last part after
every combination of the others: without sorting the sums, by loops that processors do eight steps of at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from splitquant_plugins.compiled import compiled

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]


@compiled
def _extent(values: Array) -> tuple[float, float, float]:
    """The largest magnitude, and the lowest and the highest value in its units."""
    low, high = np.float64(values[0]), np.float64(values[0])
    for i in range(len(values)):
        value = np.float64(values[i])
        low = min(low, value)
        high = max(high, value)
    peak = max(-low, high)
    return peak, low / peak, high / peak


@compiled
def bin_group(values: Array, frame: Array, table: Array) -> None:
    """Summarise `values` [n], not all zero, in units of their largest magnitude.

    Writes frame [8]: largest magnitude, lowest and highest value (both in its units), bins per unit, number of
    values, sum of squares, and the range that the parts have to cover, which includes 0. table [bins + 1, 2]: how
    many values lie in the bins before each edge, and their sum.
    """
    peak, low, high = _extent(values)
    bins = len(table) - 1
    per_unit = bins / (high - low) if high > low else 0.0
    table[:] = 0.0
    squares = 0.0
    for i in range(len(values)):
        value = np.float64(values[i]) / peak
        place = min(int((value - low) * per_unit), bins - 1) + 1
        table[place, 0] += 1.0
        table[place, 1] += value
        squares += value * value
    count, total = 0.0, 0.0
    for b in range(bins + 1):
        count += table[b, 0]
        total += table[b, 1]
        table[b, 0], table[b, 1] = count, total
    frame[0], frame[1], frame[2], frame[3] = peak, low, high, per_unit
    frame[4], frame[5], frame[6], frame[7] = len(values), squares, min(low, 0.0), max(high, 0.0)


@compiled
def frame_group(values: Array, frame: Array, short: Array) -> None:
    """As `bin_group` for a group that is priced value by value: `short` [0, n] are its values in the same units."""
    peak, low, high = _extent(values)
    for i in range(len(values)):
        short[0, i] = np.float32(np.float64(values[i]) / peak)
    frame[0], frame[1], frame[2], frame[3] = peak, low, high, 0.0
    frame[4], frame[5], frame[6], frame[7] = len(values), 0.0, min(low, 0.0), max(high, 0.0)


@compiled
def price_values(codes: Array, shape: Array, scale: Array, short: Array, room: Array) -> float:
    """Squared error of rounding the values short [0, n] to the nearest sums; the codes of a part are one step apart.

    short [1, n] is overwritten, as is `room`, which holds a sum of all parts but the last for each of their codes.
    """
    k, width = len(shape), codes.shape[1]
    others = room[0]
    number = 1
    others[0] = 0.0
    for part in range(k - 1):
        for c in range(width - 1, -1, -1):  # the first list last: the others are made of it
            level = codes[shape[part], c] * scale[part]
            for i in range(number):
                others[c * number + i] = others[i] + level
        number *= width
    step = scale[k - 1]
    per_step = 1.0 / step
    low, high = np.float32(codes[shape[k - 1], 0]), np.float32(codes[shape[k - 1], width - 1])
    inverse = np.float32(per_step)
    values, least = short[0], short[1]
    n = len(values)
    for i in range(n):
        least[i] = np.inf
    for at in range(0, number, 2):
        one = np.float32(others[at])
        two = np.float32(others[min(at + 1, number - 1)])
        for i in range(n):
            left = (values[i] - one) * inverse
            other = (values[i] - two) * inverse
            left -= min(max(np.rint(left), low), high)
            other -= min(max(np.rint(other), low), high)
            least[i] = min(min(left * left, other * other), least[i])
    total = 0.0
    for i in range(n):
        total += np.float64(least[i])
    return total * step * step


@compiled
def _merge(source: Array, out: Array, start: int, middle: int, stop: int) -> None:
    i, j = start, middle
    for at in range(start, stop):
        if j == stop or (i < middle and source[i] <= source[j]):
            out[at] = source[i]
            i += 1
        else:
            out[at] = source[j]
            j += 1


@compiled
def _merge_equal(source: Array, out: Array, start: int, run: int) -> None:
    """Merge two neighbouring runs from both ends at once, which needs no test for their ends."""
    i, j = start, start + run
    m, n = j - 1, j + run - 1
    for at in range(run):
        left, right = source[i], source[j]
        take = left <= right
        out[start + at] = left if take else right
        i += take
        j += 1 - take
        left, right = source[m], source[n]
        take = left > right
        out[start + 2 * run - 1 - at] = left if take else right
        m -= take
        n -= 1 - take


@compiled
def sorted_sums(codes: Array, shape: Array, scale: Array, one: Array, two: Array) -> Array:
    """All sums of one level per part, ascending [codes ** k], in `one` or in `two`, which have room for them.

    `codes` [shapes, c] are ascending; part j has the levels codes[shape[j]] * scale[j].
    """
    width = codes.shape[1]
    number = width
    for c in range(width):
        one[c] = codes[shape[0], c] * scale[0]
    for part in range(1, len(shape)):
        for c in range(width):
            value = codes[shape[part], c] * scale[part]
            for i in range(number):
                two[c * number + i] = one[i] + value
        run = number
        number *= width
        one, two = two, one
        while run < number:  # merge the sorted runs two by two
            for start in range(0, number, 2 * run):
                middle, stop = min(start + run, number), min(start + 2 * run, number)
                if middle == stop or one[middle - 1] <= one[middle]:
                    two[start:stop] = one[start:stop]
                elif stop - middle == run:
                    _merge_equal(one, two, start, run)
                else:
                    _merge(one, two, start, middle, stop)
            run *= 2
            one, two = two, one
    return one[:number]


@compiled
def price(levels: Array, frame: Array, table: Array) -> float:
    """Squared error of rounding a binned group to the nearest of its `levels`, ascending, in the group's units.

    Values in a bin that holds the middle of two levels go all to one of them, to which they are nearly as near as
    to the other.
    """
    low, per_unit, bins = frame[1], frame[3], len(table) - 1
    error, count, total = frame[5], 0.0, 0.0
    level = levels[0]
    for i in range(1, len(levels)):
        after = levels[i]
        place = (0.5 * (level + after) - low) * per_unit + 0.5
        edge = int(min(max(place, 0.0), float(bins)))
        new_count, new_total = table[edge, 0], table[edge, 1]
        error += level * (level * (new_count - count) - 2.0 * (new_total - total))
        level, count, total = after, new_count, new_total
    return error + level * (level * (table[bins, 0] - count) - 2.0 * (table[bins, 1] - total))
