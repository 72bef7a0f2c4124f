"""Choice of sums for the least output error, given the second moment of a layer's inputs."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from splitquant_plugins.solvers.gptq import Factor, Levels, descend, feedback
from splitquant_plugins.splitters._joint import levels, realise, rules_for, search

if TYPE_CHECKING:
    from collections.abc import Sequence

    from splitquant_plugins.grid import Grid
    from splitquant_plugins.splitters._shapes import Shape

_DAMPING = 0.01
_SWEEPS = 2


def joint_parts_for_outputs(tensor: Tensor, grid: Grid, found: Sequence[Shape], k: int, moment: Tensor) -> list[Tensor]:
    """As `joint_parts`, but codes are chosen for whole output channels, across the groups of a channel.

    `moment` is H [groups, d, d]; scales are still those of the least error of the weights.
    """
    rules = rules_for(tensor, grid, found)
    pieces = grid.groups(tensor)
    books = [search(groups, rules, k) for groups in pieces]
    each = [levels(rules, one, groups.shape[1]) for groups, one in zip(pieces, books, strict=True)]
    index, offset = [], 0
    for one in each:
        index.append(one.table_of.to(tensor.device) + offset)
        offset += len(one.table)
    low, high = (torch.cat([getattr(one, name) for one in each]) for name in ("low", "high"))
    table_of = grid.from_groups(index, tensor.shape).flatten(1)
    sums = Levels(torch.cat([one.table for one in each]), table_of, low=low, high=high)
    choice = choose(tensor.flatten(1), sums, moment).reshape(tensor.shape)
    made = [
        realise(groups, rules, one, picked.contiguous())
        for groups, one, picked in zip(pieces, books, grid.groups(choice), strict=True)
    ]
    return [grid.from_groups([parts[j] for parts in made], tensor.shape) for j in range(k)]


def choose(weights: Tensor, sums: Levels, moment: Tensor) -> Tensor:
    """Places of sums [rows, d] for `weights` [rows, d] that make tr(E H Eᵀ) small; E is the rounding error.

    `moment` is H [groups, d, d], for even runs of rows. Error feedback (GPTQ, with the columns in their order) and
    then sweeps of coordinate descent; each row keeps what is better, the nearest sums to begin with.
    """
    runs = zip(weights.double().chunk(len(moment)), sums.table_of.chunk(len(moment)), moment.double(), strict=True)
    return torch.cat([_chosen(rows, replace(sums, table_of=index), h) for rows, index, h in runs])


def _chosen(weights: Tensor, sums: Levels, h: Tensor) -> Tensor:
    """As `choose` for rows with the same H."""
    damped = h + torch.eye(len(h), dtype=h.dtype, device=h.device) * h.diagonal().mean().clamp(min=1e-12) * _DAMPING

    def better(places: Tensor, other: Tensor) -> Tensor:
        errors = [sums.values(each).to(weights.device) - weights for each in (places, other)]
        cost, least = (((error @ h) * error).sum(dim=1, keepdim=True) for error in errors)
        return torch.where(cost < least, places, other)

    nearest = sums.nearest(weights)
    best = better(feedback(weights, Factor.of(damped, activation_order=False), sums), nearest)
    return better(descend(weights, damped, best, sums, _SWEEPS), best).long()
