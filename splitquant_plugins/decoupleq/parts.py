"""A weight as the sum of k quantized parts, W ≈ sum_i (scale_i * code_i + zero_i), and the steps that improve them.

The parts are solved together, not one after the other: codes by rounding to the nearest of all sums that a weight's
codes can form (codes^k of them), scales and zeros from one coupled system per row. The parts need not have disjoint
support; each is what a backend stores for one of the k layers. A layer that was not split has one part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from splitquant_plugins.compiled import compiled
from splitquant_plugins.decoupleq.objective import Rows, problem_errors
from splitquant_plugins.decoupleq.projected_descent import projected_codes
from splitquant_plugins.decoupleq.scales_and_zeros import fit_affine
from splitquant_plugins.decoupleq.solver_grid import Affine, SolverGrid, group_ranges
from splitquant_plugins.solvers.gptq import Descent, Levels, descent, feedback, over_rows
from splitquant_plugins.solvers.sums import sums_of_groups

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from splitquant_plugins.decoupleq.alternation import SolveOptions

    Array = NDArray[Any]

_MOST_SUMS = 4096


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

    def some(self, rows: Tensor) -> State:
        """Some of the rows, each with scales of its own."""
        return State(self.codes[:, rows], Affine(self.affine.scale[rows], self.affine.zero[rows]), self.errors[rows])

    def put(self, rows: Tensor, other: State) -> State:
        """With other rows in the place of some."""
        codes, scale, zero = self.codes.clone(), self.affine.scale.clone(), self.affine.zero.clone()
        codes[:, rows], scale[rows], zero[rows] = other.codes, other.affine.scale, other.affine.zero
        return State(codes, Affine(scale, zero), self.errors.index_put((rows,), other.errors))

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
        # Scales, zeros and sums are tabulated by row, and by group in it.
        groups = int(self.group_of_column[-1]) + 1
        first = torch.arange(len(self.weight), device=self.weight.device) * (0 if grid.per_tensor else groups)
        self._table_of = (self.group_of_column + first[:, None]).to(torch.int32)
        codes = torch.arange(grid.quant_min, grid.quant_max + 1, dtype=torch.float64, device=self.weight.device)
        # [sums, k]: every choice of k codes.
        self.combinations = torch.cartesian_prod(*[codes] * k).reshape(-1, k)

    @property
    def single_scales(self) -> bool:
        """Whether there is one part, in which each row has one scale."""
        return self.k == 1 and self.grid.granularity == "channel"

    def some(self, taken: Tensor) -> Parts:
        """Some of the rows, as the mask [out] says."""
        masks = torch.split(taken, [len(rows.weight) for rows in self.problem])
        problem = [rows.some(mask) for rows, mask in zip(self.problem, masks, strict=True) if bool(mask.any())]
        return Parts(problem, self.grid, self.k, self.options)

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
        return self._chosen(affine, lambda rows, levels, _: (levels.nearest(rows.weight), None))

    def rounded(self, affine: Affine) -> State:
        """Codes that take H into account."""

        def choose(rows: Rows, levels: Levels, _: slice) -> tuple[Tensor, Tensor | None]:
            if self.options.rounding == "projected" and self.k == 1:
                places = projected_codes(rows.weight, rows.moment, levels)
            else:
                places = feedback(rows.weight, rows.factor, levels)
            return _with_errors(descent(rows.weight, rows.moment, places, levels, self.options.sweeps), rows)

        return self._chosen(affine, choose)

    def refitted(self, state: State) -> State:
        """The same codes with their closed-form scales and zeros; not necessarily better."""
        return self.state(state.codes, fit_affine(self.problem, state.codes, self.grid, state.affine))

    def descended(self, state: State, frozen: Tensor) -> State:
        """Coordinate descent from a state; places where the mask `frozen` [out, d] is true keep their codes."""
        levels, order = self._sums(state.affine)
        number = torch.zeros_like(state.codes[0])
        for part in state.codes:
            number = number * self.grid.number_of_codes + part - self.grid.quant_min
        # Which place each sum has got.
        places = order.argsort(dim=1)[levels.table_of.long(), number.long()] if self.k > 1 else number

        def choose(rows: Rows, levels: Levels, here: slice) -> tuple[Tensor, Tensor | None]:
            found = descent(rows.weight, rows.moment, places[here], levels, self.options.sweeps, frozen[here])
            return _with_errors(found, rows)

        return self._chosen(state.affine, choose)

    def _chosen(self, affine: Affine, choose: Callable[[Rows, Levels, slice], tuple[Tensor, Tensor | None]]) -> State:
        """The state of the places [rows, d] that `choose` takes among the levels of each run of rows.

        Where it knows their errors [rows], these are not found again.
        """
        levels, order = self._sums(affine)
        found, start = [], 0
        for rows in self.problem:
            here = slice(start, start + len(rows.weight))
            found.append(choose(rows, replace(levels, table_of=levels.table_of[here]), here))
            start = here.stop
        places = torch.cat([each for each, _ in found])
        errors = [known for _, known in found if known is not None]
        if self.k == 1:
            codes = places[None].double() + self.grid.quant_min
        else:
            codes = torch.empty(self.k, *places.shape, dtype=torch.float64)
            given = self.combinations.cpu().numpy(), order.cpu().numpy(), levels.table_of.cpu().numpy()
            over_rows(_find_codes, (places.cpu().numpy(),), (*given, codes.numpy()))
            codes = codes.to(places.device)
        return State(codes, affine, torch.cat(errors)) if errors else self.state(codes, affine)

    def _sums(self, affine: Affine) -> tuple[Levels, Tensor]:
        """What each weight may be rounded to, and which of the `combinations` each sum [tables, sums] is of."""
        scale, zero = (
            each.reshape(len(each), self.k, -1).transpose(1, 2).reshape(-1, self.k)
            for each in (affine.scale, affine.zero)
        )
        if self.k == 1:
            table = torch.cat([zero + self.grid.quant_min * scale, scale], dim=1)
            return Levels(table, self._table_of, self.grid.number_of_codes), table
        sums = np.empty((len(scale), len(self.combinations)))
        order = np.empty(sums.shape, np.int64)
        codes = np.arange(self.grid.quant_min, self.grid.quant_max + 1.0)
        sums_of_groups(codes, scale.cpu().contiguous().numpy(), zero.cpu().contiguous().numpy(), sums, order)
        device = scale.device
        return Levels(torch.from_numpy(sums).to(device), self._table_of), torch.from_numpy(order).to(device)


@compiled
def _find_codes(first: int, places: Array, combinations: Array, order: Array, table_of: Array, codes: Array) -> None:
    """The codes [k, rows, d] that the sums at some places are of."""
    for r in range(len(places)):
        for i in range(places.shape[1]):
            number = order[table_of[first + r, i], places[r, i]]
            for part in range(len(codes)):
                codes[part, first + r, i] = combinations[number, part]


def _with_errors(found: Descent, rows: Rows) -> tuple[Tensor, Tensor]:
    """Places [rows, d] and the errors [rows] of what coordinate descent ended with."""
    errors = np.einsum("ri,ri->r", found.error, found.gradient).clip(min=0)
    return torch.from_numpy(found.places).to(rows.weight.device), torch.from_numpy(errors).to(rows.weight)
