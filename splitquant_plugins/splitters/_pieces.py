"""Work on a tensor group by group, in the groups of its grid."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import torch

from splitquant_plugins.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from splitquant_plugins.grid import Grid
    from splitquant_plugins.plan import TensorPlan

_Grid = TypeVar("_Grid")


def required(grid: _Grid | None, plan: TensorPlan) -> _Grid:
    """The grid, or an error that says why one is needed."""
    if grid is None:
        raise InputError(
            f"{plan.layer}: splitter {plan.splitter!r} chooses parts for the grid they will be rounded to; "
            "put the pass in front of a recipe whose backend describes its grid, or use 'kmeans'"
        )
    return grid


def by_group(tensor: Tensor, grid: Grid, split: Callable[[Tensor], Sequence[Tensor]]) -> list[Tensor]:
    """Apply `split` (2-D groups to k tensors like them) to all groups; groups that are all zero stay zero."""
    pieces: list[list[Tensor]] = []
    for groups in grid.groups(tensor):
        live = (groups != 0).any(dim=1)
        if bool(live.all()) and len(groups):
            pieces.append(list(split(groups)))
            continue
        if not bool(live.any()):
            pieces.append([groups.clone()])
            continue
        parts = []
        for values in split(groups[live]):
            part = torch.zeros_like(groups, dtype=values.dtype)
            part[live] = values
            parts.append(part)
        pieces.append(parts)
    k = max(len(parts) for parts in pieces)
    for parts in pieces:
        parts.extend(torch.zeros_like(parts[0]) for _ in range(k - len(parts)))
    return [grid.from_groups([parts[i] for parts in pieces], tensor.shape) for i in range(k)]
