"""The loop of decoupleQ's layer stage (arXiv 2404.12759): codes, then scales and zeros, then codes again.

A row takes a new answer only if its error falls, so the error never rises.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from splitquant_plugins.decoupleq.parts import Parts, State
from splitquant_plugins.decoupleq.short_rows import searched_codes
from splitquant_plugins.decoupleq.single_scales import alternated
from splitquant_plugins.decoupleq.solver_grid import Affine
from splitquant_plugins.errors import ConfigError

Rounding = Literal["gptq", "projected"]

# Parts of the min-max range that are tried with rounding to nearest: 0.95, 0.9, ... 0.2.
_SHRINKS = tuple(step / 20 for step in range(19, 3, -1))


@dataclass(frozen=True)
class SolveOptions:
    """Options of the layer stage.

    `damping`: part of the mean diagonal of H that is added to its diagonal. `rounding`: `gptq` or the
    paper's `projected` gradient descent (slower; for one part). `rounds`: most alternations per start. `starts`:
    first ranges tried, as factors of the range found by the grid search. `sweeps`: of coordinate descent after
    each rounding, 0 for none, as in the paper. `search_inputs`: rows of at most so many weights, of one part, are
    searched more widely, with single and paired code changes and restarts from random changes (`seed`); 0 for none.
    `tolerance`: part of the rows that must improve for another round.
    """

    damping: float = 0.01
    rounding: Rounding = "gptq"
    rounds: int = 4
    starts: tuple[float, ...] = (1.0, 0.85, 1.2)
    sweeps: int = 4
    search_inputs: int = 10
    tolerance: float = 1e-4
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rounding not in ("gptq", "projected"):
            raise ConfigError(f"rounding={self.rounding!r}: choose gptq or projected")
        if not self.starts or min(self.starts) <= 0:
            raise ConfigError(f"starts={self.starts}: give at least one factor, all above 0")
        for name in ("damping", "rounds", "sweeps", "search_inputs", "tolerance"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name}={getattr(self, name)}: give 0 or a positive number")


def best_state(parts: Parts, options: SolveOptions, near: Affine | None = None) -> tuple[State, list[float]]:
    """The best codes, scales and zeros found, in float64, and the error after every step, which never rises.

    `near`: scales and zeros to begin with, instead of those of the best range found by a search. The first error is
    that of rounding to nearest in the min-max range, or with these. With a free zero only the sum of the parts'
    zeros is determined; the first part carries the offset.
    """
    by_row = parts.single_scales and options.rounding == "gptq"
    best, trace = (_by_row if by_row else _alternated)(parts, options, near)
    short = parts.weight.shape[1] <= options.search_inputs
    if short and parts.k == 1 and parts.grid.granularity == "channel":
        codes = searched_codes(parts.problem, best.codes[0], parts.grid, options.seed)[None]
        best = best.or_better(parts.refitted(parts.state(codes, best.affine)), shared=False)
        trace.append(min(best.total, trace[-1]))
    return best, trace


def _by_row(parts: Parts, options: SolveOptions, near: Affine | None) -> tuple[State, list[float]]:
    """As `_alternated`, for rows with one scale each."""
    ranges = [near] if near is not None else [parts.first(shrink) for shrink in (1.0, *_SHRINKS)]
    codes, affine, trace = alternated(parts.problem, parts.grid, options, ranges)
    return parts.state(codes[None], affine), trace


def _alternated(parts: Parts, options: SolveOptions, near: Affine | None) -> tuple[State, list[float]]:
    shared = parts.grid.per_tensor
    best = parts.nearest(near or parts.first(1.0))
    trace = [best.total]
    for shrink in _SHRINKS if near is None else ():
        best = best.or_better(parts.nearest(parts.first(shrink)), shared)
    trace.append(best.total)
    found = best.affine
    for factor in options.starts:
        current = parts.nearest(Affine(found.scale * factor, found.zero * factor))
        active, rows = parts, torch.arange(len(parts.weight), device=parts.weight.device)
        for _ in range(options.rounds):
            improved = _step(active, current)
            moved = improved.errors < current.errors
            current = improved
            best = (
                best.or_better(current, shared)
                if shared
                else best.put(rows, best.some(rows).or_better(current, shared))
            )
            trace.append(best.total)
            if int(moved.sum()) <= options.tolerance * len(parts.weight):
                break
            if not shared:  # a row that did not improve comes to the same answer again
                active, rows, current = active.some(moved), rows[moved], current.some(moved)
    return best, trace


def _step(parts: Parts, current: State) -> State:
    """New codes, then new scales and zeros, taken where they help."""
    rounded = parts.rounded(current.affine)
    if parts.grid.per_tensor:
        # Codes are a matter of the row even where the scale is not.
        take = rounded.errors < current.errors
        codes = torch.where(take[:, None], rounded.codes, current.codes)
        current = State(codes, current.affine, torch.where(take, rounded.errors, current.errors))
        return current.or_better(parts.refitted(current), shared=True)
    # A row's codes may be worse with the old scale, and better with their own.
    better = current.or_better(rounded, shared=False)
    return better.or_better(parts.refitted(rounded), shared=False)
