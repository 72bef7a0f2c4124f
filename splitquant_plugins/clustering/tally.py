"""Long rows: counts in place of sorting.

A 16-bit float has at most 65,536 values, so counting them is exact. Values of wider types are counted in even
bins; the bins say where the boundaries of an optimum must be, and only the values there are sorted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from splitquant_plugins.chunked import chunks, in_threads, spans
from splitquant_plugins.clustering.bracket import bracket
from splitquant_plugins.clustering.prefix import Ascending

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    Array = NDArray[Any]

_BINS = 1 << 16
_CHUNK = 1 << 16
# Where more than this part of the values may be at a boundary, sorting all of them is as good.
_MOST = 1 / 8
# Distance, in bins, that the bin's middle and rounding can put between a value and what stands for it.
_SLACK = 1.1


def tally(row: Tensor) -> tuple[Array, Array]:
    """Distinct values [m] of a 16-bit float tensor [n], ascending, and how often each occurs; both float64."""
    codes = row.contiguous().view(torch.int16).numpy().view(np.uint16)

    def count(span: slice) -> Array:
        return np.sum([np.bincount(codes[chunk], minlength=_BINS) for chunk in chunks(span, 1 << 18)], axis=0)

    counts = np.sum(in_threads(count, spans(len(codes))), axis=0)
    present = np.flatnonzero(counts)
    values = torch.from_numpy(present.astype(np.uint16).view(np.int16)).view(row.dtype).double().numpy()
    return merged(values, counts[present].astype(np.float64))


def merged(values: Array, mass: Array) -> tuple[Array, Array]:
    """Distinct values in ascending order, and the mass of each."""
    distinct, place = np.unique(values, return_inverse=True)
    return distinct, np.bincount(place, mass, minlength=len(distinct))


@dataclass(frozen=True)
class Condensed:
    """A row in which only the values near possible boundaries are told apart; the others are summed up.

    points, mass: [m], ascending; edges: [m], boundaries that put all before a point below them; origin: what the
    points are relative to; squares: the sum of the squared distances of all values from the origin.
    """

    points: Array
    mass: Array
    edges: Array
    origin: float
    squares: float


def condensed(row: Array, k: int) -> Condensed | None:
    """Keep apart only the values of row [n] that an optimum's boundaries can be next to; None if those are many.

    The optimum of the condensed row is the optimum of the row.
    """
    n = len(row)
    low = float(row.min())
    width = float(row.max()) / _BINS - low / _BINS
    scale = row.dtype.type((1 - 2e-6) / width)
    origin = row.dtype.type(low)
    if not (np.isfinite(scale) and width > 0 and np.isfinite(_BINS * width)):
        return None

    def count(span: slice) -> Array:
        place = np.empty(_CHUNK, dtype=row.dtype)
        total = np.zeros(_BINS, dtype=np.int64)
        for chunk in chunks(span, _CHUNK):
            part = place[: chunk.stop - chunk.start]
            np.subtract(row[chunk], origin, out=part)
            np.multiply(part, scale, out=part)
            total += np.bincount(part.astype(np.int64), minlength=_BINS)[:_BINS]
        return total

    every = spans(n)
    counts = np.sum(in_threads(count, every), axis=0)
    bins = np.flatnonzero(counts)
    if len(bins) <= 4 * k:
        return None
    data = Ascending((bins + 0.5)[None], counts[bins][None].astype(np.float64))
    first, last = (cuts[0] for cuts in bracket(data, k, slack=np.array([_SLACK])))
    near = np.zeros(_BINS, dtype=bool)
    for start, stop in zip(first, last, strict=True):
        # Cut p is between the bins number p - 1 and p; the boundary may be within either.
        near[max(int(bins[start - 1]) - 1, 0) : int(bins[min(stop, len(bins) - 1)]) + 2] = True
    if counts[near].sum() > _MOST * n:
        return None
    edges = np.flatnonzero(np.diff(near.astype(np.int8), prepend=0, append=0))
    borders = (low + edges * width).astype(row.dtype)
    return _gather(row, borders[::2], borders[1::2], float(low + (bins @ counts[bins] / n + 0.5) * width), every)


def _gather(row: Array, starts: Array, stops: Array, origin: float, every: list[slice]) -> Condensed:
    """Keep the values in [starts, stops) apart, and sum up those before each start and after the last stop."""
    bounds = starts.astype(np.float64) - origin

    def gather(span: slice) -> tuple[Array, float, float, list[Array]]:
        wide, clamped = np.empty(_CHUNK), np.empty(_CHUNK)
        below = np.zeros((2, len(starts)))
        total = squares = 0.0
        found = []
        for chunk in chunks(span, _CHUNK):
            values = row[chunk]
            offset = np.subtract(values, origin, out=wide[: len(values)], dtype=np.float64)
            total += offset.sum()
            squares += np.einsum("i,i", offset, offset)  # not BLAS, which brings threads of its own
            for i, bound in enumerate(bounds):
                near = values >= starts[i]
                below[0, i] += len(values) - np.count_nonzero(near)
                # The sum of min(x, b) - b is that of x - b over the values below b, and 0 for the others.
                below[1, i] += np.minimum(offset, bound, out=clamped[: len(values)]).sum() - bound * len(values)
                near &= values < stops[i]
                found.append(values[near])
        return below, total, squares, found

    answers = in_threads(gather, every)
    number, moment = np.sum([answer[0] for answer in answers], axis=0)
    moment = moment + bounds * number
    values = np.sort(np.concatenate([part for answer in answers for part in answer[3]]))
    places = np.searchsorted(values, starts)
    points: list[Array] = []
    mass: list[Array] = []
    edges: list[Array] = []
    before = np.zeros(2)
    for i in range(len(starts) + 1):
        until = (
            np.array([number[i], moment[i]])
            if i < len(starts)
            else np.array([len(row), sum(answer[1] for answer in answers)])
        )
        weight, total = until - before
        if weight > 0:
            points.append(np.array([total / weight]))
            mass.append(np.array([weight]))
            edges.append(np.array([stops[i - 1] if i else -np.inf]))
        if i < len(starts):
            stop = places[i + 1] if i + 1 < len(starts) else len(values)
            distinct, times = np.unique(values[places[i] : stop], return_counts=True)
            points.append(np.subtract(distinct, origin, dtype=np.float64))
            mass.append(times.astype(np.float64))
            edges.append(distinct.astype(np.float64))
            before = until + np.array([times.sum(), points[-1] @ times])
    squares = sum(answer[2] for answer in answers)
    return Condensed(np.concatenate(points), np.concatenate(mass), np.concatenate(edges), origin, squares)
