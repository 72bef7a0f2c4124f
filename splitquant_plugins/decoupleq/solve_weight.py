"""A weight, whole or in parts, solved such that a backend's plain rounding gives exactly the solution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from splitquant_plugins.decoupleq.alternation import SolveOptions, best_state
from splitquant_plugins.decoupleq.objective import problem_errors, problem_of
from splitquant_plugins.decoupleq.parts import Parts, State, most_parts
from splitquant_plugins.decoupleq.range_ends import with_range_ends
from splitquant_plugins.decoupleq.solver_grid import Affine, solver_grid
from splitquant_plugins.errors import ConfigError, InputError

if TYPE_CHECKING:
    from splitquant_plugins.grid import Grid


@dataclass(frozen=True)
class SolvedWeight:
    """The k parts of a weight, on a backend's grid; lists hold a tensor per part, of the weight's shape and dtype.

    `floats`: what to hand to the backend. `rounded`: what it makes of them, to the bit. `error_before`: of plain
    rounding by the backend, sum over the rows of e H eᵀ with the damped H; `error_after`: of the solution.
    `rounds`: steps tried. `plain_rows`: rows that keep plain rounding, because the backend would not find the
    solution again, or it is no better. `solver`, `state`: what the block stage goes on with.
    """

    floats: list[Tensor]
    rounded: list[Tensor]
    error_before: float
    error_after: float
    rounds: int
    plain_rows: int
    solver: Parts = field(repr=False)
    state: State = field(repr=False)


def solve_weight(
    weight: Tensor,
    parts: Sequence[Tensor],
    second_moment: Tensor,
    grid: Grid,
    options: SolveOptions | None = None,
    *,
    name: str = "weight",
) -> SolvedWeight:
    """Solve a weight [out, ...] for `grid`, as one tensor (`parts` holds the weight alone) or as the sum of k.

    `parts` are the float parts that the backend would round plainly. `second_moment`: H, [d, d] with d the product of
    the weight's other dimensions, or [groups, d, d] where consecutive runs of out / groups rows see inputs of their own
    (grouped convolutions); it may be singular or zero. Computes in float64; deterministic. Raises InputError (naming
    `name`) for NaN, infinity or shapes that do not fit, ConfigError where the codes of k parts form too many sums.
    """
    options = options or SolveOptions()
    try:
        problem = problem_of(weight.detach().flatten(1), second_moment, options.damping)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    codes = solver_grid(grid, weight.shape)
    if len(parts) > most_parts(codes):
        raise ConfigError(
            f"{name}: {len(parts)} parts of {grid.bits} bits have too many sums to be solved together; "
            f"take at most {most_parts(codes)} parts, or fewer bits"
        )
    with torch.no_grad():
        solver = Parts(problem, codes, len(parts), options)
        found, trace = best_state(solver, options)
        return _realised(solver, with_range_ends(solver, found), grid, parts, len(trace))


@torch.no_grad()
def with_affine(solution: SolvedWeight, grid: Grid, parts: Sequence[Tensor], affine: Affine) -> SolvedWeight:
    """The same codes with other scales and zeros, each [rows, k * groups], float64."""
    state = solution.solver.state(solution.state.codes, affine)
    return _realised(solution.solver, state, grid, parts, solution.rounds)


def _realised(solver: Parts, state: State, grid: Grid, parts: Sequence[Tensor], rounds: int) -> SolvedWeight:
    """Check the state with the backend's own rounding, row by row, and keep plain rounding where that is better."""
    problem = solver.problem
    shape, dtype = parts[0].shape, parts[0].dtype
    plain = [grid.quantize_dequantize(part.detach()) for part in parts]
    before = problem_errors(problem, _total(plain))
    floats, rounded = [], []
    found_again = torch.ones(shape[0], dtype=torch.bool, device=parts[0].device)
    for part, values in enumerate(solver.values(state.codes, state.affine)):
        scale = solver.affine_of(state.affine, part).scale[:, solver.group_of_column].expand_as(values)
        shifted = solver.grid.with_clipped_ends(state.codes[part], values, scale)
        floats.append(shifted.reshape(shape).to(dtype))
        rounded.append(grid.quantize_dequantize(floats[part]))
        # Neighbouring codes are a whole step apart.
        off = (rounded[part].double().reshape(values.shape) - values).abs() > 0.4 * scale
        found_again &= ~(off | ~torch.isfinite(rounded[part].reshape(values.shape))).any(dim=1)
    take = found_again & (problem_errors(problem, torch.nan_to_num(_total(rounded))) < before)
    if solver.grid.per_tensor:
        after = problem_errors(problem, torch.nan_to_num(_total(rounded)))
        take = (found_again.all() & (after.sum() < before.sum())).expand_as(take)
    mask = take.reshape(-1, *[1] * (len(shape) - 1))
    floats = [torch.where(mask, new, old) for new, old in zip(floats, parts, strict=True)]
    expected = [torch.where(mask, new, old) for new, old in zip(rounded, plain, strict=True)]
    rounded = [grid.quantize_dequantize(part) for part in floats]
    if not all(torch.equal(one, other) for one, other in zip(rounded, expected, strict=True)):
        # Rows influence each other on this grid: all or nothing.
        take = torch.zeros_like(take)
        floats, rounded = [part.detach().clone() for part in parts], plain
    # Where the rounded values round to themselves they are the better floats: the model computes with them already.
    stable = [torch.equal(grid.quantize_dequantize(part), part) for part in rounded]
    floats = [new if same else old for new, old, same in zip(rounded, floats, stable, strict=True)]
    found = float(problem_errors(problem, _total(rounded)).sum())
    return SolvedWeight(floats, rounded, float(before.sum()), found, rounds, int((~take).sum()), solver, state)


def _total(parts: Sequence[Tensor]) -> Tensor:
    return torch.stack([part.double().reshape(len(part), -1) for part in parts]).sum(dim=0)
