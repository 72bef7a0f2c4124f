"""Scales of a codebook on grids that have powers of two only, searched around the best scales of any size."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from splitquant_plugins.compiled import compiled
from splitquant_plugins.splitters._search import codebook_cost, summarise

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

# The first part's exponent is tried from this much below the one that covers the group alone to `_ABOVE` above it.
_BELOW, _ABOVE = 2, 1
# Every other part's is tried from its predecessor's down to so many bits more than its codes have below it.
_DEEPER = 2


@compiled
def covers(rules: Array, shape: Array, scale: Array, frame: Array) -> bool:
    """Whether the ranges of the parts together cover a binned group."""
    above, below = 0.0, 0.0
    for j in range(len(shape)):
        below += rules[shape[j], 0] * scale[j]
        above += rules[shape[j], 1] * scale[j]
    return bool(above >= frame[7] and below >= -frame[6])


@compiled
def round_scales(
    codes: Array,
    rules: Array,
    flags: Array,
    values: Array,
    bins: int,
    shape: Array,
    scale: Array,
    cost: Array,
) -> None:
    """Replace the scales of codebooks [groups, k] by the best powers of two that cover the groups; in place.

    The best scales of any size say little about the best powers of two, which often lie further apart: all ladders of
    exponents are priced, and then other placements of one part at a time. Scales and costs are in the weights' unit.
    """
    frame, table = np.empty(8), np.empty((bins + 1, 2))
    short = np.empty((2, 0 if bins else values.shape[1]), np.float32)
    k = shape.shape[1]
    room = np.empty((2, codes.shape[1] ** k))
    trial, best, other = np.empty(k), np.empty(k), np.empty(k, np.int64)
    deep = int(np.ceil(np.log2(codes.shape[1]))) + _DEEPER + 1
    for group in range(len(values)):
        if scale[group, 0] == 0:
            continue
        summarise(values[group], bins, frame, table, short)
        peak = frame[0]
        need = 0.0
        first = rules[shape[group, 0]]
        for side in range(2):
            reach = max(first[1 - side], 1e-3)
            need = max(need, (frame[7] if side == 0 else -frame[6]) / reach)
        top = int(np.ceil(np.log2(min(need, 4.0) * peak)))
        least = np.inf
        best[:] = 2.0**top / peak
        for combination in range((_BELOW + _ABOVE + 1) * deep ** (k - 1)):
            exponent = top - _BELOW + combination % (_BELOW + _ABOVE + 1)
            rest = combination // (_BELOW + _ABOVE + 1)
            trial[0] = 2.0**exponent / peak
            for j in range(1, k):
                exponent -= rest % deep
                rest //= deep
                trial[j] = 2.0**exponent / peak
            if covers(rules, shape[group], trial, frame):
                new = codebook_cost(codes, rules, flags, shape[group], trial, frame, table, short, room)
                if new < least:
                    least = new
                    best[:] = trial
        for part in range(k):
            for s in range(len(codes)):
                other[:] = shape[group]
                other[part] = s
                for step in range(-1, 2):
                    trial[:] = best
                    trial[part] *= 2.0**step
                    if not covers(rules, other, trial, frame):
                        continue
                    new = codebook_cost(codes, rules, flags, other, trial, frame, table, short, room)
                    if new < least:
                        least = new
                        best[:] = trial
                        shape[group] = other
        for j in range(k):
            scale[group, j] = 2.0 ** np.round(np.log2(best[j] * peak))
        cost[group] = least * peak * peak
