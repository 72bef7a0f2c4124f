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

    def rows(self, index: Tensor) -> Sketch:
        """The sketch of some of the cells."""
        return Sketch(*(getattr(self, name)[index] for name in self.__dataclass_fields__))


def sketch(cells: Tensor, size: int) -> Sketch:
    """Summarise 2-D `cells`, none of them all zero, by at most `size` means of equally many sorted values."""
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
        edges = torch.linspace(0, n, size + 1, device=cells.device).round().long()
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
    """Squared error of rounding every cell to the nearest of its sorted `levels` [cells, L]; [cells]."""
    middle = (levels[:, 1:] + levels[:, :-1]) / 2
    cut = torch.searchsorted(cells.values, middle.contiguous())
    cut = torch.nn.functional.pad(cut, (1, 0))
    cut = torch.nn.functional.pad(cut, (0, 1), value=cells.values.shape[1])
    count = cells.count.gather(1, cut).diff(dim=1)
    total = cells.total.gather(1, cut).diff(dim=1)
    return (cells.square + (levels * (levels * count - 2 * total)).sum(dim=1, keepdim=True)).squeeze(1)
