"""Clipped weights: the range of every group shrunk to where rounding leaves the least error of the weights.

A grid of few levels that spans a group's few largest weights rounds all others coarsely. Cutting those off costs them,
and gains for the others: the range of least mean square error is that of OCS (arXiv 1901.09504) and ACIQ (arXiv
1810.05723). The clipped weight has the new range as its minimum and maximum, so that a backend that takes its range
from these finds it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from splitquant_plugins.grid import Grid


# Parts of a range that are tried: for both ends together, then for each by itself.
SHRINKS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
# Then, for each end, factors of the best part so far.
REFINEMENTS = (1.1, 1.05, 0.95, 0.9)
# A smaller gain, relative to the error, is the rounding of a sum.
_GAIN = 1e-6


@dataclass(frozen=True)
class Clipped:
    """A clipped weight, with the squared error that rounding leaves of the weight before and after, for each group."""

    weight: Tensor
    error_before: Tensor
    error_after: Tensor


@torch.no_grad()
def clip_to_grid(weight: Tensor, grid: Grid) -> Clipped:
    """Clip a weight, output channels first, to the ranges that leave the least error on the grid.

    A group for which no range is better than its own stays as it is, so that no group's error grows.
    """
    search = _Search(weight, grid)
    before = search.error
    for shrink in SHRINKS:
        search.attempt(shrink, shrink)
    for low_moves, high_moves in ((True, True),) if grid.scheme == "symmetric" else ((True, False), (False, True)) * 2:
        fixed = search.best
        for shrink in SHRINKS if low_moves != high_moves else ():
            search.attempt(shrink if low_moves else fixed[0], shrink if high_moves else fixed[1])
        for factor in REFINEMENTS:
            low, high = search.scaled(factor)
            search.attempt(low if low_moves else fixed[0], high if high_moves else fixed[1])
    return Clipped(search.clipped(*search.best), before, search.error)


class _Search:
    """The best ends of each group's range so far, as parts of its own ends, and the error that they leave.

    `best` has, for either end, a column of parts for each of the tensors that the grid cuts the weight into.
    """

    def __init__(self, weight: Tensor, grid: Grid) -> None:
        self.weight = weight
        self.grid = grid
        self.groups = grid.groups(weight)
        self.low = [each.amin(dim=1, keepdim=True).clamp(max=0) for each in self.groups]
        self.high = [each.amax(dim=1, keepdim=True).clamp(min=0) for each in self.groups]
        if grid.scheme == "symmetric":
            self.high = [torch.maximum(high, -low) for low, high in zip(self.low, self.high, strict=True)]
            self.low = [-high for high in self.high]
        ones = [torch.ones_like(low) for low in self.low]
        self.best = (ones, ones)
        self.error = self._error(weight)

    def scaled(self, factor: float) -> tuple[list[Tensor], list[Tensor]]:
        """The best parts of both ends times a factor; none is beyond the group's own end."""
        low, high = ([(factor * part).clamp(max=1) for part in parts] for parts in self.best)
        return low, high

    def clipped(self, low: Sequence[Tensor], high: Sequence[Tensor]) -> Tensor:
        """The weight clipped to these parts of the ends of each group."""
        ends = zip(self.groups, self.low, low, self.high, high, strict=True)
        found = [torch.clamp(values, bottom * first, top * last) for values, bottom, first, top, last in ends]
        return self.grid.from_groups(found, self.weight.shape)

    def attempt(self, low: Sequence[Tensor] | float, high: Sequence[Tensor] | float) -> None:
        """Take these parts of the ends for the groups for which they are better than the best so far."""
        new = [
            [torch.full_like(one, parts) for one in self.low] if isinstance(parts, float) else parts
            for parts in (low, high)
        ]
        error = self._error(self.clipped(*new))
        better = error < self.error * (1 - _GAIN)
        self.error = torch.where(better, error, self.error)
        masks = torch.split(better[:, None], [len(each) for each in self.groups])
        low_parts, high_parts = (
            [torch.where(mask, one, known) for mask, one, known in zip(masks, tried, old, strict=True)]
            for tried, old in zip(new, self.best, strict=True)
        )
        self.best = (low_parts, high_parts)

    def _error(self, clipped: Tensor) -> Tensor:
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        error = self.grid.quantize_dequantize(clipped).to(wide) - self.weight.to(wide)
        return torch.cat([each.square().sum(dim=1, dtype=torch.float64) for each in self.grid.groups(error)])
