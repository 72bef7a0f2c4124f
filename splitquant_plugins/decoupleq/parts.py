"""A weight as the sum of k quantized parts, W ≈ sum_i (scale_i * code_i + zero_i), and the steps that improve them.

The parts are solved together, not one after the other: codes by rounding to the nearest of all sums that a weight's
codes can form (codes^k of them), scales and zeros from one coupled system per row. The parts need not have disjoint
support; each is what a backend stores for one of the k layers. A layer that was not split has one part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from splitquant_plugins.decoupleq.objective import Rows, problem_errors
from splitquant_plugins.decoupleq.projected_descent import projected_codes
from splitquant_plugins.decoupleq.scales_and_zeros import fit_affine
from splitquant_plugins.decoupleq.solver_grid import Affine, SolverGrid, group_ranges
from splitquant_plugins.solvers.gptq import AffineLevels, TableLevels, descend, feedback_codes

if TYPE_CHECKING:
    from splitquant_plugins.decoupleq.alternation import SolveOptions

_MOST_SUMS = 4096
_ALL = slice(None)


def most_parts(grid: SolverGrid) -> int:
    """How many parts of these codes form few enough sums to be solved together."""
    return next((k for k in range(16, 0, -1) if grid.number_of_codes**k <= _MOST_SUMS), 1)


@dataclass(frozen=True)
class State:
    """A candidate answer: codes [k, out, d], scales and zeros [rows, k * groups], and the error of each row [out]."""

    codes: Tensor
    affine: Affine
    errors: Tensor

    @property
    def total(self) -> float:
        """The error of all rows."""
        return float(self.errors.sum())

    def or_better(self, other: State, shared: bool) -> State:
        """Row by row the better one; as a whole where the rows share their scale."""
        if shared:
            return other if other.total < self.total else self
        take = other.errors < self.errors
        return State(
            torch.where(take[:, None], other.codes, self.codes),
            other.affine.where(take, self.affine),
            torch.where(take, other.errors, self.errors),
        )


class Parts:
    """A weight [out, d], in the rows of `problem`, that k parts on `grid` are to sum to."""

    def __init__(self, problem: Sequence[Rows], grid: SolverGrid, k: int, options: SolveOptions) -> None:
        self.problem = problem
        self.grid = grid
        self.k = k
        self.options = options
        self.weight = torch.cat([rows.weight for rows in problem])
        self.group_of_column = grid.group_of_column(self.weight.shape[1], self.weight.device)
        codes = torch.arange(grid.quant_min, grid.quant_max + 1, dtype=torch.float64, device=self.weight.device)
        # [sums, k]: every choice of k codes.
        self.combinations = torch.cartesian_prod(*[codes] * k).reshape(-1, k)

    def affine_of(self, affine: Affine, part: int) -> Affine:
        """Scales and zeros of one part."""
        scale, zero = affine.scale.chunk(self.k, dim=1), affine.zero.chunk(self.k, dim=1)
        return Affine(scale[part], zero[part])

    def values(self, codes: Tensor, affine: Affine) -> list[Tensor]:
        """The values of the parts, each [out, d]."""
        affines = (self.affine_of(affine, part) for part in range(self.k))
        return [own.values(part, self.group_of_column) for own, part in zip(affines, codes, strict=True)]

    def state(self, codes: Tensor, affine: Affine) -> State:
        """These codes, scales and zeros with their errors."""
        total = torch.stack(self.values(codes, affine)).sum(dim=0)
        return State(codes, affine, problem_errors(self.problem, total))

    def first(self, shrink: float) -> Affine:
        """Scales and zeros for the range of each group, which includes 0, times `shrink`; 1 and 0 for groups of zeros.

        The parts are digits of one finer uniform grid: with c codes per part, scale_i = c * scale_(i+1) makes the
        sums c^k equally spaced levels.
        """
        low, high = (bound * shrink for bound in group_ranges(self.weight, self.grid))
        codes = self.grid.number_of_codes
        span = 2 * torch.maximum(-low, high) if self.grid.zero == "none" else high - low
        finest = span / (codes**self.k - 1)
        finest = torch.where(finest > 0, finest, torch.ones_like(finest))
        scales = [finest * codes ** (self.k - 1 - part) for part in range(self.k)]
        zeros = [torch.zeros_like(finest) for _ in range(self.k)]
        if self.grid.zero == "free":
            zeros[0] = low
        elif self.grid.zero == "integer":
            place = torch.round(-low / finest).clamp(0, codes**self.k - 1)
            for part in range(self.k):
                digit = codes ** (self.k - 1 - part)
                zeros[part] = -scales[part] * torch.div(place, digit, rounding_mode="floor")
                place = place % digit
        return Affine(torch.cat(scales, dim=1), torch.cat(zeros, dim=1))

    def nearest(self, affine: Affine) -> State:
        """Rounding to the nearest sums."""
        return self._chosen(affine, lambda rows, levels, _: levels.nearest(rows.weight.T, _ALL))

    def rounded(self, affine: Affine) -> State:
        """Codes that take H into account."""

        def choose(rows: Rows, levels: _Levels, _: slice) -> Tensor:
            target = rows.weight.T.contiguous()
            if self.options.rounding == "projected" and isinstance(levels, AffineLevels):
                codes = projected_codes(target, rows.moment, levels)
            else:
                codes = feedback_codes(target, rows.moment, levels)
            return descend(target, rows.moment, codes, levels, self.options.sweeps)

        return self._chosen(affine, choose)

    def refitted(self, state: State) -> State:
        """The same codes with their closed-form scales and zeros; not necessarily better."""
        return self.state(state.codes, fit_affine(self.problem, state.codes, self.grid, state.affine))

    def descended(self, state: State, frozen: Tensor) -> State:
        """Coordinate descent from a state; places where the mask `frozen` [out, d] is true keep their codes."""

        def choose(rows: Rows, levels: _Levels, here: slice) -> Tensor:
            start = levels.places(state.codes[:, here])
            target = rows.weight.T.contiguous()
            return descend(target, rows.moment, start, levels, self.options.sweeps, frozen[here].T)

        return self._chosen(state.affine, choose)

    def _chosen(self, affine: Affine, choose: Callable[[Rows, _Levels, slice], Tensor]) -> State:
        """The state of the places [d, rows] that `choose` takes among the levels of each chunk of rows."""
        found = [levels.codes(choose(rows, levels, here)) for rows, levels, here in self._levels(affine)]
        return self.state(torch.cat(found, dim=1), affine)

    def _levels(self, affine: Affine) -> Iterator[tuple[Rows, _Levels, slice]]:
        """What a weight may be rounded to, for the rows that see the same inputs."""
        sums, order = self._table(affine) if self.k > 1 else (self.weight, self.weight)
        start = 0
        for rows in self.problem:
            here = slice(start, start + len(rows.weight))
            part = _ALL if self.grid.per_tensor else here
            if self.k == 1:
                scale, zero = affine.scale[part], affine.zero[part]
                own = [each[:, self.group_of_column].T.contiguous() for each in (scale, zero)]
                yield rows, _Codes(own[0], own[1], self.grid.quant_min, self.grid.quant_max), here
            else:
                order_of_rows = order[:, part].expand(-1, len(rows.weight), -1)
                yield rows, _Sums(sums[:, part], self.group_of_column, order_of_rows, self.combinations), here
            start = here.stop

    def _table(self, affine: Affine) -> tuple[Tensor, Tensor]:
        """All sums, ascending, and the combination of codes of each: [groups, rows or 1, sums]."""
        scale, zero = (each.reshape(len(each), self.k, -1).permute(2, 0, 1) for each in (affine.scale, affine.zero))
        sums = scale @ self.combinations.T + zero.sum(dim=2, keepdim=True)
        ordered = sums.sort(dim=2, stable=True)
        return ordered.values, ordered.indices


class _Codes(AffineLevels):
    """The levels of one part, whose places are the codes."""

    def places(self, codes: Tensor) -> Tensor:
        """Places [d, rows] of codes [1, rows, d]."""
        return codes[0].T

    def codes(self, places: Tensor) -> Tensor:
        """Codes [1, rows, d] of places [d, rows]."""
        return places.T[None] + 0.0  # no negative zeros


@dataclass(frozen=True)
class _Sums(TableLevels):
    """The sums of several parts: `order` [groups, rows, sums] tells which of the `combinations` each sum is of."""

    order: Tensor
    combinations: Tensor

    def places(self, codes: Tensor) -> Tensor:
        """Places [d, rows] of codes [k, rows, d]."""
        lowest, highest = self.combinations[0, 0], self.combinations[-1, 0]
        index = torch.zeros_like(codes[0])
        for part in codes:
            index = index * (highest - lowest + 1) + part - lowest
        inverse = self.order.argsort(dim=2)
        return inverse[(*self._groups_and_rows(index), index.long())].T.to(codes)

    def codes(self, places: Tensor) -> Tensor:
        """Codes [k, rows, d] of places [d, rows]."""
        chosen = self.order[(*self._groups_and_rows(places.T), places.T.long())]
        return self.combinations[chosen].permute(2, 0, 1)

    def _groups_and_rows(self, like: Tensor) -> tuple[Tensor, Tensor]:
        return self.group_of_column[None, :], torch.arange(len(like), device=like.device)[:, None]


_Levels = _Codes | _Sums
