"""A short, sorted summary of every group, on which many candidate codebooks can be priced quickly."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_SAMPLE = 1 << 18


@dataclass(frozen=True)
class Sketch:
    """Groups as at most m sorted values with counts; float64, each group divided by its largest magnitude.

    `values` [groups, m]; `count` and `total` [groups, m + 1] are prefix sums of counts and of values times
    counts; `square` [groups, 1] is the sum of squares. `low` and `high` [groups, 1] are the exact extremes.
    """

    values: Tensor
    count: Tensor
    total: Tensor
    square: Tensor
    low: Tensor
    high: Tensor

    @property
    def counts(self) -> Tensor:
        """How many values of the group each of `values` stands for, [groups, m]."""
        return self.count.diff(dim=1)

    def rows(self, index: Tensor | slice) -> Sketch:
        """The sketch of some of the groups."""
        return Sketch(*(getattr(self, name)[index] for name in self.__dataclass_fields__))


def sketch(groups: Tensor, size: int) -> Sketch:
    """Summarise 2-D `groups`, none of them all zero, by at most `size` means of equally many sorted values.

    The smallest and the largest value of a group stay as they are. Groups too large to sort are sampled evenly.
    """
    groups = groups.double() / groups.abs().amax(dim=1, keepdim=True).double()
    low = groups.amin(dim=1, keepdim=True).clamp(max=0)
    high = groups.amax(dim=1, keepdim=True).clamp(min=0)
    limit = max(size, _SAMPLE // groups.shape[0])
    if groups.shape[1] > limit:
        stride = -(-groups.shape[1] // limit)
        ends = torch.cat([groups.amin(1, True), groups.amax(1, True)], dim=1)
        groups = torch.cat([groups[:, ::stride], ends], dim=1)
    values = groups.sort(dim=1).values
    n = values.shape[1]
    if n > size:
        inner = torch.linspace(1, n - 1, size - 1, device=groups.device, dtype=torch.float64).round().long()
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


def price(levels: Tensor, groups: Sketch) -> Tensor:
    """Squared error of rounding groups to the nearest of their sorted `levels` [codebooks, L]; [codebooks].

    Codebook i is priced on group i, or all of them on the one group that there is.
    """
    middle = ((levels[:, 1:] + levels[:, :-1]) / 2).contiguous()
    single = len(groups.values) == 1
    cut = torch.searchsorted(groups.values[0] if single else groups.values, middle)
    cut = torch.nn.functional.pad(cut, (1, 0))
    cut = torch.nn.functional.pad(cut, (0, 1), value=groups.values.shape[1])
    count = (groups.count[0][cut] if single else groups.count.gather(1, cut)).diff(dim=1)
    total = (groups.total[0][cut] if single else groups.total.gather(1, cut)).diff(dim=1)
    return (groups.square + (levels * (levels * count - 2 * total)).sum(dim=1, keepdim=True)).squeeze(1)


def sketch_size(groups: int, small: int, large: int = 8192) -> int:
    """Values per group that keep a sketch of this many groups at hand: few for many groups, many for a few."""
    return min(large, max(small, (1 << 17) // max(groups, 1)))
