"""A weight, whole or in parts, solved such that a backend's plain rounding gives exactly the solution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from splitquant_plugins.decoupleq.alternation import SolveOptions, best_state
from splitquant_plugins.decoupleq.coupled_rows import can_be_coupled, coupled_error, with_coupled_rows
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
    rounding by the backend, sum over the rows of e H eᵀ with the damped H, or their coupled error; `error_after`: of
    the solution.
    `rounds`: steps tried. `plain` [out]: rows that keep plain rounding, because the backend would not find the
    solution again, or it is no better. `solver`, `state`: what the later stages go on with.
    """

    floats: list[Tensor]
    rounded: list[Tensor]
    error_before: float
    error_after: float
    rounds: int
    plain: Tensor = field(repr=False)
    solver: Parts = field(repr=False)
    state: State = field(repr=False)

    @property
    def plain_rows(self) -> int:
        """How many rows keep plain rounding."""
        return int(self.plain.sum())

    def tensors(self) -> dict[str, Tensor]:
        """What `restored_weight` needs besides the floats."""
        affine = self.state.affine
        codes = self.state.codes.to(torch.int16)
        return {"codes": codes, "scale": affine.scale, "zero": affine.zero, "plain": self.plain}


def restored_weight(weight: Tensor, floats: list[Tensor], tensors: Mapping[str, Tensor], grid: Grid) -> SolvedWeight:
    """A solution from its floats and `SolvedWeight.tensors`, to be trained; H and the errors are not known any more."""
    missing = [name for name in ("codes", "scale", "zero", "plain") if name not in tensors]
    if missing:
        raise InputError(f"the stored solution lacks {', '.join(missing)}")
    rows = weight.detach().double().reshape(len(weight), -1)
    problem = problem_of(rows, torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device), 0.0)
    solver = Parts(problem, solver_grid(grid, weight.shape), len(floats), SolveOptions())
    state = solver.state(tensors["codes"].double(), Affine(tensors["scale"], tensors["zero"]))
    rounded = [grid.quantize_dequantize(part) for part in floats]
    return SolvedWeight(floats, rounded, 0.0, 0.0, 0, tensors["plain"], solver, state)


def solve_weight(
    weight: Tensor,
    parts: Sequence[Tensor],
    second_moment: Tensor,
    grid: Grid,
    options: SolveOptions | None = None,
    *,
    output_moment: Tensor | None = None,
    name: str = "weight",
) -> SolvedWeight:
    """Solve a weight [out, ...] for `grid`, as one tensor (`parts` holds the weight alone) or as the sum of k.

    `parts` are the float parts that the backend would round plainly. `second_moment`: H, [d, d] with d the product of
    the weight's other dimensions, or [groups, d, d] where consecutive runs of out / groups rows see inputs of their own
    (grouped convolutions); it may be singular or zero. `output_moment`: G [out, out], where errors of the outputs count
    together, see `with_coupled_rows`. Computes in float64; deterministic. Raises InputError (naming
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
        state = with_range_ends(solver, found)
        if output_moment is None or not can_be_coupled(solver):
            return _realised(solver, state, grid, parts, len(trace), None)
        state = with_coupled_rows(solver, state, output_moment)
        return _realised(solver, state, grid, parts, len(trace), output_moment)


@torch.no_grad()
def with_codes(solution: SolvedWeight, grid: Grid, codes: Tensor, affine: Affine) -> SolvedWeight:
    """Other codes [k, out, d], scales and zeros [rows, k * groups], float64.

    Rows that keep plain rounding, or that the backend would not find again, stay as they are. The errors stay those of
    the solution.
    """
    solver = solution.solver
    floats, rounded, found_again = _handed_over(solver, codes, affine, grid, solution.floats[0])
    take = found_again & ~solution.plain
    if solver.grid.per_tensor and not bool(take.all()):
        return solution
    chosen = _chosen(take, (floats, rounded), (solution.floats, solution.rounded), grid)
    if chosen is None:
        return solution
    if not solver.grid.per_tensor:
        codes, affine = (
            torch.where(take[:, None], codes, solution.state.codes),
            affine.where(take, solution.state.affine),
        )
    state = solver.state(codes, affine)
    return replace(solution, floats=chosen[0], rounded=chosen[1], state=state)


def _handed_over(
    solver: Parts, codes: Tensor, affine: Affine, grid: Grid, like: Tensor
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Floats to hand to the backend, what it makes of them, and the rows [out] in which it finds the codes again."""
    floats, rounded = [], []
    found_again = torch.ones(like.shape[0], dtype=torch.bool, device=like.device)
    for part, values in enumerate(solver.values(codes, affine)):
        scale = solver.affine_of(affine, part).scale[:, solver.group_of_column].expand_as(values)
        shifted = solver.grid.with_clipped_ends(codes[part], values, scale)
        floats.append(shifted.reshape(like.shape).to(like.dtype))
        rounded.append(grid.quantize_dequantize(floats[part]))
        # Neighbouring codes are a whole step apart.
        off = (rounded[part].double().reshape(values.shape) - values).abs() > 0.4 * scale
        found_again &= ~(off | ~torch.isfinite(rounded[part].reshape(values.shape))).any(dim=1)
    return floats, rounded, found_again


