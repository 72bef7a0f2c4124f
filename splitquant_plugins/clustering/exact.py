"""The best boundaries of one row by the exact dynamic program, for rows that branch and bound is slow on.

Let best(c, j) be the greatest gain of the points before position j in c + 1 clusters, the last of them behind
cut i: best(c - 1, i) plus the gain of the points from i to j. The best i grows with j (the gain of intervals has
the Monge property; Grønlund et al. 2017, arXiv 1701.07204), so solving for the middle j first halves the range
that the others have to look at: O(n log n) for each cut.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from splitquant_plugins.clustering.prefix import Ascending

    Array = NDArray[Any]

# Candidates that are looked at in one step: bounds the scratch memory.
_CANDIDATES = 1 << 21


def exact_cuts(data: Ascending, row: int, low: Array, high: Array) -> tuple[Array, float]:
    """Cuts [k - 1] of greatest gain in one row, each in low..high [k - 1], and their gain."""
    weights, sums = _prefixes(data, row)
    end = int(data.ends[row])
    first = np.arange(int(low[0]), int(high[0]) + 1)
    best = _gain(weights[first], sums[first])
    choices = []
    for start, stop in zip(low[1:], high[1:], strict=True):
        places = np.arange(int(start), int(stop) + 1)
        best, choice = _next_cut(weights, sums, int(first[0]), best, places)
        choices.append((int(first[0]), choice))
        first = places
    best = best + _gain(weights[end] - weights[first], sums[end] - sums[first])
    place = int(best.argmax())
    gain = float(best[place])
    cuts = [int(first[0]) + place]
    for offset, choice in reversed(choices):
        place = int(choice[place])
        cuts.append(offset + place)
    return np.array(cuts[::-1]), gain


def _prefixes(data: Ascending, row: int) -> tuple[Array, Array]:
    sums = data.sums[row]
    return (np.arange(len(sums), dtype=np.float64) if data.weights is None else data.weights[row]), sums


def _gain(weight: Array, total: Array) -> Array:
    """S² / W; an empty or reversed cluster is no solution."""
    with np.errstate(invalid="ignore", divide="ignore"):
        gain: Array = np.where(weight > 0, np.square(total) / weight, -np.inf)
    return gain


def _next_cut(weights: Array, sums: Array, origin: int, before: Array, places: Array) -> tuple[Array, Array]:
    """For every place of the next cut, the best gain and which of the cuts before it, origin + index, gives it."""
    best = np.full(len(places), -np.inf)
    choice = np.zeros(len(places), dtype=np.int64)
    stride = 1 << max(len(places) - 1, 0).bit_length()
    while stride:
        # Those of the level before are a stride of 2 apart: each new place lies between two of them.
        new = np.arange(stride - 1, len(places), 2 * stride)
        lowest = np.where(new >= stride, choice[np.maximum(new - stride, 0)], 0)
        above = new + stride
        highest = np.where(above < len(places), choice[np.minimum(above, len(places) - 1)], len(before) - 1)
        highest = np.maximum(lowest, np.minimum(highest, places[new] - 1 - origin))
        for part in _runs(highest - lowest + 1):
            _choose(weights, sums, origin, before, places, new[part], lowest[part], highest[part], best, choice)
        stride >>= 1
    return best, choice


def _runs(lengths: Array) -> list[slice]:
    """Slices of neighbouring places with at most _CANDIDATES candidates together, or one place."""
    ends = np.cumsum(lengths)
    runs, start = [], 0
    while start < len(lengths):
        taken = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, taken + _CANDIDATES, side="right")))
        runs.append(slice(start, stop))
        start = stop
    return runs


def _choose(
    weights: Array,
    sums: Array,
    origin: int,
    before: Array,
    places: Array,
    new: Array,
    lowest: Array,
    highest: Array,
    best: Array,
    choice: Array,
) -> None:
    """Try for each new place all cuts before it in lowest..highest, and write down the best."""
    lengths = highest - lowest + 1
    starts = np.cumsum(lengths) - lengths
    owner = np.repeat(np.arange(len(new)), lengths)
    candidate = np.arange(len(owner)) - starts[owner] + lowest[owner]
    cut, place = candidate + origin, places[new][owner]
    gain = before[candidate] + _gain(weights[place] - weights[cut], sums[place] - sums[cut])
    top = np.maximum.reduceat(gain, starts)
    hits = np.flatnonzero(gain == top[owner])
    first = hits[np.searchsorted(owner[hits], np.arange(len(new)))]
    best[new] = top
    choice[new] = candidate[first]
