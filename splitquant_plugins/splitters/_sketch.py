"""A short, sorted summary of every cell, on which many candidate codebooks can be priced quickly."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_SAMPLE = 1 << 18


@dataclass(frozen=True)
class Sketch:
    """Cells as at most m sorted values with counts; float64, each cell divided by its largest magnitude.

    `values` [cells, m]; `count` and `total` [cells, m + 1] are prefix sums of counts and of values times
    counts; `square` [cells, 1] is the sum of squares. `low` and `high` [cells, 1] are the exact extremes.
    """

    values: Tensor
    count: Tensor
    total: Tensor
    square: Tensor
    low: Tensor
    high: Tensor

    @property
    def counts(self) -> Tensor:
        """How many values of the cell each of `values` stands for, [cells, m]."""
        return self.count.diff(dim=1)

    def rows(self, index: Tensor | slice) -> Sketch:
        """The sketch of some of the cells."""
        return Sketch(*(getattr(self, name)[index] for name in self.__dataclass_fields__))


def sketch(cells: Tensor, size: int) -> Sketch:
    """Summarise 2-D `cells`, none of them all zero, by at most `size` means of equally many sorted values.

    The smallest and the largest value of a cell stay as they are. Cells too large to sort are sampled evenly.
    """
    cells = cells.double() / cells.abs().amax(dim=1, keepdim=True).double()
    low = cells.amin(dim=1, keepdim=True).clamp(max=0)
    high = cells.amax(dim=1, keepdim=True).clamp(min=0)
    limit = max(size, _SAMPLE // cells.shape[0])
    if cells.shape[1] > limit:
        stride = -(-cells.shape[1] // limit)
        ends = torch.cat([cells.amin(1, True), cells.amax(1, True)], dim=1)
        cells = torch.cat([cells[:, ::stride], ends], dim=1)
    values = cells.sort(dim=1).values
    n = values.shape[1]
    if n > size:
        inner = torch.linspace(1, n - 1, size - 1, device=cells.device, dtype=torch.float64).round().long()
        edges = torch.cat([inner.new_zeros(1), inner, inner.new_full((1,), n)])
        prefix = torch.nn.functional.pad(values.cumsum(dim=1), (1, 0))
        counts = (edges[1:] - edges[:-1]).double().expand(len(values), -1)
        values = (prefix[:, edges[1:]] - prefix[:, edges[:-1]]) / counts
    else:
        counts = torch.ones_like(values)
    return Sketch(
        values.contiguous(),
        torch.nn.functional.pad(counts.cumsum(dim=1), (1, 0)),
        torch.nn.functional.pad((counts * values).cumsum(dim=1), (1, 0)),
        (counts * values.square()).sum(dim=1, keepdim=True),
        low,
        high,
    )


def price(levels: Tensor, cells: Sketch) -> Tensor:
    """Squared error of rounding cells to the nearest of their sorted `levels` [codebooks, L]; [codebooks].

    Codebook i is priced on cell i, or all of them on the one cell that there is.
    """
    middle = ((levels[:, 1:] + levels[:, :-1]) / 2).contiguous()
    single = len(cells.values) == 1
    cut = torch.searchsorted(cells.values[0] if single else cells.values, middle)
    cut = torch.nn.functional.pad(cut, (1, 0))
    cut = torch.nn.functional.pad(cut, (0, 1), value=cells.values.shape[1])
    count = (cells.count[0][cut] if single else cells.count.gather(1, cut)).diff(dim=1)
    total = (cells.total[0][cut] if single else cells.total.gather(1, cut)).diff(dim=1)
    return (cells.square + (levels * (levels * count - 2 * total)).sum(dim=1, keepdim=True)).squeeze(1)


def sketch_size(cells: int, small: int, large: int = 8192) -> int:
    """Values per cell that keep a sketch of this many cells at hand: few for many cells, many for a few."""
    return min(large, max(small, (1 << 17) // max(cells, 1)))
