"""Parts that a backend rounds to chosen codes, and that sum to the weights in the weights' own dtype.

Codes c1..ck of a weight w leave an error e = w - sum(cj * sj). The parts have to sum to w all the same, and can:
part j may hold anything between its rounding thresholds (cj - 1/2) sj and (cj + 1/2) sj without changing its code,
as long as it stays inside the part's range. Starting from the part with the finest scale, each takes what it can
of e. For the nearest sum there is always room: were |e| more than half a step of any part whose code can still
move, moving it would give a nearer sum; and where no code can move, the ranges cover w.

The backend has to derive exactly the chosen scale and zero point, so each part's ends are *pinned*: some weight
holds the end of the range itself, with the other parts making up for it. A weight whose nearest sum has that end
anyway costs nothing; otherwise the cheapest weight is taken. A weight holds one pin at most.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from splitquant_plugins.compiled import compiled
from splitquant_plugins.solvers.sums import cheapest_with, digits_of_others, ordered_sums, sums_of_others

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

FLOAT64, FLOAT32, FLOAT16, BFLOAT16 = 0, 1, 2, 3
# Rounding to 11 or 8 bits in float64 arithmetic (Veltkamp), and to the multiples of the smallest subnormal.
_SPLIT_16, _SPLIT_BF = 2.0**42 + 1, 2.0**45 + 1
_TO_ONE_BIT = 2.0**52 + 1
_SHIFT_16, _SHIFT_BF = 1.5 * 2.0**28, 1.5 * 2.0**-81
_LEAST_16, _LEAST_BF = 2.0**-14, 2.0**-126
_MOST_16, _MOST_32, _MOST_BF = 65504.0, 3.4028234663852886e38, 3.3895313892515355e38
_MOST_64 = 1.7976931348623157e308
# Groups of up to so many values for each code of a part are worked on without sorting sums: as fast, or faster.
SHORT = 32
# Values whose parts are made together, step by step: they stay in the nearest cache.
_BLOCK = 512
# Weights of a long group that may hold a pin that no weight has by itself: extremes on either side, and others evenly.
_EXTREMES, _EVEN = 32, 64
# Rounds in which pins that fit one value only may push others out of it.
_ATTEMPTS = 3


@compiled
def rounded(x: float, kind: int) -> float:
    """The nearest number of a dtype."""
    if kind == FLOAT32:
        return float(np.float32(x))
    if kind == FLOAT64:
        return x
    half = kind == FLOAT16
    if abs(x) < (_LEAST_16 if half else _LEAST_BF):
        shift = _SHIFT_16 if half else _SHIFT_BF
        return (x + shift) - shift
    big = x * (_SPLIT_16 if half else _SPLIT_BF)
    return big - (big - x)


@compiled
def most(kind: int) -> float:
    """The largest finite number of a dtype."""
    if kind == FLOAT32:
        return _MOST_32
    if kind == FLOAT64:
        return _MOST_64
    return _MOST_16 if kind == FLOAT16 else _MOST_BF


@compiled
def eps_of(kind: int) -> float:
    """What the last place of 1 is worth in a dtype."""
    return 2.0**-52 if kind == FLOAT64 else 2.0**-23 if kind == FLOAT32 else 2.0**-10 if kind == FLOAT16 else 2.0**-7


@compiled
def last_place(x: float, eps: float) -> float:
    """What the last place of a normal number of a dtype is worth; 0 or no number beyond the range of float64."""
    big = x * _TO_ONE_BIT
    power = abs(big - (big - x))
    return eps * (0.5 * power if power > abs(x) else power)


@compiled
def whole(x: float, unit: float) -> bool:
    """Whether x is a whole number of units: others are no sum of numbers that are."""
    return unit > 0 and np.rint(x / unit) * unit == x


@compiled
def complete_one(weight: float, part: Array, kind: int) -> None:
    """Round all parts but the last, and make the last what is missing to the weight, in place.

    Where that subtraction is inexact, the part before the last gives up its lowest bits; where that does not help,
    the sum is off by at most eps times the last part.
    """
    k = len(part)
    limit = most(kind)
    running, fits = 0.0, True
    for j in range(k - 1):
        part[j] = rounded(part[j], kind)
        fits &= abs(part[j]) <= limit
        running = rounded(running + part[j], kind)
    last = rounded(weight - running, kind)
    if not (fits and abs(last) <= limit and abs(running) <= limit):
        part[:] = 0.0
        part[k - 1] = weight
        return
    part[k - 1] = last
    if rounded(running + last, kind) == weight:
        return
    before = 0.0
    for j in range(k - 2):
        before = rounded(before + part[j], kind)
    for coarser in (1.0, 2.0, 4.0):
        unit = coarser * last_place(last, eps_of(kind))
        if not whole(weight, unit):
            return
        moved = rounded(np.rint(running / unit) * unit - before, kind)
        total = rounded(before + moved, kind)
        rest = rounded(weight - total, kind)
        if rounded(total + rest, kind) == weight and abs(moved) <= limit and abs(rest) <= limit:
            part[k - 2] = moved
            part[k - 1] = rest
            return


@compiled
def table_of(codes: Array, spans: Array, shape: Array, scale: Array) -> Array:
    """Each part's levels, and the least and the most that rounds to them, [3, k, c].

    `spans` [2, shapes, c]: what rounds to each code, in units of the scale.
    """
    k, width = len(shape), codes.shape[1]
    table = np.empty((3, k, width))
    for j in range(k):
        for c in range(width):
            table[0, j, c] = codes[shape[j], c] * scale[j]
            table[1, j, c] = spans[0, shape[j], c] * scale[j]
            table[2, j, c] = spans[1, shape[j], c] * scale[j]
    return table


@compiled
def digits_in_order(width: int, k: int) -> Array:
    """The codes of all sums [c ** k, k], the first part's the highest digit."""
    digits = np.empty((width**k, k), np.int64)
    for s in range(len(digits)):
        rest = s
        for j in range(k - 1, -1, -1):
            digits[s, j] = rest % width
            rest //= width
    return digits


