"""Clusters of least inertia for the rows of a tensor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from splitquant_plugins.clustering import kernels
from splitquant_plugins.errors import InputError
from splitquant_plugins.parallel import chunks, in_threads, iter_in_threads

Array = NDArray[Any]

# What the kernels take.
_COMPILED = (torch.float32, torch.float64)
# Rows from this length on are worked on in pieces, several at a time.
_LONG = 1 << 18
_PIECE = 1 << 21
# Values of a piece that are converted at once, where the kernels do not take their type.
_CHUNK = 1 << 16
_BINS = 1 << 16
_VALUES_PER_BIN = 4
# Of a row's sum: sums in float64 keep a few digits of it.
_LEAST_WEIGHT = 1e-12
# Values in one batch of shorter rows.
_BATCH = 1 << 18


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
    inertia of one cluster remains.
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
    found = _Answers(len(host), k)
    if weights is not None:
        mass = _checked_weights(weights, values)
        for number, row in enumerate(host.double().numpy()):
            _extent(row[None])
            _solve_weighted(row, mass[number], found, number)
    elif host.shape[1] >= _LONG:
        for number, row in enumerate(host):
            _solve_long(row, found, number)
    else:
        n = host.shape[1]
        height = max(1, min(_BATCH // n, -(-len(host) // torch.get_num_threads())))
        bins = 1 << max(4, (n // _VALUES_PER_BIN).bit_length())

        def solve(some: slice) -> None:
            # Batches write to rows of their own.
            answers = (found.boundaries[some], found.centers[some], found.counts[some], found.inertia[some])
            values = _compilable(host[some])
            frames = _frames(*_extent(values), values[:, n // 2], bins)
            kernels.cluster_rows(values, frames, bins, *answers)

        in_threads(solve, list(chunks(slice(0, len(host)), height)))
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
    if bool(((rows > 0) & (rows < _LEAST_WEIGHT * rows.sum(1, keepdim=True))).any()):
        raise InputError(
            f"weights below {_LEAST_WEIGHT:g} of their row's sum are lost in it: set them to 0, or raise them"
        )
    host: Array = rows.numpy()
    return host


def _compilable(values: Tensor) -> Array:
    """The values as an array of float32 or float64, which hold those of all other float types exactly."""
    known = values.dtype in _COMPILED
    array: Array = (values if known else values.float()).contiguous().numpy()
    return array


def _compilable_chunks(row: Tensor, piece: slice) -> Iterator[Array]:
    """The values of a piece of a row [n], a few at a time, because those of 16 bits take twice the memory.

    What was yielded before may be overwritten. The chunks, and so the rounded sums over them, are those of any type.
    """
    known = row.dtype in _COMPILED
    buffer = torch.empty(0 if known else _CHUNK)
    for chunk in chunks(piece, _CHUNK):
        values = row[chunk]
        yield _compilable(values if known else buffer[: len(values)].copy_(values))


def _frames(low: Array, high: Array, typical: Array, bins: int) -> Array:
    """The coordinates of the kernels [r, 3]: low..high [r] fill at least half of `bins`, around a typical value."""
    half = high / 2 - low / 2
    exponent = np.frexp(np.where(half > 0, half, high))[1] + 1
    scale = np.ldexp(float(bins), np.minimum(-exponent, 980))
    origin = typical * scale
    return np.stack([scale, origin, low * scale - origin], axis=1)


def _extent(values: Array) -> tuple[Array, Array]:
    """The least and the greatest value of each row, float64."""
    low, high = values.min(axis=1).astype(np.float64), values.max(axis=1).astype(np.float64)
    # Of values with a NaN, both are NaN.
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise InputError("values are not all finite: NaN and infinity have no cluster")
    return low, high


class _Answers:
    """The answers, filled in row by row; boundaries as float64, which holds every float dtype exactly."""

    def __init__(self, rows: int, k: int) -> None:
        self.boundaries = np.full((rows, k - 1), np.inf)
        self.centers = np.full((rows, k), np.nan)
        self.counts = np.zeros((rows, k))
        self.inertia = np.zeros(rows)

    def clusters(self, like: Tensor) -> Clusters:
        device = like.device
        return Clusters(
            torch.from_numpy(self.boundaries).to(like.dtype).to(device),
            torch.from_numpy(self.centers).to(device),
            torch.from_numpy(self.inertia).to(device),
            torch.from_numpy(self.counts).to(device),
            torch.from_numpy((self.counts > 0).sum(1)).to(device),
        )


def _solve_long(row: Tensor, found: _Answers, number: int) -> None:
    """Cluster one row [n] as `kernels.cluster_rows` does, but several pieces at a time."""
    # The pieces do not depend on the number of threads, and so neither do the rounded sums.
    pieces = list(chunks(slice(0, len(row)), _PIECE))
    extents = in_threads(lambda piece: [_extent(values[None]) for values in _compilable_chunks(row, piece)], pieces)
    low = min(low for extent in extents for low, _ in extent)
    high = max(high for extent in extents for _, high in extent)
    frame = _frames(low, high, row[len(row) // 2, None].double().numpy(), _BINS)[0]
    boundaries, centers, counts = found.boundaries[number], found.centers[number], found.counts[number]

    kind = np.float64 if row.dtype == torch.float64 else np.float32

    def tally(piece: slice) -> Array:
        table = np.zeros((_BINS + 1, 2))
        for values in _compilable_chunks(row, piece):
            kernels.tally(values, frame, table)
        return table

    def gather(piece: slice) -> tuple[Array, float]:
        # Pages that nothing is written to take no memory.
        found, m, squares = np.empty(piece.stop - piece.start + 1, kind), 0, 0.0
        for values in _compilable_chunks(row, piece):
            more, some = kernels.gather(values, frame, mean, wanted, found[m:])
            m += more
            squares += some
        return found[:m].copy(), squares

    def distances(piece: slice) -> float:
        return sum(
            float(kernels.distances(values, scale, boundaries, centers)) for values in _compilable_chunks(row, piece)
        )

    scale = float(frame[0])
    table = np.zeros((_BINS + 1, 2))
    for one in iter_in_threads(tally, pieces):
        table += one
    bins, mean = kernels.filled_bins(table, frame)
    wanted = np.empty(_BINS + 1, np.uint8)
    places = kernels.possible_bins(len(centers), bins, wanted)
    gathered = in_threads(gather, pieces)
    values = np.sort(np.concatenate([part for part, _ in gathered]))
    squares = sum(part for _, part in gathered)
    inertia = squares - kernels.solve_chosen(values, frame, mean, bins, *places, (boundaries, centers, counts))
    if inertia <= kernels.TIGHT * squares:
        inertia = sum(in_threads(distances, pieces))
    found.inertia[number] = float(inertia) / scale / scale


def _solve_weighted(values: Array, mass: Array, found: _Answers, number: int) -> None:
    """Cluster values [n] of mass [n]: the distinct ones are the items."""
    some = mass > 0
    members, place = np.unique(values[some], return_inverse=True)
    weight = np.bincount(place, mass[some])
    m, cuts = len(members), found.boundaries.shape[1]
    frame = _frames(members[:1], members[-1:], members[m // 2, None], _BINS)[0]
    scale = float(frame[0])
    points = members * scale - frame[1]
    mean = weight @ points / weight.sum()
    points -= mean
    prefixes = np.zeros((m + 1, 2))
    np.cumsum(np.stack([weight, weight * points], axis=1), axis=0, out=prefixes[1:])
    low, high = np.zeros(cuts, np.int64), np.full(cuts, m)
    boundaries, centers, counts = found.boundaries[number], found.centers[number], found.counts[number]
    items = prefixes, np.stack([points, points], axis=1), members
    kernels.solve(items, frame, mean, low, high, (boundaries, centers, counts))
    distance = (members - centers[np.searchsorted(boundaries, members, side="right")]) * scale
    found.inertia[number] = float(weight @ distance**2) / scale / scale
