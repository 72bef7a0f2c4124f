"""Disjoint value ranges, as k-means makes them, but with boundaries chosen for the true rounding error."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from splitquant_plugins.splitters._pieces import by_group, required
from splitquant_plugins.splitters._sketch import Sketch, sketch, sketch_size
from splitquant_plugins.splitters.base import Splitter

if TYPE_CHECKING:
    from collections.abc import Sequence

    from splitquant_plugins.grid import Grid
    from splitquant_plugins.plan import TensorPlan

_SKETCH = 512
_EDGES = 10  # candidate boundaries by rank, and as many by value
_EXACT_BITS = 3  # beyond, an interval's error is its count times scale**2 / 12
_CHUNK = 1 << 22


class RangeSplitter(Splitter):
    """Each part keeps the weights of one value range; the others are zero there."""

    needs_grid: ClassVar[bool] = True

    def split(self, tensor: Tensor, plan: TensorPlan, grid: Grid | None) -> Sequence[Tensor]:
        """Return `plan.k` parts with disjoint supports that sum to `tensor` bit for bit.

        Boundaries are chosen per group of the grid, whatever `plan.granularity` says: what shares a scale is
        what they have to suit.
        """
        if plan.k == 1:
            return [tensor]
        grid_ = required(grid, plan)

        def split(groups: Tensor) -> Sequence[Tensor]:
            return range_parts(groups, choose_cuts(groups, grid_, plan.k)[0])

        return by_group(tensor, grid_, split)


def choose_cuts(groups: Tensor, grid: Grid, k: int) -> tuple[Tensor, Tensor]:
    """Ascending boundaries [groups, k - 1] of least rounding error for 2-D `groups`, and that error [groups].

    Dynamic programming over candidate boundaries, first coarse, then all boundaries near the coarse ones.
    The error is an estimate on a sketch of some hundred values per group.
    """
    peak = groups.double().abs().amax(dim=1)
    short = sketch(groups, sketch_size(len(groups), _SKETCH))
    step = max(1, _CHUNK // ((2 * _EDGES + 2) ** 2 * 2 ** min(grid.bits, _EXACT_BITS)))
    cuts, errors = [], []
    for top in range(0, len(groups), step):
        index = torch.arange(top, min(top + step, len(groups)), device=groups.device)
        cut, error = _cuts(short.rows(index), grid, k)
        cuts.append(cut)
        errors.append(error)
    return torch.cat(cuts) * peak.unsqueeze(1), torch.cat(errors) * peak.square()


def range_parts(groups: Tensor, cuts: Tensor) -> list[Tensor]:
    """Parts of 2-D `groups` with the values up to cut 1, between cuts 1 and 2, ..., above the last."""
    side = torch.searchsorted(cuts.contiguous(), groups.double().contiguous())
    return [torch.where(side == part, groups, torch.zeros_like(groups)) for part in range(cuts.shape[1] + 1)]


def _cuts(short: Sketch, grid: Grid, k: int) -> tuple[Tensor, Tensor]:
    m = short.values.shape[1]
    device = short.values.device
    ranks = torch.linspace(0, m, _EDGES + 1, device=device).round().long().expand(len(short.values), -1)
    even = torch.linspace(0, 1, _EDGES + 1, device=device, dtype=torch.float64)
    places = short.values[:, :1] + even * (short.values[:, -1:] - short.values[:, :1])
    by_value = torch.searchsorted(short.values, places[:, 1:-1].contiguous())
    chosen, error = _program(torch.cat([ranks, by_value], dim=1).sort(dim=1).values, short, grid, k)
    reach = max(1, _EDGES // (k - 1))
    nearby = torch.arange(-reach, reach + 1, device=device)
    ends = torch.tensor([0, m], device=device).expand(len(chosen), -1)
    local = (chosen.unsqueeze(2) + nearby).flatten(1).clamp(0, m)
    chosen, error = _program(torch.cat([local, ends], dim=1).sort(dim=1).values, short, grid, k)
    left = short.values.gather(1, (chosen - 1).clamp(min=0))
    right = short.values.gather(1, chosen.clamp(max=m - 1))
    return (left + right) / 2, error


def _program(edges: Tensor, short: Sketch, grid: Grid, k: int) -> tuple[Tensor, Tensor]:
    """Best k - 1 of the candidate `edges` (ranks, ascending, from 0 to m) and the error of the k ranges."""
    cost = _interval_cost(edges, short, grid)
    number = edges.shape[1]
    best = cost[:, 0]  # error of the values below each edge
    back = []
    for _ in range(k - 1):
        best, start = (best.unsqueeze(2) + cost).min(dim=1)
        back.append(start)
    at = torch.full((len(edges), 1), number - 1, device=edges.device)
    error = best.gather(1, at).squeeze(1)
    cuts = []
    for start in reversed(back):
        at = start.gather(1, at)
        cuts.append(edges.gather(1, at))
    return torch.cat(cuts[::-1], dim=1), error


def _interval_cost(edges: Tensor, short: Sketch, grid: Grid) -> Tensor:
    """Error of rounding the values from rank edges[i] to rank edges[j] as one part, [groups, i, j]."""
    groups, number = edges.shape
    m = short.values.shape[1]
    i, j = torch.triu_indices(number, number, device=edges.device)
    first, last = edges[:, i], edges[:, j]
    low = short.values.gather(1, first.clamp(max=m - 1))
    high = short.values.gather(1, (last - 1).clamp(min=0))
    scale, zero_point = grid.qparams(torch.stack([low, high], dim=2).flatten(0, 1))
    scale, zero_point = scale.reshape(groups, -1), zero_point.reshape(groups, -1).to(scale)
    if grid.bits > _EXACT_BITS:
        error = (short.count.gather(1, last) - short.count.gather(1, first)) * scale.square() / 12
    else:
        qmin, qmax = grid.quant_min, grid.quant_max
        codes = torch.arange(qmin, qmax + 1, device=edges.device) - zero_point.unsqueeze(2)
        levels = codes * scale.unsqueeze(2)
        middle = (levels[..., 1:] + levels[..., :-1]) / 2
        cut = torch.searchsorted(short.values, middle.flatten(1)).reshape(middle.shape)
        cut = torch.cat([first.unsqueeze(2), cut, last.unsqueeze(2)], dim=2)
        cut = torch.minimum(torch.maximum(cut, first.unsqueeze(2)), last.unsqueeze(2))
        flat = cut.flatten(1)
        count = short.count.gather(1, flat).reshape(cut.shape).diff(dim=2)
        total = short.total.gather(1, flat).reshape(cut.shape).diff(dim=2)
        square = torch.nn.functional.pad((short.counts * short.values.square()).cumsum(dim=1), (1, 0))
        error = square.gather(1, last) - square.gather(1, first)
        error = error + (levels * (levels * count - 2 * total)).sum(dim=2)
    out = torch.full((groups, number, number), torch.inf, dtype=error.dtype, device=edges.device)
    out[:, i, j] = torch.where(first == last, torch.zeros_like(error), error)
    return out
