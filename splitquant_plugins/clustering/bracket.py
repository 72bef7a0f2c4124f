"""Where the boundaries of an optimum can be: Lloyd's step, run from both ends at once.

Lloyd's step puts each boundary in the middle between the centres beside it. In one dimension the centres grow
with the boundaries, so the step is monotone: from boundaries that are not above an optimum's, it leads to
boundaries that are not above it either. An optimum is a fixed point. So steps from the lowest boundaries there
can be, and steps from the highest, close in on every optimum, and need no luck.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from splitquant_plugins.clustering.prefix import first

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from splitquant_plugins.clustering.prefix import Ascending

    Array = NDArray[Any]

# Positions of the coarse steps, and how many steps are taken at most.
_EVEN = 48
_TAIL = 10
_COARSE_STEPS = 40
_FINE_STEPS = 10
# A few rows may take many steps: those cost little, and narrow brackets spare more.
_FEW_ROWS = 4
_STEPS_OF_FEW = 200
# What rounding may add to the middle of two centres, as a part of the row's largest distance from its mean.
_ROUNDING = 1e-12


def bracket(data: Ascending, k: int, slack: Array | None = None) -> tuple[Array, Array]:
    """Positions low, high [rows, k - 1] with low <= cuts <= high for the cuts of every optimum.

    Each row needs at least k distinct points. slack: [rows], by how much the middle of two centres may be off,
    where the points stand for values nearby.
    """
    rows = np.arange(len(data.ends))[:, None]
    number = np.arange(1, k)
    low = np.broadcast_to(number, (len(rows), k - 1))
    high = data.ends[:, None] - number[::-1]
    margin = _ROUNDING * np.maximum(-data.points[:, :1], data.points[:, -1:])
    if slack is not None:
        margin = margin + slack[:, None]
    low, high = _coarse(data, rows, low, high, margin)
    active = np.arange(len(rows))
    for _ in range(_STEPS_OF_FEW if len(rows) <= _FEW_ROWS else _FINE_STEPS):
        some, below, above = rows[active], low[active], high[active]
        new_low = first(data.points, some, _middles(data, some, below) - margin[active], below, above)
        new_high = first(data.points, some, _middles(data, some, above) + margin[active], below, above, above=True)
        low[active], high[active] = _not_empty(new_low, new_high, below, above)
        # Once few positions are left, trying them costs less than the next step.
        moved = (low[active] != below).any(1) | (high[active] != above).any(1)
        active = active[moved & ((high[active] - low[active]).max(1) > 6)]
        if not len(active):
            break
    return low, high


def _middles(data: Ascending, rows: Array, cuts: Array) -> Array:
    centers = data.centers(rows, cuts)
    return (centers[..., 1:] + centers[..., :-1]) / 2


def _not_empty(low: Array, high: Array, old_low: Array, old_high: Array) -> tuple[Array, Array]:
    """Bounds at least as close as the old ones, with a point between neighbours: no optimum has an empty cluster."""
    order = np.arange(low.shape[1])
    low = np.maximum.accumulate(np.maximum(low, old_low) - order, axis=1) + order
    high = np.minimum(high, old_high) - order
    high = np.minimum.accumulate(high[:, ::-1], axis=1)[:, ::-1] + order
    return low, high


def _coarse(data: Ascending, rows: Array, low: Array, high: Array, margin: Array) -> tuple[Array, Array]:
    """The first, long steps, on few positions: the lower bounds rounded down to one, the upper ones up."""
    ends = data.ends[:, None]
    tail = np.unique(np.geomspace(1, max(2, data.points.shape[1] // _EVEN), _TAIL).astype(np.int64))
    tail = np.concatenate([np.arange(low.shape[1] + 1), tail + low.shape[1]])
    even = ends * np.arange(1, _EVEN) // _EVEN
    places = np.concatenate([np.minimum(tail, ends), even, np.maximum(ends - tail, 0)], axis=1)
    places.sort(axis=1)
    before = np.where(places > 0, data.point(rows, np.maximum(places - 1, 0)), -np.inf)
    behind = np.where(places < ends, data.point(rows, np.minimum(places, ends - 1)), np.inf)
    for _ in range(_COARSE_STEPS):
        under = np.count_nonzero(before[:, None, :] < (_middles(data, rows, low) - margin)[:, :, None], axis=2) - 1
        over = np.count_nonzero(behind[:, None, :] <= (_middles(data, rows, high) + margin)[:, :, None], axis=2)
        new_low = np.take_along_axis(places, np.maximum(under, 0), axis=1)
        new_high = np.take_along_axis(places, np.minimum(over, places.shape[1] - 1), axis=1)
        new_low, new_high = _not_empty(new_low, new_high, low, high)
        moved = np.count_nonzero((new_low != low).any(1) | (new_high != high).any(1))
        low, high = new_low, new_high
        if 8 * moved <= len(low):
            break
    return low, high
