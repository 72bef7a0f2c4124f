"""One-dimensional k-means: optimal, deterministic, one call for all rows of a tensor.

In one dimension clusters are intervals, so k-means is a search for k - 1 boundaries that maximises
sum_c S_c² / W_c (S the sum, W the weight of a cluster), and both come from prefix sums. Two ways lead to
those prefix sums: short rows are sorted; long rows are counted in fine, even bins, and the exact sums at
the boundaries are taken from the values afterwards. The search is the same for both: a dynamic program
(Wang and Song, "Ckmeans.1d.dp", R Journal 2011) over a sketch of the prefix sums, then a dynamic program
over the positions near each boundary until nothing moves.
"""

from __future__ import annotations

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
_SORT_BELOW = 1024
# Values that one step works on: few enough to stay in the cache, enough to keep the threads busy.
_CHUNK = 1 << 17
# Positions in the sketch, coarse first; a row goes on to the next size where the sketch explains it badly.
_SKETCHES = (40, 256, 768)
# Part of the inertia that may hide between neighbouring positions of a sketch.
_HIDDEN = 0.04
# Steps of a boundary in one round of the local search.
_STEPS = (1, 2, 3, 4, 6, 9, 14, 22, 35, 60)


@dataclass(frozen=True)
class Clusters:
    """The clusters of each row: value v belongs to cluster number sum(v >= boundaries).

    boundaries: [rows, k - 1], ascending, in the values' dtype and on their device.
    centers, inertia, counts: [rows, k], [rows] and [rows, k], float64 and int64.
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
    Rows of up to 768 distinct values reach the optimum; longer ones come within a relative 1e-6 of a local
    optimum that starts from the best one of the sketch.
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
    bounds = boundaries.reshape(-1, boundaries.shape[-1])
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
        self.counts = np.zeros((rows, k), dtype=np.int64)

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
    if half and n > 1 << 16:
        for row in range(number):
            distinct, counts = _count_distinct(rows[row])
            _solve_sorted(distinct[None], counts[None], k, found, np.array([row]))
        return
    everything = np.arange(number)
    spread = high - low
    # Beyond these magnitudes the bin of a value would overflow or underflow; sorting does not mind.
    countable = (spread > 1e-30) & (spread < 1e30) & (n >= _SORT_BELOW) & (k > 1)
    left = everything[~countable]
    if countable.any():
        badly = _cluster_counted(rows, everything[countable], k, low, spread, found)
        left = np.concatenate([left, badly])
    for block in np.array_split(left, max(1, len(left) * n // _CHUNK)):
        if len(block):
            values = rows[torch.from_numpy(block)]
            _solve_sorted(np.sort((values.float() if half else values).numpy(), axis=1), None, k, found, block)


def _cluster_weighted(rows: Tensor, weights: Tensor, k: int, found: _Result) -> None:
    for block in np.array_split(np.arange(rows.shape[0]), max(1, rows.numel() // _CHUNK)):
        if not len(block):
            continue
        weight = weights[torch.from_numpy(block)].numpy()
        values = rows[torch.from_numpy(block)].double().numpy()
        # A value without weight counts for nothing: put it onto one that has weight.
        heaviest = np.take_along_axis(values, weight.argmax(1)[:, None], axis=1)
        values = np.where(weight > 0, values, heaviest)
        order = np.argsort(values, axis=1, kind="stable")
        _solve_sorted(
            np.take_along_axis(values, order, axis=1),
            np.take_along_axis(weight, order, axis=1),
            k,
            found,
            block,
        )


def _count_distinct(row: Tensor) -> tuple[Array, Array]:
    """Distinct values of a 16-bit float tensor in ascending order, and how often each occurs."""
    counts = torch.zeros(1 << 16, dtype=torch.int64)
    codes = row.contiguous().view(torch.int16)
    for chunk in codes.split(_CHUNK):
        counts += torch.bincount(chunk.to(torch.int32).add_(1 << 15), minlength=1 << 16)
    present = counts.nonzero().flatten()
    values = (present - (1 << 15)).to(torch.int16).view(row.dtype).float().numpy()
    order = np.argsort(values, kind="stable")
    return values[order], counts[present].numpy().astype(np.float64)[order]


def _solve_sorted(values: Array, weights: Array | None, k: int, found: _Result, rows: Array) -> None:
    """Cluster ascending rows [r, n] exactly; `weights` where values do not count once each."""
    exponent = np.frexp(np.maximum(np.abs(values[:, :1]), np.abs(values[:, -1:])).astype(np.float64))[1]
    scaled = np.ldexp(values.astype(np.float64), -exponent)
    weight = np.ones_like(scaled) if weights is None else weights
    members = weight if weights is None or found.counts.dtype != np.int64 else weight
    # Distinct values only, so that no boundary can fall among equal ones.
    first = np.ones(values.shape, dtype=bool)
    np.not_equal(values[:, 1:], values[:, :-1], out=first[:, 1:])
    position = np.cumsum(first, axis=1) - 1
    distinct = position[:, -1] + 1
    width = int(distinct.max())
    shape = (len(rows), width)
    index = position + np.arange(len(rows))[:, None] * width
    mass = np.bincount(index.ravel(), members.ravel(), minlength=len(rows) * width).reshape(shape)
    points = np.broadcast_to(scaled[:, -1:], shape).copy()
    points.ravel()[index[first]] = scaled[first]
    edges = np.full((len(rows), width + 1), np.inf)
    edges.ravel()[(index + np.arange(len(rows))[:, None])[first]] = values[first]
    total = mass.sum(1, keepdims=True)
    middle = (mass * points).sum(1, keepdims=True) / total
    points -= middle
    sums = _Prefix(mass / total, points)
    cuts = _search(sums, k)
    cuts.sort(axis=1)
    # Empty clusters go last.
    again = np.zeros(cuts.shape, dtype=bool)
    again[:, 1:] = cuts[:, 1:] == cuts[:, :-1]
    cuts[again | (cuts == 0)] = width
    cuts.sort(axis=1)
    found.boundaries[rows] = np.take_along_axis(edges, cuts, axis=1)
    ends = np.concatenate([np.zeros_like(cuts[:, :1]), cuts, np.full_like(cuts[:, :1], width)], axis=1) \
        if k > 1 else np.tile(np.array([[0, width]]), (len(rows), 1))
    cluster_mass = np.diff(np.take_along_axis(sums.weight, ends, axis=1))
    with np.errstate(invalid="ignore"):
        centers = np.diff(np.take_along_axis(sums.sum, ends, axis=1)) / cluster_mass
    label = (np.arange(width)[None, :, None] >= cuts[:, None, :]).sum(2) if k > 1 else np.zeros(shape, int)
    offset = points - np.take_along_axis(centers, label, axis=1)
    found.inertia[rows] = np.ldexp((mass * offset * offset).sum(1), 2 * exponent[:, 0])
    found.centers[rows] = np.ldexp(centers + middle, exponent)
    ones = _count_members(position, k, cuts) if weights is None else None
    del ones
