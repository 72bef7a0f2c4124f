"""The layer stage of decoupleQ (arXiv 2404.12759) for one weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from splitquant_plugins.decoupleq.affine import fit_affine
from splitquant_plugins.decoupleq.alternation import SolveOptions, State, alternate
from splitquant_plugins.decoupleq.grids import Affine, ValueGrid, min_max_affine
from splitquant_plugins.decoupleq.objective import Rows, problem_errors, problem_of
from splitquant_plugins.decoupleq.projected import projected_codes
from splitquant_plugins.decoupleq.search import searched_codes
from splitquant_plugins.errors import ConfigError, InputError
from splitquant_plugins.solvers.gptq import AffineLevels, descend, feedback_codes

_ALL = slice(None)


@dataclass(frozen=True)
class QuantizedWeight:
    """Codes and the values they stand for: scale * code + zero.

    `codes`: [out, d], uint8, or int8 for a symmetric grid. `scale`, `zero`: [out, cells per row] or [1, 1],
    float32.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    grid: ValueGrid

    @classmethod
    def stored(cls, codes: Tensor, affine: Affine, grid: ValueGrid) -> QuantizedWeight:
        """In the dtypes they are stored in, from float64."""
        scale, zero = affine.scale.float(), affine.zero.float()
        if grid.zero == "integer":
            # As -scale * zero point in float32, so that the code of 0 comes back as exactly 0.
            zero = -scale * torch.round(-affine.zero / affine.scale).float()
        return cls(codes.to(torch.int8 if grid.zero == "none" else torch.uint8), scale, zero, grid)

    @property
    def zero_point(self) -> Tensor:
        """The code that stands for 0, int32, shaped as `scale`; not for a grid with a free zero."""
        if self.grid.zero == "float":
            raise ConfigError("a grid with zero='float' has no integer zero point")
        return torch.round(-self.zero / self.scale).to(torch.int32)

    def dequantize(self) -> Tensor:
        """The quantized weight, [out, d], float32."""
        cells = self.grid.cell_of_column(self.codes.shape[1], self.codes.device)
        return Affine(self.scale, self.zero).values(self.codes.to(self.scale), cells)


@dataclass(frozen=True)
class Solution(QuantizedWeight):
    """A quantized weight with its errors, sums over the rows of e H eᵀ with the damped H.

    `error_before`: of rounding to nearest in the min-max range. `error_after`: of the solution as stored.
    `trace`: the error in float64 after every step, the first that of rounding to nearest; it never rises.
    """

    error_before: float
    error_after: float
    trace: tuple[float, ...] = field(repr=False)


def solve_layer(
    weight: Tensor,
    second_moment: Tensor,
    grid: ValueGrid,
    options: SolveOptions | None = None,
    *,
    name: str = "weight",
) -> Solution:
    """Codes, scales and zeros with a small error tr((Ŵ - W) H (Ŵ - W)ᵀ) for a weight [out, d].

    `second_moment`: H, [d, d], or [groups, d, d] where consecutive runs of out / groups rows see inputs of
    their own (grouped convolutions); it may be singular or zero. Computes in float64; deterministic.
    Raises InputError (naming `name`) for NaN, infinity or shapes that do not fit.
    """
    options = options or SolveOptions()
    try:
        problem = problem_of(weight, second_moment, options.damping)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    with torch.no_grad():
        return _solve(problem, grid, options)


class _Layer:
    """One weight's `alternation.Steps`."""

    def __init__(self, problem: Sequence[Rows], grid: ValueGrid, options: SolveOptions) -> None:
        self.problem = problem
        self.grid = grid
        self.options = options
        self.weight = torch.cat([rows.weight for rows in problem])
        self.cells = grid.cell_of_column(self.weight.shape[1], self.weight.device)
        self.shared = grid.granularity == "tensor"

    def first(self, shrink: float) -> Affine:
        return min_max_affine(self.weight, self.grid, shrink)

    def state(self, codes: Tensor, affine: Affine) -> State:
        return State(codes, affine, problem_errors(self.problem, affine.values(codes, self.cells)))

    def levels(self, affine: Affine, rows: slice = _ALL) -> AffineLevels:
        """What codes of these rows stand for, in the layout of `rounding`."""
        rows = _ALL if self.shared else rows
        scale, zero = (part[rows][:, self.cells].T.contiguous() for part in (affine.scale, affine.zero))
        return AffineLevels(scale, zero, self.grid.code_range)

    def nearest(self, affine: Affine) -> State:
        return self.state(self.levels(affine).nearest(self.weight.T, _ALL).T, affine)

    def rounded(self, affine: Affine) -> State:
        found = []
        start = 0
        for rows in self.problem:
            target = rows.weight.T.contiguous()
            levels = self.levels(affine, slice(start, start + len(rows.weight)))
            start += len(rows.weight)
            round_codes = feedback_codes if self.options.rounding == "gptq" else projected_codes
            codes = round_codes(target, rows.moment, levels)
            found.append(descend(target, rows.moment, codes, levels, self.options.sweeps).T)
        return self.state(torch.cat(found), affine)

    def refitted(self, state: State) -> State:
        affine = fit_affine(self.problem, state.codes[None], self.grid, state.affine)
        return self.state(state.codes, affine)


def best_state(problem: Sequence[Rows], grid: ValueGrid, options: SolveOptions) -> tuple[State, list[float]]:
    """The best codes, scales and zeros found, in float64, and the error after every step."""
    layer = _Layer(problem, grid, options)
    best, trace = alternate(layer, options)
    if layer.weight.shape[1] <= options.search_inputs and grid.granularity == "row":
        codes = searched_codes(problem, best.codes, grid, options.seed)
        best = best.or_better(layer.refitted(layer.state(codes, best.affine)), shared=False)
        trace.append(best.total)
    return best, trace


def _solve(problem: Sequence[Rows], grid: ValueGrid, options: SolveOptions) -> Solution:
    best, trace = best_state(problem, grid, options)
    stored = QuantizedWeight.stored(best.codes, best.affine, grid)
    after = float(problem_errors(problem, stored.dequantize().double()).sum())
    return Solution(stored.codes, stored.scale, stored.zero, grid, trace[0], after, tuple(trace))
