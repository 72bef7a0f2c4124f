"""One-dimensional k-means: optimal, deterministic, one call for all rows of a tensor.

In one dimension clusters are intervals, so k-means is a search for k - 1 boundaries that maximises
sum_c S_c² / W_c (S the sum, W the weight of a cluster), and both come from prefix sums. Two ways lead to
those prefix sums: short rows are sorted; long rows are counted in fine, even bins, and the exact sums at
the boundaries are taken from the values afterwards. The search is the same for both: a dynamic program
(Wang and Song, "Ckmeans.1d.dp", R Journal 2011) over a sketch of the prefix sums, then a dynamic program
over the positions near each boundary until nothing moves.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from splitquant_plugins.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray
    from torch import Tensor

    Array = NDArray[Any]

# A row with fewer values than this is sorted; above, counting is faster.
_SORT_BELOW = 1 << 16
# Values that one step works on: few enough to stay in the cache, enough to keep the threads busy.
_CHUNK = 1 << 17
# Positions in the sketch, coarse first; a row goes on to the next size where the sketch explains it badly.
_SKETCHES = (64, 256, 768)
# Part of the inertia that may hide between neighbouring positions of a sketch.
_HIDDEN = 0.02
# A local optimum of the sketch that is worse than the best by more than this part of the inertia is dropped.
_RIVAL = 0.05
# Part of the inertia by which counted clusters may miss the local optimum.
_TOLERANCE = 5e-7
# Steps of a boundary in one round of the local search: all short ones, because real values are noisy.
_STEPS = (*range(1, 13), 15, 19, 24, 30, 40, 60)
_ROUNDS = 200
# Runs of more than this many equal values are merged into one weighted value.
_RUN = 4
# Values of 16-bit types have at most 65,536 codes: longer rows than this are tallied code by code.
_TALLY_FROM = 1 << 14
# Values in one batch of rows.
_BLOCK = 1 << 18


@dataclass(frozen=True)
class Clusters:
    """The clusters of each row: value v belongs to cluster number sum(v >= boundaries).

    boundaries: [rows, k - 1], ascending, in the values' dtype and on their device.
    centers, inertia: [rows, k] and [rows], float64.
    counts: [rows, k], float64: the values in each cluster, or their total weight.
    sizes: [rows], the number of clusters in use. A row with fewer than k distinct values uses fewer: the
    last ones are empty, with boundary +inf, centre NaN and count 0.
    """

    boundaries: Tensor
    centers: Tensor
    inertia: Tensor
    counts: Tensor
    sizes: Tensor


def optimal_clusters(values: Tensor, k: int, *, weights: Tensor | None = None) -> Clusters:
    """Cluster each row of `values` into at most `k` intervals of least inertia (sum of squared distances).

    values: [rows, n] or [n] (one row), any float dtype; the work is done on the CPU.
    weights: non-negative, of the same shape; needs a positive one in every row.
    Rows of up to 64 distinct values reach the optimum. Longer ones reach the local optimum of the best
    candidates of the sketch, which in practice is the optimum; rows counted in bins come within a relative
    1e-6 of it. Where the inertia is less than 1e-10 of that of one cluster, float64 sums limit the answer.
    Raises InputError for k < 1, no values, values or weights that are not finite, negative weights.
    """
    rows = values.detach().reshape(1, -1) if values.ndim < 2 else values.detach().flatten(1)
    if k < 1:
        raise InputError(f"k={k}: at least one cluster is needed")
    if rows.numel() == 0:
        raise InputError(f"values of shape {tuple(values.shape)}: nothing to cluster")
    if not rows.is_floating_point():
        raise InputError(f"values of dtype {values.dtype}: convert them to a float dtype first")
    low, high = (bound.double() for bound in torch.aminmax(rows.cpu(), dim=1))
    if not bool((torch.isfinite(low) & torch.isfinite(high)).all()):
        raise InputError("values are not all finite: NaN and infinity have no cluster")
    host = rows.cpu()
    found = _Result(host.shape[0], k)
    if weights is not None:
        _cluster_weighted(host, _checked_weights(weights, values).cpu(), k, found)
    else:
        _cluster(host, k, low.numpy(), high.numpy(), found)
    return found.clusters(rows)


def assign(values: Tensor, boundaries: Tensor) -> Tensor:
    """Cluster number of each value: [rows, n] or [n] with boundaries [rows, k - 1] or [1, k - 1], int64."""
    bounds = boundaries if boundaries.ndim == 2 else boundaries[None]
    labels = torch.zeros(values.shape, dtype=torch.int64, device=values.device)
    for column in bounds.unbind(1):
        labels += values >= (column if values.ndim < 2 else column[:, None])
    return labels


def masked_parts(rows: Tensor, boundaries: Tensor) -> list[Tensor]:
    """Split `rows` [rows, n] into k tensors of its shape; each value is in one of them, 0 in the others.

    boundaries: [rows, k - 1], or [1, k - 1] for all rows, in the dtype of `rows`, ascending.
    The values must be finite.
    """
    k = boundaries.shape[1] + 1
    if k == 1:
        return [rows.clone()]
    parts = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(k)]
    shared = boundaries.shape[0] == 1
    flat = shared and rows.is_contiguous()
    source = rows.view(1, -1) if flat else rows
    targets = [part.view(1, -1) if flat else part for part in parts]
    for block in _blocks(*source.shape):
        chunk = source[block]
        bounds = boundaries if shared else boundaries[block[0]]
        rest = chunk
        # What is left from boundary j on; a part is the difference of two such tails, which is exact
        # because wherever both have a value it is the same one.
        for number in range(k - 1):
            tail = targets[number + 1][block]
            _at_least(chunk, bounds[:, number : number + 1], tail)
            torch.sub(rest, tail, out=targets[number][block])
            rest = tail
    return parts


def _at_least(values: Tensor, bound: Tensor, out: Tensor) -> None:
    """Write the values that are >= bound [rows or 1, 1] to `out`, and 0 for the others."""
    if bound.numel() == 1 and values.dtype in (torch.float32, torch.float64):
        # `threshold` keeps what is greater than a number, in one pass.
        below = torch.nextafter(bound, torch.full_like(bound, -torch.inf))
        torch.ops.aten.threshold.out(values, below.item(), 0.0, out=out)
    else:
        torch.mul(values, (values >= bound).to(values.dtype), out=out)


def _blocks(rows: int, n: int) -> Iterator[tuple[slice, slice]]:
    """Cut [rows, n] into blocks of about _CHUNK values."""
    width = min(n, _CHUNK)
    height = max(1, _CHUNK // width)
    for top in range(0, rows, height):
        for left in range(0, n, width):
            yield slice(top, min(top + height, rows)), slice(left, min(left + width, n))


def _checked_weights(weights: Tensor, values: Tensor) -> Tensor:
    if weights.shape != values.shape:
        raise InputError(f"weights of shape {tuple(weights.shape)} for values of {tuple(values.shape)}")
    rows = weights.detach().double()
    rows = rows.reshape(1, -1) if rows.ndim < 2 else rows.flatten(1)
    if not bool(torch.isfinite(rows).all()) or bool((rows < 0).any()):
        raise InputError("weights must be finite and not negative")
    if not bool((rows.amax(1) > 0).all()):
        raise InputError("weights are all zero in a row: nothing to cluster there")
    return rows


class _Result:
    """The answer, filled in row by row; boundaries as float64, which holds every float dtype exactly."""

    def __init__(self, rows: int, k: int) -> None:
        self.boundaries = np.full((rows, k - 1), np.inf)
        self.centers = np.full((rows, k), np.nan)
        self.inertia = np.zeros(rows)
        self.counts = np.zeros((rows, k))

    def clusters(self, like: Tensor) -> Clusters:
        device = like.device
        return Clusters(
            torch.from_numpy(self.boundaries).to(like.dtype).to(device),
            torch.from_numpy(self.centers).to(device),
            torch.from_numpy(self.inertia).to(device),
            torch.from_numpy(self.counts).to(device),
            torch.from_numpy((self.counts > 0).sum(1)).to(device),
        )


# --- Three ways to prefix sums ---------------------------------------------------------------------------


def _cluster(rows: Tensor, k: int, low: Array, high: Array, found: _Result) -> None:
    number, n = rows.shape
    half = rows.dtype not in (torch.float32, torch.float64)
    if half and n >= _TALLY_FROM:
        for row in range(number):
            distinct, counts = _tally(rows[row])
            _solve_sorted(distinct[None], counts[None], k, found, np.array([row]))
        return
    spread = high - low
    # Beyond these magnitudes the bin of a value would overflow or underflow; sorting does not mind.
    countable = (spread > 1e-30) & (spread < 1e30) & (n >= _SORT_BELOW) & (k > 1) & (not half)
    left = np.flatnonzero(~countable)
    for block in _row_blocks(np.flatnonzero(countable), max(n, _bins(n))):
        badly = _solve_counted(rows, block, k, low[block], spread[block], found)
        left = np.concatenate([left, badly])

    def solve(block: Array) -> None:
        values = _take(rows, block)
        _solve_sorted(np.sort((values.float() if half else values).numpy(), axis=1), None, k, found, block)

    # NumPy works outside the interpreter lock, and the blocks write to rows of their own.
    blocks = _row_blocks(left, n)
    with ThreadPoolExecutor(max(1, min(torch.get_num_threads(), len(blocks)))) as pool:
        list(pool.map(solve, blocks))


def _cluster_weighted(rows: Tensor, weights: Tensor, k: int, found: _Result) -> None:
    for block in _row_blocks(np.arange(rows.shape[0]), rows.shape[1]):
        values = _take(rows, block).double().numpy()
        weight = _take(weights, block).numpy()
        # A value without weight counts for nothing: put it onto one that has weight.
        heaviest = np.take_along_axis(values, weight.argmax(1)[:, None], axis=1)
        values = np.where(weight > 0, values, heaviest)
        order = np.argsort(values, axis=1, kind="stable")
        ascending = np.take_along_axis(values, order, axis=1)
        _solve_sorted(ascending, np.take_along_axis(weight, order, axis=1), k, found, block)


def _row_blocks(rows: Array, n: int) -> list[Array]:
    """Cut row numbers into runs of about _BLOCK values, which bounds the scratch memory."""
    height = max(1, _BLOCK // n)
    return [rows[top : top + height] for top in range(0, len(rows), height)]


def _take(rows: Tensor, numbers: Array) -> Tensor:
    first, last = int(numbers[0]), int(numbers[-1])
    if last - first + 1 == len(numbers):
        return rows[first : last + 1]
    return rows[torch.from_numpy(numbers)]


def _tally(row: Tensor) -> tuple[Array, Array]:
    """Distinct values of a 16-bit float tensor in ascending order, and how often each occurs."""
    counts = torch.zeros(1 << 16, dtype=torch.int64)
    codes = row.contiguous().view(torch.int16)
    for start in range(0, len(codes), _CHUNK):
        counts += torch.bincount(codes[start : start + _CHUNK].to(torch.int32).add_(1 << 15), minlength=1 << 16)
    present = counts.nonzero().flatten()
    values = (present - (1 << 15)).to(torch.int16).view(row.dtype).float().numpy()
    order = np.argsort(values, kind="stable")
    return values[order], counts[present].numpy().astype(np.float64)[order]


def _solve_sorted(values: Array, weights: Array | None, k: int, found: _Result, rows: Array) -> None:
    """Cluster ascending rows [r, n]; `weights` [r, n] where values do not count once each."""
    largest = np.maximum(np.abs(values[:, :1]), np.abs(values[:, -1:])).astype(np.float64)
    # Scaling by a power of two is exact, and keeps squares from overflowing.
    exponent = np.frexp(largest)[1]
    points, mass = _distinct(values.astype(np.float64), weights)
    edges = np.concatenate([points, np.full_like(points[:, :1], np.inf)], axis=1)
    edges[:, :-1][mass == 0] = np.inf
    scaled = np.ldexp(points, -exponent)
    total = mass.sum(1, keepdims=True)
    middle = np.einsum("ij,ij->i", mass, scaled)[:, None] / total
    scaled -= middle
    sums = _PrefixSums(mass / total, scaled)
    cuts, inertia = _search(sums, k)
    for _ in range(_RUN - 1):
        # Equal values are one cluster's: a boundary comes before the first of them.
        inside = np.take_along_axis(edges, cuts, 1) == np.take_along_axis(edges, np.maximum(cuts - 1, 0), 1)
        cuts -= inside & (cuts > 0)
    cuts = _without_empty(cuts, mass.shape[1])
    weight, moment = _per_cluster(sums.weight, cuts), _per_cluster(sums.sum, cuts)
    with np.errstate(invalid="ignore"):
        centers = moment / weight
    # Prefix sums cancel where the clusters are tight: sum the squares there.
    tight = np.flatnonzero(inertia < 1e-5 * sums.inertia)
    label = (np.arange(mass.shape[1])[:, None] >= cuts[tight, None, :]).sum(2)
    offset = scaled[tight] - np.take_along_axis(centers[tight], label, axis=1)
    inertia[tight] = (sums.mass[tight] * offset * offset).sum(1)
    found.boundaries[rows] = np.take_along_axis(edges, cuts, axis=1)
    found.centers[rows] = np.ldexp(centers + middle, exponent)
    found.inertia[rows] = np.ldexp(inertia * total[:, 0], 2 * exponent[:, 0])
    # From the weights themselves, whose sums are exact where they are counts.
    found.counts[rows] = _per_cluster(np.pad(np.cumsum(mass, axis=1), ((0, 0), (1, 0))), cuts)


def _distinct(values: Array, weights: Array | None) -> tuple[Array, Array]:
    """Distinct values of ascending rows and their weights, filled up with the last value and weight 0.

    Values that are equal to few others stay as they are; the search can step over them.
    """
    if weights is None and not (values[:, _RUN:] == values[:, :-_RUN]).any():
        return values, np.ones_like(values)
    new = np.ones(values.shape, dtype=bool)
    np.not_equal(values[:, 1:], values[:, :-1], out=new[:, 1:])
    height = len(values)
    position = np.cumsum(new, axis=1) - 1
    width = int(position[:, -1].max()) + 1
    index = position + np.arange(height)[:, None] * width
    flat_weights = None if weights is None else weights.ravel()
    mass = np.bincount(index.ravel(), flat_weights, minlength=height * width).reshape(height, width)
    points = np.repeat(values[:, -1:], width, axis=1)
    points.ravel()[index[new]] = values[new]
    return points, mass.astype(np.float64)


def _without_empty(cuts: Array, end: int) -> Array:
    """The same clusters with the empty ones last: each position once, then `end`."""
    cuts = np.sort(cuts, axis=1)
    useless = cuts == 0
    useless[:, 1:] |= cuts[:, 1:] == cuts[:, :-1]
    return np.sort(np.where(useless, end, cuts), axis=1)


def _per_cluster(prefix: Array, cuts: Array) -> Array:
    """Sums [rows, k] between the cuts [rows, k - 1] from prefix sums [rows, m + 1]."""
    ends = np.pad(cuts, ((0, 0), (1, 1)))
    ends[:, -1] = prefix.shape[1] - 1
    return np.diff(np.take_along_axis(prefix, ends, axis=1))


def _bins(n: int) -> int:
    return min(1 << 16, n // 16)


def _solve_counted(rows: Tensor, block: Array, k: int, low: Array, spread: Array, found: _Result) -> Array:
    """Cluster rows by counts in even bins; returns the numbers of the rows that this is too coarse for.

    Positions t are in bins, relative to the mean: x = low + (t + mean) * width.
    """
    values = _take(rows, block)
    n = values.shape[1]
    bins = _bins(n)
    low, width = low[:, None], (spread / bins)[:, None]
    mass = _bin_counts(values, low, spread[:, None], bins) / n
    mean = (mass @ (np.arange(bins) + 0.5))[:, None]
    sums = _PrefixSums(mass, np.arange(bins) + 0.5 - mean)
    cuts, inertia = _search(sums, k)
    # What evenly spread values add within a bin of width 1 is 1/12; it must not matter.
    good: Array = inertia * _HIDDEN > 1 / 12
    at = cuts - mean
    for _ in range(4):
        weight, moment = sums.between(at + mean)
        at += _newton_step(at, weight, moment, sums.density(at + mean))
    for attempt in range(4):
        bounds = torch.from_numpy(low + (at + mean) * width).to(rows.dtype)
        at = (bounds.double().numpy() - low) / width - mean
        counts, moments, squares = _exact_sums(values, bounds, low + mean * width)
        weight, moment = counts / n, moments / (n * width)
        density = sums.density(at + mean)
        step = _newton_step(at, weight, moment, density)
        with np.errstate(invalid="ignore", divide="ignore"):
            centers = moment / weight
            inertia = squares / (n * width[:, 0] ** 2) - (moment * centers).sum(1)
            off_middle = at - (centers[:, 1:] + centers[:, :-1]) / 2
            # All values in the bins from here to the middle, as if on the wrong side.
            between = sums.mass_of_bins(at + mean, at + mean - off_middle)
            excess = (between * np.diff(centers) * np.abs(off_middle)).sum(1)
            done: Array = excess <= _TOLERANCE * inertia
        good &= (weight > 0).all(1)
        if done[good].all() or attempt == 3:
            break
        at = at + np.where(done[:, None], 0, step)
    good &= done
    settled = block[good]
    found.boundaries[settled] = bounds.double().numpy()[good]
    found.centers[settled] = (low + (centers + mean) * width)[good]
    found.inertia[settled] = (inertia * n * width[:, 0] ** 2)[good]
    found.counts[settled] = counts[good]
    return block[~good]


def _bin_counts(values: Tensor, low: Array, spread: Array, bins: int) -> Array:
    """How many values of each row are in each of its `bins` even bins: [rows, bins], float64."""
    height, n = values.shape
    counts = torch.zeros(height * bins, dtype=torch.int64)
    origin = torch.from_numpy(low).to(values.dtype)
    # Slightly less than `bins` per spread, so that rounding cannot reach beyond the last bin.
    scale = torch.from_numpy(bins * (1 - 2e-6) / spread).to(values.dtype)
    for part, columns in _blocks(height, n):
        tall = part.stop - part.start
        place = (values[part, columns] - origin[part]).mul_(scale[part]).to(torch.int32)
        place += torch.arange(0, tall * bins, bins, dtype=torch.int32)[:, None]
        counts[part.start * bins : part.stop * bins] += torch.bincount(place.view(-1), minlength=tall * bins)
    return counts.view(height, bins).double().numpy()


def _exact_sums(values: Tensor, bounds: Tensor, origin: Array) -> tuple[Array, Array, Array]:
    """Count and sum of x - origin per cluster [rows, k], and the sum of their squares per row [rows]."""
    height, n = values.shape
    k = bounds.shape[1] + 1
    count = np.zeros((height, k + 1))
    moment = np.zeros((height, k + 1))
    square = np.zeros(height)
    shift = torch.from_numpy(origin)
    relative = bounds.double() - shift
    for part, columns in _blocks(height, n):
        chunk = values[part, columns]
        offset = chunk.double().sub_(shift[part])
        wide = chunk.shape[1]
        count[part, 0] += wide
        moment[part, 0] += offset.sum(1).numpy()
        for number in range(k - 1):
            column = slice(number, number + 1)
            above = torch.count_nonzero(chunk >= bounds[part, column], dim=1).numpy()
            # sum of max(x, b) is b for each value below, and x for the others.
            clamped = offset.clamp(min=relative[part, column]).sum(1).numpy()
            count[part, number + 1] += above
            moment[part, number + 1] += clamped - relative[part, number].numpy() * (wide - above)
        square[part] += torch.linalg.vecdot(offset, offset).numpy()
    return -np.diff(count), -np.diff(moment), square


def _newton_step(at: Array, weight: Array, moment: Array, density: Array) -> Array:
    """Step of the boundaries towards the middle between the centres on either side (Lloyd's condition)."""
    with np.errstate(invalid="ignore", divide="ignore"):
        center = moment / weight
        left = density * (at - center[:, :-1]) / (2 * weight[:, :-1])
        right = density * (center[:, 1:] - at) / (2 * weight[:, 1:])
    residual = at - (center[:, 1:] + center[:, :-1]) / 2
    number = at.shape[1]
    jacobian = np.zeros((len(at), number, number))
    diagonal = np.arange(number)
    jacobian[:, diagonal, diagonal] = 1 - left - right
    jacobian[:, diagonal[1:], diagonal[:-1]] = -right[:, :-1]
    jacobian[:, diagonal[:-1], diagonal[1:]] = -left[:, 1:]
    usable = np.logical_and(np.isfinite(jacobian).all((1, 2)), np.isfinite(residual).all(1))
    usable[usable] = np.abs(np.linalg.det(jacobian[usable])) > 1e-3
    step = np.where(np.isfinite(residual), -residual, 0)
    step[usable] = -np.linalg.solve(jacobian[usable], residual[usable][..., None])[..., 0]
    return np.clip(step, -1, 1)


# --- The search ------------------------------------------------------------------------------------------


class _PrefixSums:
    """Weight (in total 1) and first moment of the points before each position, for ascending points.

    mass, points: [rows, m], points relative to their mean; weight, sum: [rows, m + 1].
    """

    def __init__(self, mass: Array, points: Array) -> None:
        self.mass = mass
        self.points = points
        shape = (mass.shape[0], mass.shape[1] + 1)
        self.weight = np.zeros(shape)
        self.sum = np.zeros(shape)
        np.cumsum(mass, axis=1, out=self.weight[:, 1:])
        moment = mass * points
        np.cumsum(moment, axis=1, out=self.sum[:, 1:])
        self.inertia = np.einsum("ij,ij->i", moment, points)

    def take(self, rows: Array) -> _PrefixSums:
        chosen = object.__new__(_PrefixSums)
        for name in ("mass", "points", "weight", "sum", "inertia"):
            setattr(chosen, name, getattr(self, name)[rows])
        return chosen

    def density(self, place: Array) -> Array:
        """Mass per bin around a place, over three bins."""
        last = self.mass.shape[1]
        index = np.floor(place).astype(np.int64)
        above = np.take_along_axis(self.weight, np.clip(index + 2, 0, last), axis=1)
        return (above - np.take_along_axis(self.weight, np.clip(index - 1, 0, last), axis=1)) / 3

    def mass_of_bins(self, one: Array, other: Array) -> Array:
        """Mass of the bins from one place to another, both included."""
        last = self.mass.shape[1] - 1
        low = np.clip(np.floor(np.fmin(one, other)), 0, last).astype(np.int64)
        high = np.clip(np.floor(np.fmax(one, other)), 0, last).astype(np.int64)
        return np.take_along_axis(self.weight, high + 1, 1) - np.take_along_axis(self.weight, low, 1)

    def between(self, place: Array) -> tuple[Array, Array]:
        """Weight and moment between places, with the mass of a bin spread evenly over it."""
        index = np.clip(np.floor(place).astype(np.int64), 0, self.mass.shape[1] - 1)
        part = place - index
        mass = np.take_along_axis(self.mass, index, axis=1)
        start = np.take_along_axis(self.points, index, axis=1) - 0.5
        weight = np.take_along_axis(self.weight, index, axis=1) + part * mass
        moment = np.take_along_axis(self.sum, index, axis=1) + part * mass * (start + part / 2)
        ends = ((0, 0), (1, 0))
        weight, moment = np.pad(weight, ends), np.pad(moment, ends)
        return (
            np.diff(np.concatenate([weight, self.weight[:, -1:]], axis=1)),
            np.diff(np.concatenate([moment, self.sum[:, -1:]], axis=1)),
        )


def _gain(weight: Array, total: Array) -> Array:
    """What a cluster takes off the inertia: S² / W, 0 for an empty one, -inf for a reversed one."""
    return np.where(weight < 0, -np.inf, total * total / np.maximum(weight, 1e-300))


def _search(sums: _PrefixSums, k: int) -> tuple[Array, Array]:
    """Best positions of k - 1 boundaries [rows, k - 1] (between 0 and m, ascending) and their inertia."""
    rows, m = sums.mass.shape
    cuts = np.zeros((rows, k - 1), dtype=np.int64)
    inertia = sums.inertia.copy()
    if k == 1:
        return cuts, inertia
    left = np.arange(rows)
    for size in _SKETCHES:
        height = max(1, _BLOCK // (8 * size * size))
        hard = []
        for top in range(0, len(left), height):
            block = left[top : top + height]
            part = sums if len(block) == rows else sums.take(block)
            cuts[block], inertia[block], hidden = _search_sketch(part, k, size)
            hard.append(block[hidden > _HIDDEN * inertia[block]])
        left = np.concatenate(hard)
        if size >= m or not len(left):
            break
    return cuts, inertia


def _search_sketch(sums: _PrefixSums, k: int, size: int) -> tuple[Array, Array, Array]:
    """Boundaries, inertia, and the inertia that the sketch of about `size` positions does not resolve."""
    positions = _sketch(sums, size)
    weight = np.take_along_axis(sums.weight, positions, axis=1)
    total = np.take_along_axis(sums.sum, positions, axis=1)
    size = positions.shape[1]
    # gains[:, j, i]: of the cluster from position i up to position j.
    gains = weight[:, :, None] - weight[:, None, :]
    np.maximum(gains, 1e-300, out=gains)
    moment = total[:, :, None] - total[:, None, :]
    np.divide(np.square(moment, out=moment), gains, out=gains)
    gains += np.triu(np.full((size, size), -np.inf), 1)
    hidden = sums.inertia - np.diagonal(gains, -1, 1, 2).sum(1)
    best = gains[:, :, 0]
    choices = []
    for _ in range(k - 2):
        candidates = gains + best[:, None, :]
        choice = candidates.argmax(2)
        best = np.take_along_axis(candidates, choice[:, :, None], axis=2)[:, :, 0]
        choices.append(choice)
    last = best + gains[:, -1, :]
    row, end = _peaks(last, sums.inertia)
    ends = [end]
    for choice in reversed(choices):
        ends.insert(0, choice[row, ends[0]])
    cuts = positions[row[:, None], np.stack(ends, axis=1)]
    gain = _climb(sums, row, cuts)
    # The best candidate of each row: candidates are ordered by row.
    order = np.lexsort((-gain, row))
    first = order[np.unique(row[order], return_index=True)[1]]
    # A sketch of all positions hides nothing.
    hidden = np.zeros_like(hidden) if size > sums.mass.shape[1] else hidden
    return cuts[first], sums.inertia - gain[first], hidden


def _sketch(sums: _PrefixSums, size: int) -> Array:
    """Positions [rows, about size] that resolve the values well, ascending, with 0 and m."""
    rows, m = sums.mass.shape
    if m <= size:
        return np.broadcast_to(np.arange(m + 1), (rows, m + 1))
    # A boundary that is off by h costs density * h², so most positions go with the root of the density;
    # others with the mass, and some close to both ends, where one value can be a cluster.
    half, quarter = size // 2, size // 4
    measure = np.diff(sums.points, axis=1, prepend=sums.points[:, :1])
    measure *= sums.mass
    np.sqrt(np.maximum(measure, 0, out=measure), out=measure)
    np.cumsum(measure, axis=1, out=measure)
    by_root = _quantiles(measure, half)
    by_mass = _quantiles(sums.weight[:, 1:], quarter) + 1
    tail = np.unique(np.geomspace(1, max(2, m // 4), size - half - quarter - 2, dtype=np.int64) // 1)
    tail = tail[: (size - half - quarter - 2) // 2 + 1]
    used = np.count_nonzero(sums.weight[:, :-1] < sums.weight[:, -1:], axis=1)[:, None]
    fixed = np.broadcast_to(np.array([0, m]), (rows, 2))
    near_low = np.broadcast_to(tail, (rows, len(tail)))
    positions = np.concatenate([fixed, by_root, by_mass, near_low, np.maximum(used - tail, 0)], axis=1)
    positions.sort(axis=1)
    return positions


def _quantiles(ascending: Array, number: int) -> Array:
    """Per row, the first positions where `ascending` [rows, m] reaches even fractions of its last value."""
    rows, m = ascending.shape
    shift = 2.0 * np.arange(rows)[:, None]
    last = ascending[:, -1:]
    # All rows in one ascending sequence, row r between 2 r and 2 r + 1.
    chain = (ascending / np.where(last > 0, last, 1) + shift).ravel()
    targets = (np.arange(number) + 0.5) / number + shift
    found = np.searchsorted(chain, targets.ravel()).reshape(rows, number) - np.arange(rows)[:, None] * m
    return np.minimum(found, m - 1)


def _peaks(gain: Array, inertia: Array) -> tuple[Array, Array]:
    """Local maxima of [rows, size] that may lead to the global one: row numbers, in order, and columns."""
    best = gain.max(1, keepdims=True)
    peak: Array = gain >= best - _RIVAL * (inertia[:, None] - best)
    peak[:, 1:] &= gain[:, 1:] > gain[:, :-1]
    peak[:, :-1] &= gain[:, :-1] >= gain[:, 1:]
    # With equal neighbours everywhere there may be no peak; the best column always is one.
    peak[np.arange(len(gain)), gain.argmax(1)] = True
    row, column = np.nonzero(peak)
    return row, column


def _climb(sums: _PrefixSums, row: Array, cuts: Array) -> Array:
    """Move cuts [q, k - 1] of rows row [q], in place, to a local optimum; returns their gain [q].

    A dynamic program over all combinations of steps of all boundaries, until none is better.
    """
    steps = np.array(sorted({0, *_STEPS, *(-step for step in _STEPS)}))
    gain = np.full(len(row), -np.inf)
    active = np.arange(len(row))
    height = max(1, _CHUNK // (2 * len(steps) ** 2))
    for _ in range(_ROUNDS):
        moving = []
        for top in range(0, len(active), height):
            block = active[top : top + height]
            better, new = _best_step(sums, row[block], cuts[block], steps)
            moved = better > gain[block] + 1e-16
            gain[block] = np.maximum(better, gain[block])
            cuts[block[moved]] = new[moved]
            moving.append(block[moved])
        active = np.concatenate(moving)
        if not len(active):
            break
    return gain


def _best_step(sums: _PrefixSums, row: Array, cuts: Array, steps: Array) -> tuple[Array, Array]:
    """The best combination of steps: gain [q] and new cuts [q, k - 1]."""
    m = sums.mass.shape[1]
    places = np.clip(cuts[:, :, None] + steps, 0, m)
    rows = row[:, None, None]
    weight, total = sums.weight[rows, places], sums.sum[rows, places]
    best = _gain(weight[:, 0], total[:, 0])
    choices = []
    for number in range(1, cuts.shape[1]):
        between = weight[:, number, :, None] - weight[:, number - 1, None, :]
        moment = total[:, number, :, None] - total[:, number - 1, None, :]
        candidates = _gain(between, moment)
        candidates += best[:, None, :]
        choice = candidates.argmax(2)
        best = np.take_along_axis(candidates, choice[:, :, None], axis=2)[:, :, 0]
        choices.append(choice)
    best = best + _gain(sums.weight[row, -1:] - weight[:, -1], sums.sum[row, -1:] - total[:, -1])
    choice = best.argmax(1)
    gain = best[np.arange(len(row)), choice]
    new = np.empty_like(cuts)
    for number in range(cuts.shape[1] - 1, -1, -1):
        new[:, number] = places[np.arange(len(row)), number, choice]
        if number:
            choice = choices[number - 1][np.arange(len(row)), choice]
    return gain, new
