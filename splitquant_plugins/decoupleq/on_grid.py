"""A weight, whole or in parts, solved such that a backend's plain rounding gives exactly the solution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from splitquant_plugins.decoupleq.alternation import SolveOptions, State, alternate
from splitquant_plugins.decoupleq.backend_grid import Target, target_of
from splitquant_plugins.decoupleq.ends import with_ends
from splitquant_plugins.decoupleq.grids import Affine
from splitquant_plugins.decoupleq.joint import Parts, most_parts
from splitquant_plugins.decoupleq.objective import Rows, problem_errors, problem_of
from splitquant_plugins.decoupleq.solve import best_state
from splitquant_plugins.errors import ConfigError, InputError

if TYPE_CHECKING:
    from splitquant_plugins.grid import Grid


@dataclass(frozen=True)
class GridSolution:
    """The k parts of a weight, on a backend's grid; lists hold a tensor per part, of the weight's shape and dtype.

    `floats`: what to hand to the backend. `rounded`: what it makes of them, to the bit. `error_before`: of plain
    rounding by the backend, sum over the rows of e H eᵀ with the damped H; `error_after`: of the solution.
    `rounds`: steps tried. `plain_rows`: rows that keep plain rounding, because the backend would not find the
    solution again, or it is no better. `state`, `target`, `problem`: what the block stage goes on with.
    """

    floats: list[Tensor]
    rounded: list[Tensor]
    error_before: float
    error_after: float
    rounds: int
    plain_rows: int
    state: State = field(repr=False)
    target: Target = field(repr=False)
    problem: Sequence[Rows] = field(repr=False)


def solve_on_grid(
    weight: Tensor,
    parts: Sequence[Tensor],
    second_moment: Tensor,
    grid: Grid,
    options: SolveOptions | None = None,
    *,
    name: str = "weight",
) -> GridSolution:
    """Solve a weight [out, ...] for `grid`, as one tensor (`parts` holds the weight alone) or as the sum of k.

    `parts` are the float parts that the backend would round plainly. `second_moment` is as in `solve_layer`, with d
    the product of the weight's other dimensions. Computes in float64; deterministic. Raises InputError (naming
    `name`) for NaN, infinity or shapes that do not fit, ConfigError where the codes of k parts form too many sums.
    """
    options = options or SolveOptions()
    target = target_of(grid, weight.shape)
    if len(parts) > 1 and len(parts) > most_parts(target.values):
        raise ConfigError(
            f"{name}: {len(parts)} parts of {target.values.bits} bits have too many sums to be solved together; "
            f"take at most {most_parts(target.values)} parts, or fewer bits"
        )
    try:
        problem = problem_of(weight.detach().reshape(len(weight), -1), second_moment, options.damping)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    with torch.no_grad():
        steps = Parts(problem, target.values, len(parts), options.sweeps)
        if len(parts) == 1:
            found, trace = best_state(problem, target.values, options)
            found = State(found.codes[None], found.affine, found.errors)
        else:
            found, trace = alternate(steps, options)
        state = with_ends(steps, found, target)
        return _realised(steps, state, target, parts, len(trace))


@torch.no_grad()
def with_affine(solution: GridSolution, parts: Sequence[Tensor], affine: Affine) -> GridSolution:
    """The same codes with other scales and zeros, each [rows, k * cells], float64."""
    steps = Parts(solution.problem, solution.target.values, len(parts), 0)
    return _realised(steps, steps.state(solution.state.codes, affine), solution.target, parts, solution.rounds)


def _realised(steps: Parts, state: State, target: Target, parts: Sequence[Tensor], rounds: int) -> GridSolution:
    """Check the state with the backend's own rounding, row by row, and keep plain rounding where that is better."""
    grid, problem = target.grid, steps.problem
    shape, dtype = parts[0].shape, parts[0].dtype
    plain = [grid.quantize_dequantize(part.detach()) for part in parts]
    before = problem_errors(problem, _total(plain))
    floats, rounded = [], []
    found_again = torch.ones(shape[0], dtype=torch.bool, device=parts[0].device)
    for part in range(len(parts)):
        affine = steps.affine_of(state.affine, part)
        values = affine.values(state.codes[part], steps.cells)
        scale = affine.scale[:, steps.cells].expand_as(values)
        floats.append(target.floats(state.codes[part], values, scale).reshape(shape).to(dtype))
        rounded.append(grid.quantize_dequantize(floats[part]))
        # Neighbouring codes are a whole step apart.
        off = (rounded[part].double().reshape(values.shape) - values).abs() > 0.4 * scale
        found_again &= ~(off | ~torch.isfinite(rounded[part].reshape(values.shape))).any(dim=1)
    take = found_again & (problem_errors(problem, torch.nan_to_num(_total(rounded))) < before)
    if steps.shared:
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
    return GridSolution(floats, rounded, float(before.sum()), found, rounds, int((~take).sum()), state, target, problem)


def _total(parts: Sequence[Tensor]) -> Tensor:
    return torch.stack([part.double().reshape(len(part), -1) for part in parts]).sum(dim=0)