def _chosen(
    take: Tensor,
    new: tuple[Sequence[Tensor], Sequence[Tensor]],
    old: tuple[Sequence[Tensor], Sequence[Tensor]],
    grid: Grid,
) -> tuple[list[Tensor], list[Tensor]] | None:
    """The new floats and rounded weights in the rows to take, else the old; None where the backend mixes the rows."""
    mask = take.reshape(-1, *[1] * (new[0][0].ndim - 1))
    floats, expected = (
        [torch.where(mask, *pair) for pair in zip(*each, strict=True)] for each in zip(new, old, strict=True)
    )
    rounded = [grid.quantize_dequantize(part) for part in floats]
    if not all(torch.equal(one, other) for one, other in zip(rounded, expected, strict=True)):
        return None
    return _stable(floats, rounded, grid), rounded


def _stable(floats: Sequence[Tensor], rounded: Sequence[Tensor], grid: Grid) -> list[Tensor]:
    """The rounded values where they round to themselves: the better floats, the model computes with them already."""
    same = [torch.equal(grid.quantize_dequantize(part), part) for part in rounded]
    return [new if stays else old for new, old, stays in zip(rounded, floats, same, strict=True)]


def _realised(
    solver: Parts, state: State, grid: Grid, parts: Sequence[Tensor], rounds: int, output_moment: Tensor | None
) -> SolvedWeight:
    """Check the state with the backend's own rounding, and keep plain rounding where that is better.

    Row by row; coupled rows, of which one makes up for another's error, all or none.
    """
    problem = solver.problem
    plain = [grid.quantize_dequantize(part.detach()) for part in parts]
    before = problem_errors(problem, _total(plain))
    floats, rounded, found_again = _handed_over(solver, state.codes, state.affine, grid, parts[0])
    after = problem_errors(problem, torch.nan_to_num(_total(rounded)))
    take = found_again & (after < before)
    if output_moment is not None:
        solved = torch.where(found_again[:, None], _total(rounded), _total(plain))
        errors = [coupled_error(solver, values, output_moment) for values in (solved, _total(plain))]
        take = found_again if errors[0] < errors[1] else torch.zeros_like(found_again)
    if solver.grid.per_tensor:
        take = (found_again.all() & (after.sum() < before.sum())).expand_as(take)
    chosen = _chosen(take, (floats, rounded), (list(parts), plain), grid)
    if chosen is None:
        # Rows influence each other on this grid: all or nothing.
        take = torch.zeros_like(take)
        chosen = _stable([part.detach().clone() for part in parts], plain, grid), plain
    floats, rounded = chosen
    if output_moment is None:
        found, begun = float(problem_errors(problem, _total(rounded)).sum()), float(before.sum())
    else:
        found, begun = (coupled_error(solver, _total(each), output_moment) for each in (rounded, plain))
    return SolvedWeight(floats, rounded, begun, found, rounds, ~take, solver, state)


def _total(parts: Sequence[Tensor]) -> Tensor:
    return torch.stack([part.double().reshape(len(part), -1) for part in parts]).sum(dim=0)
