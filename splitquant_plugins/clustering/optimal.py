"""Clusters of least inertia for the rows of a tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from splitquant_plugins.chunked import in_threads
from splitquant_plugins.clustering.prefix import Ascending, first
from splitquant_plugins.clustering.search import best_cuts
from splitquant_plugins.clustering.tally import condensed, merged, tally
from splitquant_plugins.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    Array = NDArray[Any]

# Rows of 16-bit values from this length on are tallied, rows of other values from that length on condensed.
_TALLY_FROM = 1 << 14
_CONDENSE_FROM = 1 << 18
# Values in one batch of rows.
_BATCH = 1 << 20


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

    values: [rows, n] or [n] (one row), any float dtype; the work is done on the CPU, in float64.
    weights: non-negative, of the same shape; needs a positive one in every row.
    The inertia is the least there is, but for rounding: sums in float64, so that an error of about 1e-13 of the
    inertia of one cluster remains. Only where more than 512 stretches of values compete for a boundary, close to
    a continuum of optima, the search stops within a relative 5e-7 of the least inertia.
    Raises InputError for k < 1, no values, values or weights that are not finite, negative weights.
    """
    rows = values.detach().reshape(1, -1) if values.ndim < 2 else values.detach().flatten(1)
    if k < 1:
        raise InputError(f"k={k}: at least one cluster is needed")
    if rows.numel() == 0:
        raise InputError(f"values of shape {tuple(values.shape)}: nothing to cluster")
    if not rows.is_floating_point():
        raise InputError(f"values of dtype {values.dtype}: convert them to a float dtype first")
    host = rows.cpu()
    # NaN and infinity reach the sum; finite values whose sum overflows are looked at one by one.
    if not bool(torch.isfinite(host.sum())) and not bool(torch.isfinite(host).all()):
        raise InputError("values are not all finite: NaN and infinity have no cluster")
    found = _Result(host.shape[0], k)
    if weights is not None:
        _cluster_weighted(host.double().numpy(), _checked_weights(weights, values), k, found)
    else:
        _cluster(host, k, found)
    return found.clusters(rows)


def _checked_weights(weights: Tensor, values: Tensor) -> Array:
    if weights.shape != values.shape:
        raise InputError(f"weights of shape {tuple(weights.shape)} for values of {tuple(values.shape)}")
    rows = weights.detach().double().cpu()
    rows = rows.reshape(1, -1) if rows.ndim < 2 else rows.flatten(1)
    if not bool(torch.isfinite(rows).all()) or bool((rows < 0).any()):
        raise InputError("weights must be finite and not negative")
    if not bool((rows.amax(1) > 0).all()):
        raise InputError("weights are all zero in a row: nothing to cluster there")
    host: Array = rows.numpy()
    return host


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


