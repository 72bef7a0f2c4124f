"""Search, group by group, for the scales and placements of k parts whose sums are the best codebook."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from splitquant_plugins.compiled import compiled
from splitquant_plugins.splitters._pricing import bin_group, frame_group, price, price_values, sorted_sums

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]


@compiled
def _can_pin(rules: Array, either: bool, shape: Array, scale: Array, frame: Array) -> bool:
    above, below = 0.0, 0.0
    for j in range(len(shape)):
        below += rules[shape[j], 0] * scale[j]
        above += rules[shape[j], 1] * scale[j]
    for j in range(len(shape)):
        s = shape[j]
        bottom, top = rules[s, 2] * scale[j], rules[s, 3] * scale[j]
        low = bottom >= 0 or frame[1] <= bottom + above - rules[s, 1] * scale[j]
        high = top <= 0 or frame[2] >= top - below + rules[s, 0] * scale[j]
        if not ((low or high) if either else (low and high)):
            return False
    return True


@compiled
def _pin_cost(rules: Array, either: bool, shape: Array, scale: Array) -> float:
    """What it costs at least that ends are off their levels: the other parts make up for half a step each."""
    total = 0.0
    for j in range(len(shape)):
        total += scale[j]
    error = 0.0
    for j in range(len(shape)):
        slack = 0.5 * (total - scale[j])
        bottom = max(rules[shape[j], 4] * scale[j] - slack, 0.0)
        top = max(rules[shape[j], 5] * scale[j] - slack, 0.0)
        error += min(bottom * bottom, top * top) if either else bottom * bottom + top * top
    return error


@compiled
def summarise(values: Array, bins: int, frame: Array, table: Array, short: Array) -> None:
    """Prepare a group [n], not all zero, for `codebook_cost`: in bins, or value by value where there are none."""
    if bins:
        bin_group(values, frame, table)
    else:
        frame_group(values, frame, short)


@compiled
def codebook_cost(
    codes: Array,
    rules: Array,
    flags: Array,
    shape: Array,
    scale: Array,
    frame: Array,
    table: Array,
    short: Array,
    room: Array,
) -> float:
    """Error of a codebook on a summarised group; infinite where no weight can hold some end of a part's range."""
    if flags[1] and not _can_pin(rules, flags[0], shape, scale, frame):
        return np.inf
    if short.shape[1]:
        error = price_values(codes, shape, scale, short, room)
    else:
        error = price(sorted_sums(codes, shape, scale, room[0], room[1]), frame, table)
    return error + (_pin_cost(rules, flags[0], shape, scale) if flags[1] else 0.0)


@compiled
def fit(rules: Array, shape: Array, scale: Array, frame: Array, first: bool) -> None:
    """Enlarge scales, all in proportion or only the first part's, until the ranges cover the group's; in place."""
    for side in range(2):
        need = (frame[7] if side == 0 else -frame[6]) * (1 + 1e-9)
        have = 0.0
        for j in range(len(shape)):
            have += scale[j] * rules[shape[j], 1 - side]
        if have >= need:
            continue
        if first:
            scale[0] += (need - have) / max(rules[shape[0], 1 - side], 1e-3)
        else:
            grow = need / max(have, 1e-12)
            for j in range(len(shape)):
                scale[j] *= grow


@compiled
def tighten(rules: Array, flags: Array, shape: Array, scale: Array, frame: Array) -> None:
    """Scales in the same ratios that cover the group and no more, times what they sum to before; in place.

    Where a range's ends are clipped (symmetric full), ranges larger than the group's cost less.
    """
    slack = scale.sum()
    if flags[1]:
        scale *= 1e-6 / slack
        fit(rules, shape, scale, frame, False)
        scale *= slack
        return
    above, below = 0.0, 0.0
    for j in range(len(shape)):
        below += rules[shape[j], 0] * scale[j]
        above += rules[shape[j], 1] * scale[j]
    scale *= slack / max(above, below)


