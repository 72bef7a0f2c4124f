"""The level sets that one part can have on a grid.

A backend derives a part's scale and zero point from the part's own minimum and maximum. Seen from the other
side: a part that holds the values `low * scale` and `high * scale` is rounded to the levels `code * scale`.
A `Shape` is such a choice of ends, in units of the scale; which shapes a grid has is found out by asking it.
"""

from __future__ import annotations

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
    """

    codes: tuple[float, ...]
    low: float
    high: float
    pins: tuple[tuple[float, float], ...]
    either: bool = False

    def interval(self) -> tuple[float, float]:
        """Smallest and largest value that any weight may have in the part, pins apart."""
        return max(self.low, self.codes[0] - 0.5 + MARGIN), min(self.high, self.codes[-1] + 0.5 - MARGIN)


def shapes(grid: Grid) -> list[Shape]:
    """Every useful shape of `grid`: one per integer zero point, and one half-way between each two.

    Half-way shapes give up a code at one end for a range that is half a step wider at the other.
    """
    qmin, qmax = grid.quant_min, grid.quant_max
    steps = qmax - qmin
    if grid.scheme == "symmetric":
        return [_shape(grid, -1.0, 1.0)]
    places = torch.arange(0, steps + 1).double()
    if steps > 3:  # with many codes neighbouring zero points hardly differ
        places = torch.linspace(0, steps, 9).round().double()
    found = [_shape(grid, -float(t), steps - float(t)) for t in places]
    if steps <= 3:
        found += [_shape(grid, -(t + 0.49), steps - t - 0.49) for t in range(steps)]
    return found


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

    pins = tuple((end, level(end)) for end in (high, low) if end != 0)
    return Shape(tuple(inside.tolist()), low, high, pins, either=grid.scheme == "symmetric")