@compiled
def tabulate(codes: Array, spans: Array, shape: Array, scale: Array) -> tuple[Array, Array, Array, Array]:
    """All sums of a codebook, ascending.

    Returns the sums [L], the middles between them [L], infinite at the end, their codes [L, k], and the table of
    `table_of`.
    """
    table = table_of(codes, spans, shape, scale)
    number = codes.shape[1] ** len(shape)
    sums, order = np.empty(number), np.empty(number, np.int64)
    ordered_sums(table[0], sums, order)
    digits = digits_in_order(codes.shape[1], len(shape))[order]
    middles = np.empty(number)
    for s in range(number - 1):
        middles[s] = 0.5 * sums[s] + 0.5 * sums[s + 1]
    middles[number - 1] = np.inf
    return sums, middles, digits, table


@compiled
def nearest_unsorted(weights: Array, levels: Array, places: Array, least: Array, found: Array) -> None:
    """The places, in the order of `digits_in_order`, of sums nearest to the weights, without sorting them.

    `levels` [k, c]; those of the last part are even steps, of which the last may be repeated. After every combination
    of the other parts, its nearest is found by rounding. `least` and `found` are overwritten, as long as the weights.
    """
    k, width = levels.shape
    last = levels[k - 1]
    step = last[1] - last[0] if width > 1 and last[1] > last[0] else 1.0
    top, inverse = np.rint((last[width - 1] - last[0]) / step), 1.0 / step
    others = np.zeros(width ** (k - 1))
    number = 1
    for part in range(k - 1):
        for at in range(number - 1, -1, -1):  # from the end: each makes room for its own
            before = others[at]
            for c in range(width):
                others[at * width + c] = before + levels[part, c]
        number *= width
    for i in range(len(weights)):
        least[i] = np.inf
        found[i] = 0.0
    for at in range(number):
        base, first = others[at] + last[0], np.float64(at * width)
        for i in range(len(weights)):
            left = (weights[i] - base) * inverse
            code = min(max(np.rint(left), 0.0), top)
            left -= code
            cost = left * left
            nearer = cost < least[i]
            least[i] = cost if nearer else least[i]
            found[i] = first + code if nearer else found[i]
    for i in range(len(weights)):
        places[i] = np.uint64(found[i])


@compiled
def halving(middles: Array) -> Array:
    """The middles, and infinities up to a power of two: what `nearest_sums` searches by halves."""
    size = 1
    while size < len(middles):
        size *= 2
    padded = np.full(size, np.inf)
    padded[: len(middles)] = middles
    return padded


