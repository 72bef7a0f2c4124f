"""Codes for given levels: GPTQ's error feedback and coordinate descent, over any levels.

Everything here is laid out [d, rows], one line per input column, because columns are taken one at a time.
`moment` is the second moment H [d, d] of the layer's inputs (GPTQ calls it the Hessian), positive definite; rows are
independent of each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

_BLOCK = 64

Where = slice | int | Tensor


class Levels(Protocol):
    """The values that a code may stand for, per column (and row)."""

    def nearest(self, target: Tensor, where: Where) -> Tensor:
        """Codes of the levels nearest to `target`, [rows] for one column or [columns, rows] for several."""

    def values(self, codes: Tensor, where: Where) -> Tensor:
        """The levels of codes, shaped as `nearest`."""


@dataclass(frozen=True)
class AffineLevels:
    """scale * code + zero; `scale` and `zero` are [d, rows] or [d, 1]."""

    scale: Tensor
    zero: Tensor
    quant_min: int
    quant_max: int

    def nearest(self, target: Tensor, where: Where) -> Tensor:
        """Round to nearest, clamped to `quant_min` and `quant_max`; float64."""
        return torch.round((target - self.zero[where]) / self.scale[where]).clamp(self.quant_min, self.quant_max)

    def values(self, codes: Tensor, where: Where) -> Tensor:
        """The levels of codes."""
        return codes * self.scale[where] + self.zero[where]


@dataclass(frozen=True)
class TableLevels:
    """Any levels: `table` [groups, rows or 1, levels] in ascending order; a code is a place in it.

    `group_of_column`: [d], which group of the table holds for a column.
    """

    table: Tensor
    group_of_column: Tensor

    def nearest(self, target: Tensor, where: Where) -> Tensor:
        """Places of the nearest levels; float64."""
        if isinstance(where, int):
            table = self.table[self.group_of_column[where]]
            middles = ((table[:, 1:] + table[:, :-1]) / 2).contiguous()
            middles = middles[0] if len(middles) == 1 else middles
            found = torch.searchsorted(middles, target[:, None].contiguous() if middles.ndim > 1 else target)
            return found.reshape(target.shape).to(target)
        groups = self.group_of_column[where]
        codes = torch.empty_like(target)
        for group in torch.unique(groups).tolist():
            inside = groups == group
            table = self.table[group]
            middles = ((table[:, 1:] + table[:, :-1]) / 2).contiguous()
            wanted = target[inside].T.contiguous()
            found = torch.searchsorted(middles[0] if len(middles) == 1 else middles, wanted)
            codes[inside] = found.T.to(target)
        return codes

    def values(self, codes: Tensor, where: Where) -> Tensor:
        """The levels at these places."""
        groups = self.group_of_column[where]
        if isinstance(where, int):
            table = self.table[groups].expand(len(codes), -1)
            return table.gather(1, codes[:, None].long())[:, 0]
        values = torch.empty_like(codes)
        for group in torch.unique(groups).tolist():
            inside = groups == group
            places = codes[inside].T.long()
            values[inside] = self.table[group].expand(len(places), -1).gather(1, places).T
        return values


def feedback_codes(target: Tensor, moment: Tensor, levels: Levels, *, activation_order: bool = True) -> Tensor:
    """Round `target` column by column, each error being made up for by the columns still to come.

    This is GPTQ (arXiv 2210.17323), in activation order (largest diagonal of H first) or in that of the columns.
    Instead of a Cholesky factor of the inverse of H it uses H = U D Uᵀ with U unit upper triangular, which gives
    the same codes without an inverse: e H eᵀ = sum_j D_j (e_j + sum_{i<j} e_i U_ij)², so that column j aims at
    making e_j = -sum_{i<j} e_i U_ij.
    """
    order = torch.arange(len(moment), device=moment.device)
    if activation_order:
        order = torch.argsort(moment.diagonal(), descending=True, stable=True)
    lower = _unit_upper_factor(moment[order][:, order].double()).T.to(target.dtype).contiguous()
    columns = order.tolist()
    codes = torch.empty_like(target)
    # In that order; the codes are not.
    error = torch.zeros_like(target)
    for start in range(0, len(columns), _BLOCK):
        stop = min(start + _BLOCK, len(columns))
        aims = target[order[start:stop]] - lower[start:stop, :start] @ error[:start]
        for place in range(start, stop):
            column = columns[place]
            aim = aims[place - start] - lower[place, start:place] @ error[start:place]
            codes[column] = levels.nearest(aim, column)
            error[place] = levels.values(codes[column], column) - target[column]
    return codes


def _unit_upper_factor(moment: Tensor) -> Tensor:
    """U of H = U D Uᵀ, with ones on its diagonal; H must be positive definite."""
    upper = torch.linalg.cholesky(moment.flip(0, 1)).flip(0, 1)
    return upper / upper.diagonal()


def descend(
    target: Tensor,
    moment: Tensor,
    codes: Tensor,
    levels: Levels,
    sweeps: int,
    frozen: Tensor | None = None,
    *,
    every_column: bool = False,
) -> Tensor:
    """Coordinate descent: set each code in turn to the best one given all others; never worse.

    Codes where the mask `frozen` [d, rows] is true stay. Ends early when a sweep changes nothing. Columns that only a
    change in their own block of columns makes worth changing wait for the next sweep, or with `every_column` do not.
    Beyond the paper: it repairs what one pass of rounding in a fixed order cannot see.
    """
    everywhere = slice(None)
    codes = codes.clone()
    diagonal = moment.diagonal()[:, None]
    error = levels.values(codes, everywhere) - target
    for _ in range(sweeps):
        changed = False
        for start in range(0, len(target), _BLOCK):
            block = slice(start, start + _BLOCK)
            gradient = moment[block] @ error
            candidates = list(range(len(gradient)))
            if not every_column:
                best = target[block] + error[block] - gradient / diagonal[block]
                changes = levels.nearest(best, block) != codes[block]
                if frozen is not None:
                    changes &= ~frozen[block]
                candidates = changes.any(dim=1).nonzero().flatten().tolist()
            for inside in candidates:
                column = start + inside
                best_of_column = target[column] + error[column] - gradient[inside] / diagonal[column]
                chosen = levels.nearest(best_of_column, column)
                codes[column] = chosen if frozen is None else torch.where(frozen[column], codes[column], chosen)
                step = levels.values(codes[column], column) - target[column] - error[column]
                error[column] += step
                gradient += moment[block, column, None] * step
            changed = changed or bool(candidates)
        if not changed:
            break
    return codes
