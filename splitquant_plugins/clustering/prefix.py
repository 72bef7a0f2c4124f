"""Ascending rows of points with their prefix sums: what the gain of any interval is read off."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]


class Ascending:
    """Rows of ascending points around their mean. A position p stands for the p lowest points of a row.

    points: [rows, m] float64, less their `mean` [rows, 1]. ends: [rows], the points in use; those behind repeat
    the last one, without mass. mass: [rows, m], or None where each point counts once. sums: [rows, m + 1], the
    first moment of the points before each position. inertia: [rows], that of all points in one cluster.
    """

    def __init__(self, points: Array, mass: Array | None = None, ends: Array | None = None) -> None:
        rows, m = points.shape
        self.mass = mass
        self.ends = np.full(rows, m) if ends is None else ends
        self.sums = np.empty((rows, m + 1))
        self.sums[:, 0] = 0
        self.weights: Array | None = None
        if mass is None:
            self.mean = points.mean(axis=1, keepdims=True, dtype=np.float64)
            self.points = np.subtract(points, self.mean, dtype=np.float64)
            np.cumsum(self.points, axis=1, out=self.sums[:, 1:])
            self.inertia = np.einsum("ij,ij->i", self.points, self.points)
        else:
            self.weights = np.zeros((rows, m + 1))
            np.cumsum(mass, axis=1, out=self.weights[:, 1:])
            self.mean = np.einsum("ij,ij->i", mass, points)[:, None] / self.weights[:, -1:]
            self.points = points - self.mean
            moment = mass * self.points
            np.cumsum(moment, axis=1, out=self.sums[:, 1:])
            self.inertia = np.einsum("ij,ij->i", moment, self.points)

    def point(self, rows: Array, positions: Array) -> Array:
        """Points number `positions`; `rows` broadcasts against them."""
        return np.take(self.points, rows * self.points.shape[1] + positions)

    def weight(self, rows: Array, positions: Array) -> Array:
        """Mass before the positions."""
        if self.weights is None:
            return positions.astype(np.float64)
        return np.take(self.weights, rows * self.weights.shape[1] + positions)

    def sum(self, rows: Array, positions: Array) -> Array:
        """First moment before the positions."""
        return np.take(self.sums, rows * self.sums.shape[1] + positions)

    def centers(self, rows: Array, cuts: Array) -> Array:
        """Centres [..., k] of the clusters between cuts [..., k - 1]; NaN for an empty one."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return self.per_cluster(self.sum, rows, cuts) / self.per_cluster(self.weight, rows, cuts)

    def per_cluster(self, prefix: Any, rows: Array, cuts: Array) -> Array:
        """Sums [..., k] between cuts [..., k - 1] of what `prefix` (`weight` or `sum`) adds up."""
        rows = np.broadcast_to(rows, (*cuts.shape[:-1], 1))
        ends = self.ends[rows]
        between = np.concatenate([np.zeros_like(ends), cuts, ends], axis=-1)
        found: Array = np.diff(prefix(rows, between), axis=-1)
        return found


def first(points: Array, rows: Array, targets: Array, low: Array, high: Array, *, above: bool = False) -> Array:
    """Least position in low..high whose point is >= the target (`above`: > it); `high` if there is none.

    points: [rows, m], ascending; the other arrays broadcast.
    """
    low, high = np.broadcast_arrays(low, high)
    base = rows * points.shape[1]
    flat = points.reshape(-1)
    for _ in range(int(np.max(high - low, initial=0)).bit_length()):
        middle = (low + high) >> 1
        value = flat.take(base + middle, mode="clip")
        left = (value <= targets) if above else (value < targets)
        left &= low < high
        low = np.where(left, middle + 1, low)
        high = np.where(left, high, middle)
    return low