@compiled
def _descend(
    codes: Array,
    rules: Array,
    flags: Array,
    shape: Array,
    scale: Array,
    cost: float,
    steps: Array,
    reach: float,
    frame: Array,
    table: Array,
    short: Array,
    room: Array,
    trial: Array,
    other: Array,
) -> float:
    k = len(shape)
    for at in range(len(steps)):
        for _ in range(2):
            before = cost
            for part in range(k):
                for first in range(2 if part > 0 and flags[1] else 1):
                    for sign in range(2):
                        trial[:] = scale
                        trial[part] *= 1 + steps[at] if sign == 0 else 1 - steps[at]
                        if flags[1]:
                            fit(rules, shape, trial, frame, first == 1)
                        new = codebook_cost(codes, rules, flags, shape, trial, frame, table, short, room)
                        if new < cost:
                            cost = new
                            scale[:] = trial
                            break
            if cost == before:
                break
        if reach > 0 and at == len(steps) - 1:
            for part in range(k):
                for s in range(len(codes)):
                    if s == shape[part] or abs(rules[s, 2] - rules[shape[part], 2]) > reach:
                        continue
                    other[:] = shape
                    other[part] = s
                    trial[:] = scale
                    if flags[1]:
                        fit(rules, other, trial, frame, False)
                    new = codebook_cost(codes, rules, flags, other, trial, frame, table, short, room)
                    if new < cost:
                        cost = new
                        scale[:] = trial
                        shape[:] = other
    return cost


@compiled
def rank_starts(
    codes: Array, rules: Array, flags: Array, values: Array, bins: int, shapes: Array, scales: Array, costs: Array
) -> None:
    """Costs [starts, groups] of all starts on sample groups `values` [groups, n], relative to each group's best."""
    frame, table = np.empty(8), np.empty((bins + 1, 2))
    short = np.empty((2, 0 if bins else values.shape[1]), np.float32)
    k = shapes.shape[1]
    room, trial = np.empty((2, codes.shape[1] ** k)), np.empty(k)
    for group in range(len(values)):
        summarise(values[group], bins, frame, table, short)
        for start in range(len(shapes)):
            trial[:] = scales[start]
            tighten(rules, flags, shapes[start], trial, frame)
            costs[start, group] = codebook_cost(codes, rules, flags, shapes[start], trial, frame, table, short, room)


@compiled
def search_groups(
    codes: Array,
    rules: Array,
    flags: Array,
    values: Array,
    bins: int,
    shapes: Array,
    scales: Array,
    keep: int,
    reach: float,
    coarse: Array,
    fine: Array,
    shape_out: Array,
    scale_out: Array,
    cost_out: Array,
    slack_out: Array,
) -> None:
    """The best codebook of every group, and how many times larger its scales are than `tighten` makes them."""
    frame, table = np.empty(8), np.empty((bins + 1, 2))
    short = np.empty((2, 0 if bins else values.shape[1]), np.float32)
    k, starts = shapes.shape[1], len(shapes)
    room, trial, other = np.empty((2, codes.shape[1] ** k)), np.empty(k), np.empty(k, np.int64)
    shape, scale = np.empty(k, np.int64), np.empty(k)
    costs = np.empty(starts)
    keep = min(keep, starts)
    for group in range(len(values)):
        zero = True
        for i in range(values.shape[1]):
            if values[group, i] != 0:
                zero = False
                break
        if zero:
            scale_out[group] = 0.0
            shape_out[group] = 0
            cost_out[group] = 0.0
            slack_out[group] = 1.0
            continue
        summarise(values[group], bins, frame, table, short)
        for start in range(starts):
            trial[:] = scales[start]
            tighten(rules, flags, shapes[start], trial, frame)
            costs[start] = codebook_cost(codes, rules, flags, shapes[start], trial, frame, table, short, room)
        best = np.inf
        for _ in range(keep):
            start = int(np.argmin(costs))
            cost = costs[start]
            costs[start] = np.inf
            shape[:] = shapes[start]
            scale[:] = scales[start]
            tighten(rules, flags, shape, scale, frame)
            cost = _descend(
                codes, rules, flags, shape, scale, cost, coarse, reach, frame, table, short, room, trial, other
            )
            if cost < best or best == np.inf:
                best = cost
                shape_out[group] = shape
                scale_out[group] = scale
        shape[:] = shape_out[group]
        scale[:] = scale_out[group]
        best = _descend(codes, rules, flags, shape, scale, best, fine, 0.0, frame, table, short, room, trial, other)
        shape_out[group] = shape
        trial[:] = scale / scale.sum()
        tighten(rules, flags, shape, trial, frame)
        slack_out[group] = scale[0] / trial[0]
        for j in range(k):
            scale_out[group, j] = scale[j] * frame[0]
        cost_out[group] = best * frame[0] * frame[0]
