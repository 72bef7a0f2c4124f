"""The layer stage for a weight that is split: W ≈ sum_i (scale_i * code_i + zero_i) over k parts.

The parts are solved together, not one after the other: integers by rounding to the nearest of all sums that
a column's codes can form (levels^k of them), scales and zeros from one coupled system per row. The parts
need not have disjoint support; each is what a backend stores for one of the k layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from splitquant_plugins.decoupleq.affine import fit_affine
from splitquant_plugins.decoupleq.alternation import SolveOptions, State, alternate
from splitquant_plugins.decoupleq.grids import Affine, ValueGrid, cell_ranges
from splitquant_plugins.decoupleq.objective import Rows, problem_errors, problem_of
from splitquant_plugins.decoupleq.solve import QuantizedWeight
from splitquant_plugins.errors import ConfigError, InputError
from splitquant_plugins.solvers.gptq import TableLevels, descend, feedback_codes

_MOST_SUMS = 4096
_ALL = slice(None)

_Place = Callable[[Tensor, Rows, TableLevels, int, Tensor], Tensor]


@dataclass(frozen=True)
class JointSolution:
    """The k parts of a weight, and errors as those of `Solution`.

    `error_before`: of rounding to nearest on the uniform grid that k parts can form over the whole range.
    """

    parts: tuple[QuantizedWeight, ...]
    error_before: float
    error_after: float
    trace: tuple[float, ...] = field(repr=False)

    def dequantize(self) -> Tensor:
        """The sum of the parts, [out, d], float32."""
        return torch.stack([part.dequantize() for part in self.parts]).sum(dim=0)


def solve_parts(
    weight: Tensor,
    second_moment: Tensor,
    grid: ValueGrid,
    k: int,
    options: SolveOptions | None = None,
    *,
    name: str = "weight",
) -> JointSolution:
    """k parts on `grid` whose sum has a small error tr((Ŵ - W) H (Ŵ - W)ᵀ); arguments as `solve_layer`.

    `rounding` and `search_inputs` of the options do not apply. With zero='float' only the sum of the parts'
    zeros is determined; the first part carries the offset. Raises ConfigError where the codes of k parts form
    more than 4096 sums: so many bits need no joint solution, solve the parts one by one.
    """
    options = options or SolveOptions()
    low, high = grid.code_range
    if k < 1 or (high - low + 1) ** k > _MOST_SUMS:
        raise ConfigError(
            f"k={k} with {grid.bits} bits: parts are solved together while their codes form at most "
            f"{_MOST_SUMS} sums; take fewer parts or bits (k=1 is solve_layer)"
        )
    try:
        problem = problem_of(weight, second_moment, options.damping)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    with torch.no_grad():
        return _solve(Parts(problem, grid, k, options.sweeps), options)


def most_parts(grid: ValueGrid) -> int:
    """How many parts of these codes form few enough sums to be solved together."""
    low, high = grid.code_range
    return next(k for k in range(16, 0, -1) if (high - low + 1) ** k <= _MOST_SUMS)


class Parts:
    """The `alternation.Steps` of k parts: codes [k, out, d], scales and zeros [rows, k * cells]."""

    def __init__(self, problem: Sequence[Rows], grid: ValueGrid, k: int, sweeps: int) -> None:
        self.problem = problem
        self.grid = grid
        self.k = k
        self.sweeps = sweeps
        self.weight = torch.cat([rows.weight for rows in problem])
        self.cells = grid.cell_of_column(self.weight.shape[1], self.weight.device)
        self.shared = grid.granularity == "tensor"
        low, high = grid.code_range
        codes = torch.arange(low, high + 1, dtype=torch.float64, device=self.weight.device)
        # [sums, k]: every combination of codes.
        self.combinations = torch.cartesian_prod(*[codes] * k).reshape(-1, k)

    def affine_of(self, affine: Affine, part: int) -> Affine:
        scale, zero = affine.scale.chunk(self.k, dim=1), affine.zero.chunk(self.k, dim=1)
        return Affine(scale[part], zero[part])

    def state(self, codes: Tensor, affine: Affine) -> State:
        parts = [self.affine_of(affine, part).values(codes[part], self.cells) for part in range(self.k)]
        return State(codes, affine, problem_errors(self.problem, torch.stack(parts).sum(dim=0)))

    def first(self, shrink: float) -> Affine:
        """The parts as digits of one finer uniform grid over each cell's range times `shrink`.

        With L levels per part, scale_i = L * scale_(i+1) makes the sums L^k equally spaced levels.
        """
        low, high = cell_ranges(self.weight, self.grid)
        lowest, highest = self.grid.code_range
        levels = highest - lowest + 1
        symmetric = self.grid.zero == "none"
        span = shrink * (2 * torch.maximum(-low, high) if symmetric else high - low)
        finest = span / (levels**self.k - 1)
        finest = torch.where(finest > 0, finest, torch.ones_like(finest))
        scales = [finest * levels ** (self.k - 1 - part) for part in range(self.k)]
        zeros = [torch.zeros_like(finest) for _ in range(self.k)]
        if self.grid.zero == "float":
            zeros[0] = low * shrink
        elif self.grid.zero == "integer":
            place = torch.round(-low * shrink / finest).clamp(0, levels**self.k - 1)
            for part in range(self.k):
                weight = levels ** (self.k - 1 - part)
                zeros[part] = -scales[part] * torch.div(place, weight, rounding_mode="floor")
                place = place % weight
        return Affine(torch.cat(scales, dim=1), torch.cat(zeros, dim=1))

    def nearest(self, affine: Affine) -> State:
        return self._from_places(affine, lambda target, _rows, levels, *_: levels.nearest(target, _ALL))

    def rounded(self, affine: Affine) -> State:
        def place(target: Tensor, rows: Rows, levels: TableLevels, *_: Any) -> Tensor:
            found = feedback_codes(target, rows.moment, levels)
            return descend(target, rows.moment, found, levels, self.sweeps)

        return self._from_places(affine, place)

    def refitted(self, state: State) -> State:
        return self.state(state.codes, fit_affine(self.problem, state.codes, self.grid, state.affine))

    def descended(self, state: State, frozen: Tensor) -> State:
        """Coordinate descent from a state; places where the mask `frozen` [out, d] is true keep their codes."""
        low, high = self.grid.code_range
        weights = torch.tensor([(high - low + 1) ** (self.k - 1 - part) for part in range(self.k)])
        index = torch.einsum("krd,k->rd", state.codes - low, weights.to(state.codes)).long()

        def place(target: Tensor, rows: Rows, levels: TableLevels, start: int, own: Tensor) -> Tensor:
            end = start + len(rows.weight)
            inverse = own.argsort(dim=2)  # the place of every combination
            row = torch.arange(end - start, device=index.device)[:, None]
            places = inverse[self.cells[None, :], row, index[start:end]].T.to(target)
            return descend(target, rows.moment, places, levels, self.sweeps, frozen[start:end].T)

        return self._from_places(state.affine, place)

    def _from_places(self, affine: Affine, place: _Place) -> State:
        """Codes from places in the sorted table of sums."""
        sums, order = self._table(affine)
        found = []
        start = 0
        for rows in self.problem:
            part = _ALL if self.shared else slice(start, start + len(rows.weight))
            levels = TableLevels(sums[:, part], self.cells)
            own = order[:, part].expand(-1, len(rows.weight), -1)
            places = place(rows.weight.T.contiguous(), rows, levels, start, own).T.long()
            start += len(rows.weight)
            # own[cell of the column, row, place]: which combination of codes the place stands for.
            row_index = torch.arange(len(places), device=places.device)[:, None]
            chosen = own[self.cells[None, :], row_index, places]
            found.append(self.combinations[chosen].permute(2, 0, 1))
        return self.state(torch.cat(found, dim=1), affine)

    def _table(self, affine: Affine) -> tuple[Tensor, Tensor]:
        """All sums, ascending, and the combination of codes of each: [cells, rows or 1, sums]."""
        scale = affine.scale.reshape(len(affine.scale), self.k, -1).permute(2, 0, 1)
        zero = affine.zero.reshape(len(affine.zero), self.k, -1).sum(dim=1).T
        sums = scale @ self.combinations.T + zero[:, :, None]
        ordered = sums.sort(dim=2, stable=True)
        return ordered.values, ordered.indices


def _solve(parts: Parts, options: SolveOptions) -> JointSolution:
    best, trace = alternate(parts, options)
    stored = tuple(
        QuantizedWeight.stored(best.codes[part], parts.affine_of(best.affine, part), parts.grid)
        for part in range(parts.k)
    )
    values = torch.stack([part.dequantize() for part in stored]).sum(dim=0)
    after = float(problem_errors(parts.problem, values.double()).sum())
    return JointSolution(stored, trace[0], after, tuple(trace))
