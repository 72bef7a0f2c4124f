"""The compiled search for the ranges of residual stages, on grids whose scale and zero point follow from the ends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from splitquant_plugins.compiled import compiled

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from splitquant_plugins.grid import Grid

    Array = NDArray[Any]


@dataclass(frozen=True)
class MinMaxRule:
    """How a grid's scale follows from the ends of a range that includes 0.

    Affine: the range over the steps between the lowest and highest code, with an integer zero point. Symmetric:
    the largest magnitude times `unit`.
    """

    lowest: int
    highest: int
    symmetric: bool
    unit: float

    def array(self) -> Array:
        """The fields as float64, for the compiled loops."""
        return np.array([self.lowest, self.highest, self.symmetric, self.unit], np.float64)


def rule_of(grid: Grid) -> MinMaxRule | None:
    """The rule of a grid, found out by asking it; None where its scales are no such function of the ends."""
    probe = torch.tensor(
        [[-1.0, 1.0], [-0.3, 1.7], [-2.1, 0.4], [0.2, 0.9], [-0.8, -0.1], [-37.0, 12.0], [-1e-3, 4e-3]],
        dtype=torch.float64,
    )
    scale, zero_point = (each.double() for each in grid.qparams(probe))
    lowest, highest = grid.quant_min, grid.quant_max
    low, high = probe[:, :1].clamp(max=0), probe[:, 1:].clamp(min=0)
    if grid.scheme == "symmetric":
        wanted, zeros = torch.maximum(-low, high) * scale[0], torch.zeros_like(zero_point)
    else:
        wanted = (high - low) / (highest - lowest)
        zeros = (lowest - torch.round(low / wanted)).clamp(lowest, highest)
    if not (torch.allclose(scale, wanted, rtol=1e-6, atol=0) and torch.equal(zero_point, zeros)):
        return None
    return MinMaxRule(lowest, highest, grid.scheme == "symmetric", float(scale[0]))


def even_fraction(rule: MinMaxRule, parts: int) -> float:
    """The range of the first of `parts` stages, as a fraction of all, with which all codes together are even steps.

    Then the sums are those of one grid with as many codes as the parts have combinations.
    """
    if rule.symmetric:
        top = 1 / rule.unit
        codes = 2 * min(int(top), rule.highest) + 1
        return float(2 * top * codes ** (parts - 1) / (codes**parts - 1))
    codes = rule.highest - rule.lowest + 1
    return float((codes - 1) * codes ** (parts - 1) / (codes**parts - 1))


@compiled
def _round_stage(left: Array, low: float, high: float, rule: Array, kept: bool, out: Array) -> None:
    """What the grid makes of `left`, clipped to a range; with `kept`, of values that do not leave the range."""
    lowest, highest = rule[0], rule[1]
    bottom, top = min(low, 0.0), max(high, 0.0)
    scale = max(-bottom, top) * rule[3] if rule[2] else (top - bottom) / (highest - lowest)
    if not scale > 0:
        scale = 1.0
    zero_point = 0.0 if rule[2] else min(max(lowest - np.rint(bottom / scale), lowest), highest)
    for i in range(len(left)):
        code = np.rint(min(max(left[i], low), high) / scale) + zero_point
        value = (min(max(code, lowest), highest) - zero_point) * scale
        if kept:
            value += (scale if value < low else 0.0) - (scale if value > high else 0.0)
        out[i] = value


@compiled
def _residual_cost(
    values: Array, counts: Array, fractions: Array, kept: bool, rule: Array, left: Array, part: Array, rounded: Array
) -> float:
    """Squared error after all stages; the last stage spans all that is left."""
    left[:] = values
    error = 0.0
    stages = len(fractions)
    total = rounded[1]
    total[:] = 0.0
    for stage in range(stages):
        first, last = int(np.argmin(left)), int(np.argmax(left))
        low, high = left[first] * fractions[stage], left[last] * fractions[stage]
        _round_stage(left, low, high, rule, kept, part)
        if kept:
            part[first] = low
            part[last] = high
        ends = part.min(), part.max()
        _round_stage(part, ends[0], ends[1], rule, False, rounded[0])
        for i in range(len(values)):
            total[i] += rounded[0, i]
            left[i] -= part[i]
    _round_stage(left, left.min(), left.max(), rule, False, rounded[0])
    for i in range(len(values)):
        off = values[i] - total[i] - rounded[0, i]
        error += counts[i] * off * off
    return error


@compiled
def search_ranges(
    groups: Array,
    rule: Array,
    candidates: Array,
    starts: Array,
    sweeps: int,
    try_kept: bool,
    most: int,
    fraction_out: Array,
    kept_out: Array,
    error_out: Array,
) -> None:
    """The best fraction of every stage [groups, k - 1], whether ranges are kept [groups], and the error [groups].

    `candidates` [k - 1, f] are tried one stage at a time, from each of `starts` [s, k - 1], on at most about `most`
    values of a group, its extremes among them.
    """
    n, stages = groups.shape[1], candidates.shape[0]
    stride = max(1, -(-n // most))
    m = -(-n // stride) + (2 if stride > 1 else 0)
    values, counts = np.empty(m), np.ones(m)
    left, part, rounded = np.empty(m), np.empty(m), np.empty((2, m))
    now, trial = np.empty(stages), np.empty(stages)
    for group in range(len(groups)):
        row = groups[group]
        low, high = np.float64(row.min()), np.float64(row.max())
        peak = max(-low, high)
        error_out[group], kept_out[group], fraction_out[group] = np.inf, False, 1.0
        if not peak > 0:
            error_out[group] = 0.0
            continue
        inner = -(-n // stride)
        for i in range(inner):
            values[i] = np.float64(row[i * stride]) / peak
            counts[i] = n / inner
        if stride > 1:
            values[m - 2], values[m - 1] = low / peak, high / peak
            counts[m - 2] = counts[m - 1] = 1.0
        for kept in range(2 if try_kept else 1):
            for start in range(len(starts)):
                now[:] = starts[start]
                error = _residual_cost(values, counts, now, kept == 1, rule, left, part, rounded)
                for _ in range(sweeps):
                    before = error
                    for stage in range(stages):
                        trial[:] = now
                        for c in range(candidates.shape[1]):
                            trial[stage] = candidates[stage, c]
                            new = _residual_cost(values, counts, trial, kept == 1, rule, left, part, rounded)
                            if new < error:
                                error = new
                                now[stage] = trial[stage]
                    if error == before:
                        break
                if error < error_out[group]:
                    error_out[group] = error
                    kept_out[group] = kept == 1
                    fraction_out[group] = now
        error_out[group] *= peak * peak
