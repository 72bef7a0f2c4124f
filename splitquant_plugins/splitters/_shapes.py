"""The level sets that one part can have on a grid.

A backend derives a part's scale and zero point from the part's own minimum and maximum. Seen from the other
side: a part that holds the values `low * scale` and `high * scale` is rounded to the levels `code * scale`.
A `Shape` is such a choice of ends, in units of the scale; which shapes a grid has is found out by asking it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from splitquant_plugins.grid import Grid

MARGIN = 1e-3  # how far from a rounding threshold a value has to stay, in units of the scale


@dataclass(frozen=True)
class Shape:
    """One way to place a part's range on the grid; every number is in units of the scale.

    `codes`: the levels in use, ascending, one step apart. `low`, `high`: the range; all values of the part lie
    in it. `pins`: (value, level) pairs that must each occur in the part so that the backend derives this
    scale and zero point; `level` is what the backend rounds the value to. `either`: one of the pins will do.
    `power_of_two`: the grid has scales that are powers of two only.
    """

    codes: tuple[float, ...]
    low: float
    high: float
    pins: tuple[tuple[float, float], ...]
    either: bool = False
    power_of_two: bool = False

    def interval(self) -> tuple[float, float]:
        """Smallest and largest value that any weight may have in the part, pins apart."""
        return max(self.low, self.codes[0] - 0.5 + MARGIN), min(self.high, self.codes[-1] + 0.5 - MARGIN)


def shapes(grid: Grid) -> list[Shape]:
    """Every useful shape of `grid`: one per integer zero point, and one half-way between each two.

    Half-way shapes give up a code at one end for a range that is half a step wider at the other.
    """
    qmin, qmax = grid.quant_min, grid.quant_max
    steps = qmax - qmin
    rounded = power_of_two_scales(grid)
    if grid.scheme == "symmetric":
        return [_shape(grid, -steps / 2, steps / 2)] if rounded else [_shape(grid, -1.0, 1.0)]
    places = torch.arange(0, steps + 1).double()
    if steps > 3:  # with many codes neighbouring zero points hardly differ
        places = torch.linspace(0, steps, 9).round().double()
    found = [_shape(grid, -float(t), steps - float(t)) for t in places]
    if steps <= 3 and not rounded:  # ends that are no levels may make a range that is rounded up to the next power
        found += [_shape(grid, -(t + 0.49), steps - t - 0.49) for t in range(steps)]
    return found


def power_of_two_scales(grid: Grid) -> bool:
    """Whether a grid has scales that are powers of two only; grids of plugins need not say."""
    return bool(getattr(grid, "power_of_two_scale", False))


def _shape(grid: Grid, low: float, high: float) -> Shape:
    ends = torch.tensor([[low, high]], dtype=torch.float64)
    scale, zero_point = grid.qparams(ends)
    qmin, qmax = grid.quant_min, grid.quant_max
    levels = torch.arange(qmin, qmax + 1) - zero_point.double().cpu()
    low, high = (float(end / scale) for end in (low, high))
    inside = levels[(levels >= low - 1e-6) & (levels <= high + 1e-6)]
    bottom, top = float(levels.min()), float(levels.max())

    def level(value: float) -> float:
        # ties are only met at the clipped end of a symmetric range, where both codes are the last one
        return min(max(float(round(value)), bottom), top)

    rounded, symmetric = power_of_two_scales(grid), grid.scheme == "symmetric"
    ends_held = _least_ends(low, high, symmetric=symmetric) if rounded else (high, low)
    pins = tuple((end, level(end)) for end in ends_held if end != 0)
    return Shape(tuple(inside.tolist()), low, high, pins, either=symmetric, power_of_two=rounded)


def _least_ends(low: float, high: float, *, symmetric: bool) -> tuple[float, float]:
    """What has to occur for a scale that is rounded up to a power of two: whole steps over more than half the range."""
    if symmetric:
        least = math.floor(high / 2) + 1.0
        return least, -least
    return max(0.0, math.floor((high - low) / 2) + 1 + low), low
