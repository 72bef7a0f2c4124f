"""The best boundaries, by branch and bound over positions in ascending points.

The gain of boundaries is the sum over the clusters of S² / W, S the moment and W the weight of a cluster; the
least inertia has the greatest gain. A dynamic program over some positions per boundary gives the best gain among
them, and, with an allowance for what lies between two positions, an upper bound for all others: stretches that
cannot hold a better boundary are dropped, the rest is cut finer, until nothing is left. A row on which that takes
long, as where the brackets of neighbouring boundaries overlap, is left to the exact program.

The allowance. Between positions p < q the prefix sum S of ascending points is convex: it is below its chord, and
above the tangents at p and q, so it sags by at most n (m - a) (b - m) / (b - a), for n, m the weight and mean of
the points between, a and b the first and the last of them. Along the chord the gain is convex in the boundary
(S² / W is convex in both), so no greater than at p or q; and a sag of s adds at most 2 s (c' - c), c < c' the
centres beside the boundary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from splitquant_plugins.clustering.bracket import bracket
from splitquant_plugins.clustering.exact import exact_cuts

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from splitquant_plugins.clustering.prefix import Ascending

    Array = NDArray[Any]
    # Row numbers, places to try, and which stretches between them are open.
    _Work = tuple[Array, Array, Array]

# Up to this many positions per boundary are all tried; of more, the first level tries _FIRST.
_ALL = 24
_FIRST = 16
# Pieces that a stretch is cut into at the next level.
_PIECES = 4
# Only what may better the best found by more than this part of its inertia is looked into ...
_EXACT = 1e-11
# ... or this part, where so many stretches are left that the points must be close to a continuum of optima.
_CLOSE = 5e-7
_MANY = 512
# Matrix entries that are spent on a row, times the positions left, before the exact program takes it over.
_PATIENCE = 32
# Entries of the largest matrix.
_CELLS = 1 << 18


def best_cuts(data: Ascending, k: int, low: Array | None = None, high: Array | None = None) -> tuple[Array, Array]:
    """Cuts [rows, k - 1] of greatest gain, ascending positions, and their inertia [rows].

    Each row needs at least k distinct points. low, high [rows, k - 1]: where the cuts are, if that is known.
    """
    count = len(data.ends)
    if k == 1:
        return np.zeros((count, 0), dtype=np.int64), data.inertia.copy()
    if low is None or high is None:
        low, high = bracket(data, k)
    found = _Best(count, k)
    width = high - low
    number = np.where(width < _ALL, width + 1, _FIRST)
    levels = list(_groups(np.arange(count), number.max(1)))
    # Evenly spread positions, both ends among them.
    work = []
    for group, size in levels:
        step = np.minimum(np.arange(size), (number[group] - 1)[:, :, None])
        spread = step * width[group][:, :, None] // np.maximum(number[group] - 1, 1)[:, :, None]
        open_ = np.ones((*spread.shape[:2], size - 1), dtype=bool)
        work.append((group, low[group][:, :, None] + spread, open_))
    spent = np.zeros(count)
    patience = _PATIENCE * (1 << 10) + _PATIENCE * width.sum(1)
    while work:
        rows, places, open_ = work.pop()
        spent[rows] += places.shape[2] ** 2
        hasty = spent[rows] > patience[rows]
        for row in rows[hasty]:
            found.cuts[row], found.gain[row] = exact_cuts(data, int(row), low[row], high[row])
        if not hasty.all():
            work.extend(_level(data, rows[~hasty], places[~hasty], open_[~hasty], found))
    return found.cuts, data.inertia - found.gain


class _Best:
    def __init__(self, rows: int, k: int) -> None:
        self.gain = np.full(rows, -np.inf)
        self.cuts = np.zeros((rows, k - 1), dtype=np.int64)


def _groups(rows: Array, sizes: Array) -> Iterator[tuple[Array, int]]:
    """Rows of similar size together, in runs whose matrices stay small: row numbers and their largest size."""
    order = np.argsort(sizes, kind="stable")
    ordered = sizes[order]
    top = 0
    while top < len(order):
        # Sizes that differ by a quarter share a run.
        limit = max(8, int(ordered[top]) * 5 // 4)
        same = int(np.searchsorted(ordered, limit, side="right"))
        size = int(ordered[same - 1])
        end = min(same, top + max(1, _CELLS // size**2))
        yield rows[order[top:end]], size
        top = end


def _level(data: Ascending, rows: Array, places: Array, open_: Array, found: _Best) -> list[_Work]:
    """Try places [r, k - 1, size] (ascending, repeats allowed) of rows [r]; returns what to try next.

    open_: [r, k - 1, size - 1], whether a better boundary may be between a place and the next.
    """
    at = rows[:, None, None]
    ends = data.ends[rows]
    weight, total = data.weight(at, places), data.sum(at, places)
    whole = data.weight(rows, ends)[:, None], data.sum(rows, ends)[:, None]
    first = _gain(weight[:, 0], total[:, 0])
    last = _gain(whole[0] - weight[:, -1], whole[1] - total[:, -1])
    between = []
    for c in range(places.shape[1] - 1):
        heavy = weight[:, c + 1, None, :] - weight[:, c, :, None]
        moment = total[:, c + 1, None, :] - total[:, c, :, None]
        between.append(_gain(heavy, moment))
    overlap = bool((places[:, :-1, -1] > places[:, 1:, 0]).any())
    if overlap:
        apart = [
            np.where(places[:, c + 1, None, :] >= places[:, c, :, None], gain, -np.inf)
            for c, gain in enumerate(between)
        ]
        _keep_best(rows, places, first, apart, last, found)
    else:
        _keep_best(rows, places, first, between, last, found)
    length = np.where(open_, np.diff(places), 0)
    if int(length.max(initial=0)) <= 1:
        return []
    allowance = np.where(length > 1, _allowance(data, at, places, weight, total), 0)
    bound = _bounds(first, between, last, allowance)
    inertia = data.inertia[rows] - found.gain[rows]
    place, stretch = _worth_more(bound, allowance, length, found.gain[rows], inertia, _EXACT)
    many = (np.count_nonzero(stretch, axis=2).max(1) > _MANY)[:, None, None]
    if many.any():
        coarse_place, coarse_stretch = _worth_more(bound, allowance, length, found.gain[rows], inertia, _CLOSE)
        place, stretch = np.where(many, coarse_place, place), np.where(many, coarse_stretch, stretch)
    return _finer(rows, places, place, stretch)


def _gain(weight: Array, total: Array) -> Array:
    """S² / W; 0 for clusters that are empty or reversed, which must not count as a solution."""
    with np.errstate(invalid="ignore", divide="ignore"):
        gain = np.square(total)
        gain /= weight
    if weight.min(initial=1) <= 0:
        gain[weight <= 0] = 0
    return gain


def _keep_best(rows: Array, places: Array, first: Array, between: list[Array], last: Array, found: _Best) -> None:
    """The dynamic program: the best of all combinations of places, kept where it beats what was found before."""
    best, choices = first, []
    for gain in between:
        candidates = best[:, :, None] + gain
        choices.append(candidates.argmax(1))
        best = np.take_along_axis(candidates, choices[-1][:, None, :], axis=1)[:, 0]
    best = best + last
    index = np.arange(len(rows))
    choice = best.argmax(1)
    gain = best[index, choice]
    better = gain > found.gain[rows]
    found.gain[rows] = np.where(better, gain, found.gain[rows])
    for c in range(places.shape[1] - 1, -1, -1):
        found.cuts[rows[better], c] = places[index, c, choice][better]
        if c:
            choice = choices[c - 1][index, choice]


def _allowance(data: Ascending, at: Array, places: Array, weight: Array, total: Array) -> Array:
    """What a boundary between two neighbouring places can gain over the better of both: [r, k - 1, size - 1]."""
    rows = at[:, :, 0]
    heavy, moment = np.diff(weight), np.diff(total)
    low = data.point(at, np.minimum(places[:, :, :-1], data.ends[at] - 1))
    high = data.point(at, np.maximum(places[:, :, 1:] - 1, 0))
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = moment / heavy
        sag = heavy * (mean - low) * (high - mean) / (high - low)
    # Equal points do not sag; NaN from an empty stretch does not either.
    sag = np.where(high > low, np.maximum(sag, 0), 0)
    lowest, highest = places[:, :, 0], places[:, :, -1]
    span = (data.points[rows, -1:] - data.points[rows, :1])[:, 0]
    apart = data.centers(rows, highest)[:, 1:] - data.centers(rows, lowest)[:, :-1]
    # Where stretches of neighbouring boundaries overlap, a cluster may vanish on the way to their ends; then the
    # centres on either side, and once more their distance, are within the whole range.
    crossing = (highest[:, :-1] > lowest[:, 1:]).any(1) | ~np.isfinite(apart).all(1)
    apart = np.where(crossing[:, None], 2 * span, apart)
    allowance: Array = 2 * sag * apart[:, :, None]
    return allowance


def _bounds(first: Array, between: list[Array], last: Array, allowance: Array) -> Array:
    """Upper bound of the gain with a boundary at a place and the others anywhere: [r, k - 1, size]."""
    bonus = np.zeros((*allowance.shape[:2], allowance.shape[2] + 1))
    bonus[:, :, :-1] = allowance
    np.maximum(bonus[:, :, 1:], allowance, out=bonus[:, :, 1:])
    forward, backward = [first], [last]
    for c, gain in enumerate(between):
        forward.append(((forward[-1] + bonus[:, c])[:, :, None] + gain).max(1))
    for c in range(len(between), 0, -1):
        backward.append((between[c - 1] + (backward[-1] + bonus[:, c])[:, None, :]).max(2))
    return np.stack(forward, axis=1) + np.stack(backward[::-1], axis=1)


def _worth_more(
    bound: Array, allowance: Array, length: Array, gain: Array, inertia: Array, tolerance: float
) -> tuple[Array, Array]:
    """Places, and stretches between places, that may be part of a better solution than the best so far."""
    enough = (gain + np.maximum(tolerance * inertia, 1e-15 * gain))[:, None, None]
    place = bound > enough
    stretch = (np.maximum(bound[:, :, 1:], bound[:, :, :-1]) + allowance > enough) & (length > 1)
    # Without an open stretch all that is left has been tried.
    open_rows: Array = np.any(stretch, axis=(1, 2), keepdims=True)
    return place & open_rows, stretch & open_rows


def _finer(rows: Array, places: Array, place: Array, stretch: Array) -> list[_Work]:
    """The places to try next: those worth keeping, and new ones that cut the stretches in pieces."""
    place = place.copy()
    place[:, :, :-1] |= stretch
    place[:, :, 1:] |= stretch
    open_rows = np.flatnonzero(stretch.any((1, 2)))
    if not len(open_rows):
        return []
    places, place, stretch = places[open_rows], place[open_rows], stretch[open_rows]
    start, length = places[:, :, :-1], np.diff(places)
    inner = start[..., None] + length[..., None] * np.arange(1, _PIECES) // _PIECES
    candidates = np.concatenate([places, inner.reshape(*places.shape[:2], -1)], axis=2)
    pieces = np.repeat(stretch, _PIECES - 1, axis=2)
    chosen = np.concatenate([place, pieces], axis=2)
    # The lowest bit says that the stretch behind a place is open; the last place has none behind it.
    candidates = 2 * candidates + np.concatenate([stretch, np.zeros_like(stretch[:, :, :1]), pieces], axis=2)
    # Places that are not chosen go to the end, as repeats of the last chosen one.
    lastly = np.where(chosen, candidates, -1).max(2, keepdims=True)
    candidates = np.where(chosen, candidates, lastly)
    candidates.sort(axis=2)
    number = np.count_nonzero(chosen, axis=2).max(1)
    return [
        (rows[open_rows[group]], candidates[group][:, :, :size] >> 1, (candidates[group][:, :, : size - 1] & 1) > 0)
        for group, size in _groups(np.arange(len(number)), number)
    ]