def _cluster(rows: Tensor, k: int, found: _Result) -> None:
    number, n = rows.shape
    half = rows.dtype not in (torch.float32, torch.float64)
    left = np.arange(number)
    if half and n >= _TALLY_FROM:
        for row in left:
            _solve_row(*tally(rows[row]), k, found, int(row))
        return
    if not half and n >= _CONDENSE_FROM and k > 1:
        left = np.array([row for row in left if not _solve_condensed(rows[row].numpy(), k, found, int(row))])
    height = max(1, min(_BATCH // n, -(-len(left) // torch.get_num_threads())))

    def solve(block: Array) -> None:
        first, last = int(block[0]), int(block[-1]) + 1
        values = rows[first:last] if last - first == len(block) else rows[torch.from_numpy(block)]
        _solve_sorted(np.sort((values.float() if half else values).numpy(), axis=1), k, found, block)

    # Batches write to rows of their own.
    in_threads(solve, [left[top : top + height] for top in range(0, len(left), height)])


def _cluster_weighted(rows: Array, weights: Array, k: int, found: _Result) -> None:
    for number, (values, mass) in enumerate(zip(rows, weights, strict=True)):
        some = mass > 0
        _solve_row(*merged(values[some], mass[some]), k, found, number)


def _solve_row(points: Array, mass: Array, k: int, found: _Result, number: int) -> None:
    """Cluster ascending, distinct points [m] with mass [m]."""
    rows = np.array([number])
    if len(points) <= k:
        _fill_few(points[None], mass[None], found, rows)
        return
    exponent = np.frexp(np.abs(points).max(keepdims=True))[1][:, None]
    data = Ascending(np.ldexp(points[None], -exponent), mass[None])
    cuts, inertia = best_cuts(data, k)
    found.boundaries[rows] = points[cuts]
    _fill(data, cuts, inertia, exponent, found, rows)


def _solve_condensed(row: Array, k: int, found: _Result, number: int) -> bool:
    """Cluster a long row without sorting it; False where that does not work."""
    short = condensed(row, k)
    if short is None:
        return False
    data = Ascending(short.points[None], short.mass[None])
    cuts, inertia = best_cuts(data, k)
    # What the values that are summed up add.
    moment = short.points @ short.mass
    inertia += short.squares - moment**2 / len(row) - data.inertia
    rows = np.array([number])
    found.boundaries[rows] = short.edges[cuts]
    _fill(data, cuts, inertia, np.zeros((1, 1), dtype=np.int64), found, rows, tight=False)
    found.centers[rows] += short.origin
    return True


def _solve_sorted(values: Array, k: int, found: _Result, rows: Array) -> None:
    """Cluster ascending rows [r, n]."""
    height, n = values.shape
    start = np.zeros((height, 1), dtype=np.int64)
    number = np.arange(height)[:, None]
    starts = [start]
    # Where the first k distinct values of each row start; n where there are not so many.
    for _ in range(k):
        target = np.take_along_axis(values, np.minimum(starts[-1], n - 1), axis=1)
        starts.append(first(values, number, target, np.zeros_like(start), np.full_like(start, n), above=True))
    few = starts[k][:, 0] >= n
    if few.any():
        ends = np.minimum(np.concatenate(starts, axis=1)[few], n)
        points = np.take_along_axis(values[few], np.minimum(ends[:, :-1], n - 1), axis=1).astype(np.float64)
        _fill_few(points, np.diff(ends).astype(np.float64), found, rows[few])
        if few.all():
            return
        values, rows = values[~few], rows[~few]
    exponent = np.zeros((len(rows), 1), dtype=np.int64)
    if values.dtype == np.float64:
        # Scaling by a power of two is exact, and keeps squares from overflowing.
        exponent = np.frexp(np.maximum(np.abs(values[:, :1]), np.abs(values[:, -1:])))[1]
        values = np.ldexp(values, -exponent)
    data = Ascending(values)
    cuts, inertia = best_cuts(data, k)
    cuts, boundaries = before_equal_values(values, cuts)
    found.boundaries[rows] = np.ldexp(boundaries.astype(np.float64), exponent)
    _fill(data, cuts, inertia, exponent, found, rows)


def before_equal_values(values: Array, cuts: Array) -> tuple[Array, Array]:
    """Cuts [r, k - 1] of ascending values [r, n] moved to the first of equal values, and the values behind them.

    Equal values are one cluster's, and only rounding can make a cut between them.
    """
    boundaries = np.take_along_axis(values, cuts, axis=1)
    rows = np.arange(len(values))[:, None]
    return first(values, rows, boundaries, np.zeros_like(cuts), cuts), boundaries


def _fill_few(points: Array, mass: Array, found: _Result, rows: Array) -> None:
    """Rows with at most k distinct values, points [r, up to k] of mass 0 behind the last: a cluster for each."""
    used = mass > 0
    width = points.shape[1]
    found.counts[rows, :width] = mass
    found.centers[rows, :width] = np.where(used, points, np.nan)
    found.boundaries[rows, : width - 1] = np.where(used, points, np.inf)[:, 1:]


def _fill(
    data: Ascending, cuts: Array, inertia: Array, exponent: Array, found: _Result, rows: Array, tight: bool = True
) -> None:
    every = np.arange(len(rows))[:, None]
    centers = data.centers(every, cuts)
    found.counts[rows] = data.per_cluster(data.weight, every, cuts)
    if tight:
        # Differences of prefix sums cancel where the clusters are tight: sum the squares there.
        for row in np.flatnonzero(inertia < 1e-5 * data.inertia):
            label = np.searchsorted(cuts[row], np.arange(data.points.shape[1]), side="right")
            square = (data.points[row] - centers[row, label]) ** 2
            inertia[row] = square.sum() if data.mass is None else square @ data.mass[row]
    found.centers[rows] = np.ldexp(centers + data.mean, exponent)
    found.inertia[rows] = np.ldexp(inertia, 2 * exponent[:, 0])