@compiled
def nearest_sums(weights: Array, padded: Array, places: Array) -> None:
    """The places of the sums nearest to the weights: the number of middles below each; of no numbers, 0.

    One half after the other for all weights: a branch that no processor can predict costs more than all comparisons.
    """
    half = np.uint64(len(padded) // 2)
    for i in range(len(weights)):
        places[i] = 0
    while half > 0:
        before = half - np.uint64(1)
        for i in range(len(weights)):
            places[i] += half if padded[places[i] + before] < weights[i] else np.uint64(0)
        half >>= np.uint64(1)


@compiled
def spread(weight: float, digit: Array, table: Array, skip: int, part: Array) -> None:
    """Values of the parts, all but `skip`, that round to the codes `digit` and add up to the weight, if any do."""
    k = len(part)
    error = weight
    finest = -1
    for j in range(k):
        if j != skip:
            part[j] = table[0, j, digit[j]]
            error -= part[j]
            finest = j
    for j in range(k - 1, -1, -1):
        if j != skip:
            moved = min(max(part[j] + error, table[1, j, digit[j]]), table[2, j, digit[j]])
            error -= moved - part[j]
            part[j] = moved
    if finest >= 0:
        part[finest] += error


@compiled
def _free_pin(weight: float, digit: Array, table: Array, pins: Array, either: bool, held: Array) -> tuple[int, int]:
    """The first pin (part, number) that is missing and that a weight with these codes can hold at no cost, or -1."""
    for j in range(len(pins)):
        if either and (held[j] >= 0).any():
            continue
        for p in range(pins.shape[1]):
            if held[j, p] >= 0 or table[0, j, digit[j]] != pins[j, p, 1]:
                continue
            rest, least, greatest = weight - pins[j, p, 0], 0.0, 0.0
            for other in range(len(pins)):
                if other != j:
                    least += table[1, other, digit[other]]
                    greatest += table[2, other, digit[other]]
            if least <= rest <= greatest:
                return j, p
    return -1, -1


@compiled
def _round_block(block: Array, kind: int) -> None:
    """Round numbers to a dtype, in place; the dtype is asked for once."""
    if kind == FLOAT32:
        for i in range(len(block)):
            block[i] = np.float32(block[i])
    elif kind != FLOAT64:
        for i in range(len(block)):
            block[i] = rounded(block[i], kind)


@compiled
def _may_hold(table: Array, pins: Array, either: bool, held: Array, able: Array) -> int:
    """Mark the codes [k, c] that have the level of a missing pin, and count the pins that are missing."""
    able[:] = False
    missing = 0
    for j in range(len(pins)):
        taken = either and (held[j] >= 0).any()
        for p in range(pins.shape[1]):
            if taken or held[j, p] >= 0 or np.isnan(pins[j, p, 0]):
                continue
            missing += 1
            for c in range(able.shape[1]):
                able[j, c] |= table[0, j, c] == pins[j, p, 1]
    return missing


@compiled
def realise_span(
    values: Array,
    choice: Array,
    middles: Array,
    digits: Array,
    table: Array,
    pins: Array,
    either: bool,
    kind: int,
    out: Array,
    held: Array,
    taken: Array,
) -> None:
    """Parts out [k, n] of `values` [n], and for each pin the first value that can hold it at no cost.

    `choice` [n] are places of sums, or is empty: then the nearest sums are taken. `digits` [L, k] are the codes of the
    sums, in the order of the `middles` between them, or, where there are no middles, of `digits_in_order`. `pins`
    [k, p, 2]: value and level of every end that has to occur, NaN where there is none; held [k, p]: which value holds
    it, -1 where none can. Writes the sums that were taken to `taken` [n], unless it is empty.
    """
    k = len(pins)
    padded = halving(middles)
    able = np.zeros((k, table.shape[2]), np.bool_)
    held[:] = -1
    missing = _may_hold(table, pins, either, held, able)
    limit, eps = most(kind), eps_of(kind)
    room = min(_BLOCK, len(values))
    weights, places, sure = np.empty(room), np.empty(room, np.uint64), np.empty(room, np.bool_)
    errors, totals, parts, part = np.empty(room), np.empty(room), np.empty((k, room)), np.empty(k)
    codes = np.empty((k, room), np.uint64)
    for start in range(0, len(values), room):
        n = min(room, len(values) - start)
        weight, place, error, total = weights[:n], places[:n], errors[:n], totals[:n]
        for i in range(n):
            weight[i] = np.float64(values[start + i])
        if len(choice):
            for i in range(n):
                place[i] = choice[start + i]
        elif len(middles):
            nearest_sums(weight, padded, place)
        else:
            nearest_unsorted(weight, table[0], place, error, total)
        # As `spread` and `complete_one`, for all values of the block; these take over where this is not exact.
        total[:] = 0.0
        for j in range(k):
            level, code = table[0, j], codes[j, :n]
            for i in range(n):
                code[i] = digits[place[i], j]
                total[i] += level[code[i]]
        for i in range(n):
            error[i] = weight[i] - total[i]
        for i in range(n if len(taken) else 0):
            taken[start + i] = total[i]
        for j in range(k - 1, -1, -1):
            level, low, high, moved, code = table[0, j], table[1, j], table[2, j], parts[j, :n], codes[j, :n]
            for i in range(n):
                at = code[i]
                here = level[at]
                inside = max(here + error[i], low[at])
                inside = min(inside, high[at])
                error[i] -= inside - here
                moved[i] = inside
        last = parts[k - 1, :n]
        for i in range(n):
            last[i] += error[i]
        total[:] = 0.0
        for j in range(k - 1):
            made = parts[j, :n]
            _round_block(made, kind)
            for i in range(n):
                total[i] += made[i]
            _round_block(total, kind)
        for i in range(n):
            last[i] = weight[i] - total[i]
        _round_block(last, kind)
        for i in range(n):
            error[i] = total[i] + last[i]
        _round_block(error, kind)
        for i in range(n):
            unit = last_place(last[i], eps)
            lost = (unit > 0) & (np.rint(weight[i] / unit) * unit != weight[i])  # bits that no last part can hold
            sure[i] = ((error[i] == weight[i]) | lost) & (abs(total[i]) + abs(last[i]) < limit)
        for i in range(n):
            if sure[i]:
                continue
            part[:] = parts[:, i]
            complete_one(weight[i], part, kind)
            parts[:, i] = part
        for i in range(n if missing else 0):
            if not missing:
                break
            may = False
            for j in range(k):
                may |= able[j, codes[j, i]]
            if not may:
                continue
            pinned, pin = _free_pin(weight[i], digits[place[i]], table, pins, either, held)
            if pinned >= 0:
                held[pinned, pin] = start + i
                part[pinned] = pins[pinned, pin, 0]
                spread(weight[i] - part[pinned], digits[place[i]], table, pinned, part)
                complete_one(weight[i], part, kind)
                parts[:, i] = part
                missing = _may_hold(table, pins, either, held, able)
        for j in range(k):
            made, to = parts[j], out[j]
            for i in range(n):
                to[start + i] = made[i]


@compiled
def _candidates(values: Array) -> Array:
    """Places of the values that may hold a pin: all, or the extremes and an even sample of the others."""
    n = len(values)
    if n <= 2 * _EXTREMES + _EVEN:
        return np.arange(n)
    chosen = np.empty(2 * _EXTREMES + _EVEN, np.int64)
    for side in range(2):
        start, count, sign = side * _EXTREMES, 0, 1.0 - 2.0 * side
        for i in range(n):
            value = sign * np.float64(values[i])
            if count == _EXTREMES and value <= sign * np.float64(values[chosen[start + count - 1]]):
                continue
            at = start + (count if count < _EXTREMES else _EXTREMES - 1)
            while at > start and sign * np.float64(values[chosen[at - 1]]) < value:
                chosen[at] = chosen[at - 1]
                at -= 1
            chosen[at] = i
            count = min(count + 1, _EXTREMES)
    for i in range(_EVEN):
        chosen[2 * _EXTREMES + i] = i * n // _EVEN
    return np.unique(chosen)


@compiled
def force_pins(
    values: Array,
    sums: Array,
    middles: Array,
    taken: Array,
    table: Array,
    pins: Array,
    either: bool,
    kind: int,
    held: Array,
) -> tuple[Array, Array]:
    """Let the cheapest values hold the pins that none holds, changing held [k, p].

    `taken` [n]: the sums nearest to the values, or empty: then they are looked up. Returns the places [m] of the values
    that do, and their parts [k, m]; the later of two for a place counts.
    """
    k, most_pins, width = pins.shape[0], pins.shape[1], table.shape[2]
    places = np.empty(0, np.int64)
    digit, part = np.zeros(k, np.int64), np.empty(k)
    changes = 0
    index, changed = np.empty(_ATTEMPTS * k * most_pins, np.int64), np.empty((k, _ATTEMPTS * k * most_pins))
    for attempt in range(_ATTEMPTS):
        for j in range(k):
            for p in range(most_pins):
                value, level = pins[j, p, 0], pins[j, p, 1]
                if np.isnan(value) or held[j, p] >= 0 or (either and (held[j] >= 0).any()):
                    continue
                if len(places) == 0:
                    places = _candidates(values)
                others = sums_of_others(table, j)
                where, which = -1, 0
                # In the last attempt a pin stays where it is; before, one that fits nowhere else may push it out.
                for push in range(1 if attempt == _ATTEMPTS - 1 else 2):
                    best = np.inf
                    for i in places:
                        if (held == i).any() != (push == 1):
                            continue
                        weight = np.float64(values[i])
                        now = taken[i] if len(taken) else sums[np.searchsorted(middles, weight)]
                        cost, combination = cheapest_with(value, level, others, weight, now, now - weight, 1.0)
                        if cost < best:
                            best, where, which = cost, int(i), combination
                    if where >= 0:
                        break
                if where < 0:
                    continue
                for other in range(k):
                    for q in range(most_pins):
                        if held[other, q] == where:
                            held[other, q] = -1
                digits_of_others(which, j, width, digit)
                part[j] = value
                spread(np.float64(values[where]) - value, digit, table, j, part)
                complete_one(np.float64(values[where]), part, kind)
                changed[:, changes] = part
                index[changes] = where
                changes += 1
                held[j, p] = where
    return index[:changes], changed[:, :changes]


@compiled
def pins_of(ends: Array, shape: Array, scale: Array) -> Array:
    """The pins [k, p, 2] of a codebook, from those of its shapes `ends` [shapes, p, 2] in units of the scale."""
    pins = np.empty((len(shape), ends.shape[1], 2))
    for j in range(len(shape)):
        pins[j] = ends[shape[j]] * scale[j]
    return pins


@compiled
def realise_groups(
    codes: Array,
    spans: Array,
    ends: Array,
    either: bool,
    kind: int,
    values: Array,
    choice: Array,
    shapes: Array,
    scales: Array,
    out: Array,
) -> None:
    """Parts out [k, groups, n] of `values` [groups, n] by the codebooks shapes, scales [groups, k]; zeros stay zeros.

    `choice` [groups, n] are places of sums; with no groups in it the nearest are taken.
    """
    k, width = shapes.shape[1], codes.shape[1]
    held = np.empty((k, ends.shape[1]), np.int64)
    nearest, nothing = np.empty(0, np.int64), np.empty(0)
    short = len(choice) == 0 and values.shape[1] <= SHORT * width
    in_order = digits_in_order(width, k) if short else np.empty((0, k), np.int64)
    taken = np.empty(values.shape[1] if short else 0)
    row = np.empty((k, values.shape[1]), out.dtype)  # not a view of `out`: realise_span is compiled for one layout
    for group in range(len(values)):
        if scales[group, 0] == 0:
            out[:, group] = 0.0
            continue
        if short:
            sums, middles, digits = nothing, nothing, in_order
            table = table_of(codes, spans, shapes[group], scales[group])
        else:
            sums, middles, digits, table = tabulate(codes, spans, shapes[group], scales[group])
        pins = pins_of(ends, shapes[group], scales[group])
        chosen = choice[group] if len(choice) else nearest
        realise_span(values[group], chosen, middles, digits, table, pins, either, kind, row, held, taken)
        index, changed = force_pins(values[group], sums, middles, taken, table, pins, either, kind, held)
        for change in range(len(index)):
            row[:, index[change]] = changed[:, change]
        out[:, group] = row


@compiled
def levels_of_groups(
    codes: Array, spans: Array, shapes: Array, scales: Array, value: Array, low: Array, high: Array
) -> None:
    """All sums of codebooks [groups, k], ascending, and what each can stand for: value, low, high [groups, L]."""
    for group in range(len(scales)):
        sums, _, digits, table = tabulate(codes, spans, shapes[group], scales[group])
        value[group] = sums
        low[group] = 0.0
        high[group] = 0.0
        for s in range(len(sums)):
            for j in range(scales.shape[1]):
                low[group, s] += table[1, j, digits[s, j]]
                high[group, s] += table[2, j, digits[s, j]]
