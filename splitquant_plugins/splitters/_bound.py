"""How good a split could be: bounds to hold a splitter's error against."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from splitquant_plugins.splitters._joint import rules_of, search
from splitquant_plugins.splitters._shapes import shapes

if TYPE_CHECKING:
    from torch import Tensor

    from splitquant_plugins.grid import Grid


def additive_bound(weight: Tensor, grid: Grid, k: int) -> float:
    """Squared error of the best additive code found: k free codes per weight, k scales and zero points per group.

    Parts need not sum to the weight here, so nothing makes the ranges cover the largest weights. The scales are
    searched, not proven, so this is what a quantizer without the splitter's constraints reaches in practice;
    `free_bound` is below it. Estimated on the search's bins of each group.
    """
    rules = rules_of(shapes(grid))
    return sum(float(search(groups, rules, k, cover=False).error.sum()) for groups in grid.groups(weight))


def free_bound(weight: Tensor, grid: Grid, k: int, rounds: int = 200) -> float:
    """Squared error with as many levels as the k parts have sums, each placed freely, per group of the grid.

    Lloyd's algorithm, started from quantiles and an even grid: a local optimum. A sum of k codes has at most
    that many levels and cannot place them freely.
    """
    qmin, qmax = grid.quant_min, grid.quant_max
    count = (qmax - qmin + 1) ** k
    error = 0.0
    for groups in grid.groups(weight):
        for row in groups.double():
            error += _lloyd(row.sort().values, count, rounds)
    return error


def _lloyd(values: Tensor, count: int, rounds: int) -> float:
    if len(torch.unique(values)) <= count:
        return 0.0
    spread = torch.linspace(0, 1, count // 2, dtype=values.dtype)
    by_rank = values[(spread * (len(values) - 1)).long()]
    by_value = values[0] + torch.linspace(0, 1, count - count // 2, dtype=values.dtype) * (values[-1] - values[0])
    centers = torch.cat([by_rank, by_value]).sort().values
    prefix = torch.nn.functional.pad(values.cumsum(0), (1, 0))
    for _ in range(rounds):
        edge = torch.searchsorted(values, (centers[1:] + centers[:-1]) / 2)
        edge = torch.nn.functional.pad(edge, (1, 0))
        edge = torch.nn.functional.pad(edge, (0, 1), value=len(values))
        number = edge.diff()
        mean = (prefix[edge[1:]] - prefix[edge[:-1]]) / number.clamp(min=1)
        centers = torch.where(number > 0, mean, centers).sort().values
    nearest = centers[torch.searchsorted((centers[1:] + centers[:-1]) / 2, values)]
    return float((values - nearest).square().sum())
