"""Residual quantization: every part carries what the parts before it could not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor

from splitquant_plugins.parallel import CHUNK, in_threads
from splitquant_plugins.solvers.rounding_error import round_groups
from splitquant_plugins.splitters._exact import complete
from splitquant_plugins.splitters._pieces import by_group, required
from splitquant_plugins.splitters._residual_search import MinMaxRule, even_fraction, rule_of, search_ranges
from splitquant_plugins.splitters._sketch import sketch, sketch_size
from splitquant_plugins.splitters.base import Splitter, SplitterOptions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from splitquant_plugins.grid import Grid
    from splitquant_plugins.plan import TensorPlan

_FRACTIONS = (1.0, 0.85, 0.7, 0.55, 0.42, 0.3, 0.2, 0.1)
_SKETCH = 256


class ResidualOptions(SplitterOptions):
    """Options of the `residual` splitter.

    `search`: choose each stage's range, a fraction of what is left to carry, for the least final error;
    otherwise every stage spans all of it.
    """

    search: bool = True


class ResidualSplitter(Splitter):
    """P1 = Q(clip(W)), P2 = Q(clip(W - P1)), ...; the last part is the exact remainder."""

    Options: ClassVar[type[SplitterOptions]] = ResidualOptions
    needs_grid: ClassVar[bool] = True

    def split(self, tensor: Tensor, plan: TensorPlan, grid: Grid | None) -> Sequence[Tensor]:
        """Return `plan.k` parts of `tensor`'s shape and dtype.

        Their sum differs from the tensor by at most eps times the last part's magnitude, value by value; see
        `complete`. Raises InputError where there is no grid.
        """
        if plan.k == 1:
            return [tensor]
        grid_, options = required(grid, plan), plan.options
        search = not isinstance(options, ResidualOptions) or options.search

        def split(groups: Tensor) -> Sequence[Tensor]:
            ranges = choose_ranges(groups, grid_, plan.k)[0] if search else full_ranges(groups, plan.k)
            return residual_parts(groups, ranges, grid_)

        targets = by_group(tensor, grid_, split)[:-1]
        return complete(tensor, targets)


@dataclass(frozen=True)
class Ranges:
    """Per group: each stage's range as a fraction of what is left [groups, k - 1], and whether it is kept [groups].

    A stage that keeps its range holds no value outside it; otherwise its values are rounded to whole levels,
    which may lie a fraction of a step outside.
    """

    fraction: Tensor
    kept: Tensor

    def where(self, better: Tensor, other: Ranges) -> Ranges:
        """`other` for the groups in the mask `better`."""
        return Ranges(
            torch.where(better.unsqueeze(1), other.fraction, self.fraction),
            torch.where(better, other.kept, self.kept),
        )


def full_ranges(groups: Tensor, k: int) -> Ranges:
    """Every stage spans all that is left."""
    fraction = torch.ones(len(groups), k - 1, dtype=torch.float64, device=groups.device)
    return Ranges(fraction, torch.zeros(len(groups), dtype=torch.bool, device=groups.device))


def choose_ranges(groups: Tensor, grid: Grid, k: int) -> tuple[Ranges, Tensor]:
    """Ranges of the first k - 1 stages of least error after the last stage, and that error [groups].

    One stage's fraction is varied at a time, from a wide and from a narrow start, and, where the grid has one,
    from that with which the codes of all parts together make even steps: those of a plain grid of k times the
    bits. The error is an estimate on some hundred values per group.
    """
    rule = rule_of(grid)
    return _choose_by_asking(groups, grid, k) if rule is None else _choose_compiled(groups, grid, k, rule)


def _choose_compiled(groups: Tensor, grid: Grid, k: int, rule: MinMaxRule) -> tuple[Ranges, Tensor]:
    even = [even_fraction(rule, k - stage) for stage in range(k - 1)]
    candidates = np.array([[*_FRACTIONS, fraction] for fraction in even])
    starts = np.array([[1.0] * (k - 1), [0.5] * (k - 1), even])
    fraction, kept = np.empty((len(groups), k - 1)), np.empty(len(groups), np.bool_)
    error = np.empty(len(groups))
    likely_kept = not _idempotent(grid, torch.ones(1, dtype=torch.float64))

    def work(rows: slice) -> None:
        values = groups[rows].detach().cpu()
        array = (values if values.dtype == torch.float64 else values.float()).contiguous().numpy()
        search_ranges(
            *(array, rule.array(), candidates, starts, 2 if k > 2 else 1, likely_kept, _SKETCH),
            *(fraction[rows], kept[rows], error[rows]),
        )

    step = max(1, CHUNK // max(1, groups.shape[1]))
    in_threads(work, [slice(at, min(at + step, len(groups))) for at in range(0, len(groups), step)])
    ranges = Ranges(torch.from_numpy(fraction).to(groups.device), torch.from_numpy(kept).to(groups.device))
    return ranges, torch.from_numpy(error).to(groups.device)


def _choose_by_asking(groups: Tensor, grid: Grid, k: int) -> tuple[Ranges, Tensor]:
    """As `_choose_compiled`, for grids that are no simple function of the ends of a range."""
    short = sketch(groups, sketch_size(len(groups), _SKETCH))
    values, counts = short.values, short.counts

    def cost(ranges: Ranges) -> Tensor:
        total = torch.zeros_like(values)
        for part in residual_parts(values, ranges, grid):
            total = total + round_groups(part, grid)
        return (counts * (values - total).square()).sum(dim=1)

    best = full_ranges(groups, k)
    least = cost(best)
    sweeps = [*range(k - 1)] * (2 if k > 2 else 1)
    for kept in (False,) if _idempotent(grid, values) else (False, True):
        for start in (1.0, 0.5):
            now = Ranges(torch.full_like(best.fraction, start), torch.full_like(best.kept, kept))
            error = cost(now)
            for stage in sweeps:
                for fraction in _FRACTIONS:
                    trial = now.fraction.clone()
                    trial[:, stage] = fraction
                    new = Ranges(trial, now.kept)
                    new_error = cost(new)
                    better = new_error < error
                    now, error = now.where(better, new), torch.where(better, new_error, error)
            better = error < least
            best, least = best.where(better, now), torch.where(better, error, least)
    return best, least * groups.double().abs().amax(dim=1).square()


def _idempotent(grid: Grid, like: Tensor) -> bool:
    """Whether rounding a range whose ends are opposite, and rounding the result again, gives the same."""
    once = round_groups(torch.linspace(-1, 1, 65, dtype=like.dtype, device=like.device).unsqueeze(0), grid)
    return torch.allclose(once, round_groups(once, grid), rtol=1e-6, atol=1e-9)


def residual_parts(groups: Tensor, ranges: Ranges, grid: Grid) -> list[Tensor]:
    """Parts of 2-D `groups`, float32 or wider, that sum to the groups."""
    left = groups.to(torch.promote_types(groups.dtype, torch.float32))
    parts = []
    for stage in range(ranges.fraction.shape[1]):
        part = _stage(left, ranges.fraction[:, stage : stage + 1].to(left.dtype), ranges.kept, grid)
        parts.append(part)
        left = left - part
    return [*parts, left]


def _stage(left: Tensor, fraction: Tensor, kept: Tensor, grid: Grid) -> Tensor:
    """Round `left` within a fraction of its range, so that rounding the result again changes little.

    The backend re-derives the scale from the rounded values. Where that would give another grid (PT2E's
    symmetric one does), the part keeps its range: levels outside it are avoided, and the values at the ends
    of the range stay there.
    """
    low, high = left.amin(dim=1, keepdim=True) * fraction, left.amax(dim=1, keepdim=True) * fraction
    clipped = torch.minimum(torch.maximum(left, low), high)
    rounded = round_groups(clipped, grid)
    if not bool(kept.any()):
        return rounded
    scale, _ = grid.qparams(clipped)
    inside = rounded - torch.where(rounded > high, scale, 0.0) + torch.where(rounded < low, scale, 0.0)
    for end in (left.argmin(dim=1, keepdim=True), left.argmax(dim=1, keepdim=True)):
        inside.scatter_(1, end, clipped.gather(1, end))
    return torch.where(kept.unsqueeze(1), inside, rounded)
