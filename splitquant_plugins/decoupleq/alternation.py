"""The loop of decoupleQ's layer stage (arXiv 2404.12759): codes, then scales and zeros, then codes again.

A row takes a new answer only if its error falls, so the error never rises.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from splitquant_plugins.decoupleq.grids import Affine
from splitquant_plugins.errors import ConfigError

Rounding = Literal["gptq", "projected"]

# Parts of the min-max range that are tried with rounding to nearest: 0.95, 0.9, ... 0.2.
_SHRINKS = tuple(step / 20 for step in range(19, 3, -1))


@dataclass(frozen=True)
class SolveOptions:
    """Options of the layer stage.

    `damping`: part of the mean diagonal of H that is added to its diagonal. `rounding`: `gptq` or the
    paper's `projected` gradient descent (slower). `rounds`: most alternations per start. `starts`: first
    ranges tried, as factors of the range found by the grid search. `sweeps`: of coordinate descent after
    each rounding, 0 for none, as in the paper. `search_inputs`: rows of at most so many weights are searched
    more widely, with single and paired code changes and restarts from random changes (`seed`); 0 for none.
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


@dataclass(frozen=True)
class State:
    """A candidate answer: codes [..., out, d], scales and zeros, and the error of each row [out]."""

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


class Steps(Protocol):
    """What `alternate` needs of a problem; `shared` tells whether all rows have one scale."""

    shared: bool

    def first(self, shrink: float) -> Affine:
        """Scales and zeros for the range of each cell times `shrink`."""

    def nearest(self, affine: Affine) -> State:
        """Rounding to nearest."""

    def rounded(self, affine: Affine) -> State:
        """Codes that take H into account."""

    def refitted(self, state: State) -> State:
        """The same codes with their closed-form scales and zeros; not necessarily better."""


def alternate(steps: Steps, options: SolveOptions) -> tuple[State, list[float]]:
    """The best state found, and the error after every step; the first is that of the min-max range."""
    best = steps.nearest(steps.first(1.0))
    trace = [best.total]
    for shrink in _SHRINKS:
        best = best.or_better(steps.nearest(steps.first(shrink)), steps.shared)
    trace.append(best.total)
    found = best.affine
    for factor in options.starts:
        current = steps.nearest(Affine(found.scale * factor, found.zero * factor))
        for _ in range(options.rounds):
            improved = step(steps, current)
            moved = int((improved.errors < current.errors).sum())
            current = improved
            best = best.or_better(current, steps.shared)
            trace.append(best.total)
            if moved <= options.tolerance * len(current.errors):
                break
    return best, trace


def step(steps: Steps, current: State) -> State:
    """New codes, then new scales and zeros, taken where they help."""
    rounded = steps.rounded(current.affine)
    if steps.shared:
        # Codes are a matter of the row even where the scale is not.
        take = rounded.errors < current.errors
        codes = torch.where(take[:, None], rounded.codes, current.codes)
        current = State(codes, current.affine, torch.where(take, rounded.errors, current.errors))
        return current.or_better(steps.refitted(current), shared=True)
    # A row's codes may be worse with the old scale, and better with their own.
    better = current.or_better(rounded, shared=False)
    return better.or_better(steps.refitted(rounded), shared=False)
