"""Scales of a codebook on grids that keep few significant bits of them, searched around the best scales of any size."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from splitquant_plugins.compiled import compiled
from splitquant_plugins.splitters._power_of_two import covers
from splitquant_plugins.splitters._search import codebook_cost, summarise

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from splitquant_plugins.grid import Grid

    Array = NDArray[Any]

_ROUNDS = 2


def scale_bits(grid: Grid, tensor: Tensor) -> int:
    """How many significant bits the grid keeps of the scales of a tensor's parts, rounding up; 0: all of them.

    Grids say so with a method `scale_significant_bits(tensor)`, and need not have one.
    """
    ask = getattr(grid, "scale_significant_bits", None)
    return 0 if ask is None else int(ask(tensor))


@compiled
def _rounded_up(scale: float, bits: int) -> float:
    mantissa, exponent = math.frexp(scale)
    return math.ldexp(math.ceil(math.ldexp(mantissa, bits) - 1e-9), exponent - bits)


@compiled
def _neighbour(scale: float, bits: int, up: bool) -> float:
    """The next scale above or below one that has that many significant bits."""
    mantissa, exponent = math.frexp(scale)
    step = 1.0 if up else (-0.5 if mantissa == 0.5 else -1.0)
    return math.ldexp(math.ldexp(mantissa, bits) + step, exponent - bits)


@compiled
def scales_of_few_bits(
    codes: Array,
    rules: Array,
    flags: Array,
    values: Array,
    bins: int,
    bits: int,
    shape: Array,
    scale: Array,
    cost: Array,
) -> None:
    """Replace the scales of codebooks [groups, k] by good ones of so many bits that cover the groups; in place.

    From the scales rounded up, each goes up or down while that lowers the cost, the finest part's first. Scales and
    costs are in the weights' unit.
    """
    frame, table = np.empty(8), np.empty((bins + 1, 2))
    short = np.empty((2, 0 if bins else values.shape[1]), np.float32)
    k = shape.shape[1]
    room = np.empty((2, codes.shape[1] ** k))
    exact, trial = np.empty(k), np.empty(k)
    for group in range(len(values)):
        if scale[group, 0] == 0:
            continue
        summarise(values[group], bins, frame, table, short)
        for j in range(k):
            exact[j] = _rounded_up(scale[group, j], bits)
        trial[:] = exact / frame[0]
        least = codebook_cost(codes, rules, flags, shape[group], trial, frame, table, short, room)
        for _ in range(_ROUNDS):
            before = least
            for part in range(k - 1, -1, -1):
                for side in range(2):
                    moved = False
                    while True:
                        trial[:] = exact / frame[0]
                        near = _neighbour(exact[part], bits, side == 0)
                        trial[part] = near / frame[0]
                        if not covers(rules, shape[group], trial, frame):
                            break
                        new = codebook_cost(codes, rules, flags, shape[group], trial, frame, table, short, room)
                        if not new < least:
                            break
                        least, moved = new, True
                        exact[part] = near
                    if moved:
                        break
            if least == before:
                break
        scale[group] = exact
        cost[group] = least * frame[0] * frame[0]
