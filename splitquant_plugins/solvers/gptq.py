"""Codes for given levels: GPTQ's error feedback and coordinate descent, over any levels, in compiled loops.

Weights are [rows, d], and rows are independent of each other. `moment` is the second moment H [d, d] of the layer's
inputs (GPTQ calls it the Hessian), positive definite. Everything is float64, and the same for any number of threads.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from splitquant_plugins.compiled import compiled
from splitquant_plugins.parallel import CHUNK, in_threads
from splitquant_plugins.solvers.sums import nearest_level

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    Array = NDArray[Any]

# Columns whose errors are fed back one by one; those of a block before come in one matrix product.
_BLOCK = 128
# Rows that a thread takes at least.
_ROWS = 8


@dataclass(frozen=True)
class Levels:
    """The values that weights may be rounded to; a place is the number of a value among them.

    `table` [tables, L]: ascending levels; or, of `even` levels that are evenly spaced, [tables, 2]: the lowest and the
    step. `table_of` [rows, d], int32: whose levels a weight has. `low`, `high` [tables, L], where given: the least
    and the greatest weight that a level can stand for; others are not taken.
    """

    table: Tensor
    table_of: Tensor
    even: int = 0
    low: Tensor | None = None
    high: Tensor | None = None

    def columns(self, index: Tensor) -> Levels:
        """The levels of some columns."""
        return replace(self, table_of=self.table_of[:, index].contiguous())

    def values(self, places: Tensor) -> Tensor:
        """The levels at places [rows, d]."""
        index = self.table_of.long()
        if self.even:
            return self.table[:, 0][index] + places * self.table[:, 1][index]
        return self.table[index, places.long()]

    def nearest(self, weights: Tensor) -> Tensor:
        """Places of the levels nearest to weights [rows, d], among those that can stand for them; int32."""
        target = _float64(weights)
        places = np.empty(target.shape, np.int32)
        over_rows(_find_nearest, (target, places), (*self.arrays(), self.even))
        return torch.from_numpy(places).to(weights.device)

    def arrays(self) -> tuple[Array, Array, Array, Array]:
        """The table, whose levels a weight has, `low` and `high`, for the compiled loops."""
        none = torch.empty(0, 0)
        index = self.table_of.to(torch.int32).cpu().contiguous().numpy()
        low, high = (none if each is None else each for each in (self.low, self.high))
        return _float64(self.table), index, _float64(low), _float64(high)


@dataclass(frozen=True)
class Factor:
    """H = U D Uᵀ with its columns in an order [d]; `upper` is U [d, d], unit upper triangular."""

    order: Tensor
    upper: Tensor

    @classmethod
    def of(cls, moment: Tensor, *, activation_order: bool = True) -> Factor:
        """Take columns in activation order (largest diagonal of H first), or as they are."""
        moment = moment.double().cpu()
        order = torch.arange(len(moment))
        if activation_order:
            order = torch.argsort(moment.diagonal(), descending=True, stable=True)
        upper = torch.linalg.cholesky(moment[order][:, order].flip(0, 1)).flip(0, 1)
        return cls(order, (upper / upper.diagonal()).contiguous())


def feedback(weights: Tensor, factor: Factor, levels: Levels) -> Tensor:
    """Places [rows, d] of `weights` rounded column by column, each error being made up for by the columns to come.

    This is GPTQ (arXiv 2210.17323), with a factor of H instead of one of its inverse, which gives the same codes:
    e H eᵀ = sum_j D_j (e_j + sum_{i<j} e_i U_ij)², so that column j aims at making e_j = -sum_{i<j} e_i U_ij.
    """
    target, lists = _float64(weights), levels.arrays()
    ordered, upper = torch.from_numpy(target)[:, factor.order], factor.upper
    places, columns, known = np.empty(target.shape, np.int32), factor.order.numpy(), upper.numpy()
    error = torch.empty(target.shape, dtype=torch.float64)
    for start in range(0, len(upper), _BLOCK):
        block = slice(start, start + _BLOCK)
        aims = torch.addmm(ordered[:, block], error[:, :start], upper[:start, block], alpha=-1)
        given = columns[block], np.ascontiguousarray(known[block, block]), *lists, levels.even
        off = np.empty(aims.shape)
        over_rows(_feed_back, (aims.numpy(), target, places, off), given)
        error[:, block] = torch.from_numpy(off)
    return torch.from_numpy(places).to(weights.device)


@dataclass(frozen=True)
class Descent:
    """What coordinate descent ends with, in arrays [rows, d]: places (int32), their errors, and these times H."""

    places: Array
    error: Array
    gradient: Array


def descend(
    weights: Tensor, moment: Tensor, places: Tensor, levels: Levels, sweeps: int, frozen: Tensor | None = None
) -> Tensor:
    """Coordinate descent: set each place [rows, d] in turn to the best one given all others; never worse.

    Places where the mask `frozen` [rows, d] is true stay. Ends early when a sweep changes nothing.
    Beyond the paper: it repairs what one pass of rounding in a fixed order cannot see.
    """
    return torch.from_numpy(descent(weights, moment, places, levels, sweeps, frozen).places).to(places.device)


def descent(
    weights: Tensor, moment: Tensor, places: Tensor, levels: Levels, sweeps: int, frozen: Tensor | None = None
) -> Descent:
    """As `descend`, with all that is known in the end."""
    target, lists = _float64(weights), levels.arrays()
    found = places.to(torch.int32, copy=True).cpu().contiguous().numpy()
    error = np.empty(target.shape)
    over_rows(_find_errors, (target, found, error), (lists[0], lists[1], levels.even))
    gradient = (torch.from_numpy(error) @ moment.double().cpu()).numpy()
    fixed = np.zeros(target.shape, np.bool_) if frozen is None else frozen.cpu().contiguous().numpy()
    given = _float64(moment), *lists, levels.even, sweeps
    over_rows(_descend_rows, (gradient, error, fixed, target, found), given)
    return Descent(found, error, gradient)


def over_rows(loop: Callable[..., None], arrays: Sequence[Array], given: Sequence[Any]) -> None:
    """Run a compiled loop on runs of rows of the arrays, the first [rows, d], in threads where these are long."""
    number, width = arrays[0].shape
    step = max(_ROWS, CHUNK // max(width, 1))
    runs = [slice(at, min(at + step, number)) for at in range(0, number, step)]
    in_threads(lambda rows: loop(rows.start, *(each[rows] for each in arrays), *given), runs)


def _float64(values: Tensor) -> Array:
    array: Array = values.detach().cpu().double().contiguous().numpy()
    return array


@compiled
def _even_place(aim: float, lowest: float, step: float, even: int) -> float:
    """The level nearest to `aim` of evenly spaced ones; the lowest where that is no number."""
    near = np.rint((aim - lowest) / step)
    near = near if near > 0.0 else 0.0
    return near if near < even - 1.0 else even - 1.0


@compiled
def _place(aim: float, weight: float, t: int, table: Array, low: Array, high: Array) -> int:
    """The level nearest to `aim` of those in line t of the table that can stand for the weight."""
    line = table[t]
    place = nearest_level(aim, line)
    if len(low) == 0 or low[t, place] <= weight <= high[t, place]:
        return place
    left, right = place - 1, place + 1
    while left >= 0 or right < len(line):
        if right == len(line) or (left >= 0 and aim - line[left] <= line[right] - aim):
            at = left
            left -= 1
        else:
            at = right
            right += 1
        if low[t, at] <= weight <= high[t, at]:
            return at
    return place


@compiled
def _find_nearest(
    first: int, target: Array, places: Array, table: Array, table_of: Array, low: Array, high: Array, even: int
) -> None:
    for r in range(len(target)):
        for i in range(target.shape[1]):
            aim, t = target[r, i], table_of[first + r, i]
            if even > 0:
                places[r, i] = np.int32(_even_place(aim, table[t, 0], table[t, 1], even))
            else:
                places[r, i] = _place(aim, aim, t, table, low, high)


@compiled
def _find_errors(
    first: int, target: Array, places: Array, error: Array, table: Array, table_of: Array, even: int
) -> None:
    for r in range(len(target)):
        for i in range(target.shape[1]):
            t, place = table_of[first + r, i], places[r, i]
            level = table[t, 0] + place * table[t, 1] if even > 0 else table[t, place]
            error[r, i] = level - target[r, i]


@compiled
def _feed_back(
    first: int,
    aims: Array,
    target: Array,
    places: Array,
    error: Array,
    columns: Array,
    factor: Array,
    table: Array,
    table_of: Array,
    low: Array,
    high: Array,
    even: int,
) -> None:
    """Places and errors of a block of `columns` [b] that should become `aims` [rows, b], which are used up."""
    # Even levels stay clear of the call of `_place`, whose many arguments take longer than all else here.
    for r in range(len(aims)):
        aim, weights, lines = aims[r], target[r], table_of[first + r]
        for i in range(len(columns)):
            column = columns[i]
            t = lines[column]
            if even > 0:
                place = _even_place(aim[i], table[t, 0], table[t, 1], even)
                places[r, column] = np.int32(place)
                off = table[t, 0] + place * table[t, 1] - weights[column]
            else:
                at = _place(aim[i], weights[column], t, table, low, high)
                places[r, column] = at
                off = table[t, at] - weights[column]
            error[r, i] = off
            rest, line = aim[i + 1 :], factor[i, i + 1 :]
            for j in range(len(rest)):
                rest[j] -= off * line[j]


@compiled
def descend_row(
    slope: Array,
    off: Array,
    frozen: Array,
    weights: Array,
    places: Array,
    moment: Array,
    diagonal: Array,
    table: Array,
    table_of: Array,
    low: Array,
    high: Array,
    even: int,
    sweeps: int,
) -> None:
    """Change the places of a row [d], and with them its error and its slope, error H, until no single change helps."""
    for _ in range(sweeps):
        changed = False
        for i in range(len(places)):
            if frozen[i]:
                continue
            t = table_of[i]
            aim = weights[i] + off[i] - slope[i] / diagonal[i]
            if even > 0:
                near = _even_place(aim, table[t, 0], table[t, 1], even)
                place = np.int32(near)
                level = table[t, 0] + near * table[t, 1]
            else:
                place = np.int32(_place(aim, weights[i], t, table, low, high))
                level = table[t, place]
            if place != places[i]:
                step = level - weights[i] - off[i]
                places[i] = place
                off[i] += step
                changed = True
                line = moment[i]
                for j in range(len(slope)):
                    slope[j] += step * line[j]
        if not changed:
            return


@compiled
def _descend_rows(
    first: int,
    gradient: Array,
    error: Array,
    frozen: Array,
    target: Array,
    places: Array,
    moment: Array,
    table: Array,
    table_of: Array,
    low: Array,
    high: Array,
    even: int,
    sweeps: int,
) -> None:
    """As `descend_row`, for rows [rows, d]."""
    diagonal = np.diag(moment).copy()
    for r in range(len(target)):
        descend_row(
            *(gradient[r], error[r], frozen[r], target[r], places[r], moment, diagonal),
            *(table, table_of[first + r], low, high, even, sweeps),
        )
