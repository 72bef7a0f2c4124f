"""Choice of sums for the least output error, given the second moment of a layer's inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from splitquant_plugins.solvers.gptq import Where, descend, feedback_codes
from splitquant_plugins.splitters._joint import Codebooks, Levels, levels, nearest, realise, rules_for, search

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
    wide = torch.promote_types(tensor.dtype, torch.float32)
    pieces = [groups.to(wide) for groups in grid.groups(tensor)]
    books: list[Codebooks] = [search(groups, rules, k) for groups in pieces]
    tables = [levels(rules, one) for one in books]
    sums = Levels(*(torch.cat([getattr(table, name) for table in tables]) for name in ("value", "low", "high")))
    offset, group, start = 0, [], []
    for groups, table in zip(pieces, tables, strict=True):
        index = torch.arange(len(groups), device=groups.device).unsqueeze(1) + offset
        group.append(index.expand_as(groups))
        start.append(nearest(groups, table))
        offset += len(groups)
    rows = tensor.shape[0]
    joined = [grid.from_groups(values, tensor.shape).reshape(rows, -1) for values in (pieces, group, start)]
    choice = choose(joined[0], joined[1], sums, moment, joined[2]).reshape(tensor.shape)
    made = [
        realise(groups, rules, one, picked.contiguous())
        for groups, one, picked in zip(grid.groups(tensor), books, grid.groups(choice), strict=True)
    ]
    return [grid.from_groups([parts[j] for parts in made], tensor.shape) for j in range(k)]


def choose(weights: Tensor, group: Tensor, sums: Levels, moment: Tensor, start: Tensor) -> Tensor:
    """Indices of sums [rows, d] for `weights` [rows, d] that make tr(E H Eᵀ) small; E is the rounding error.

    `group` [rows, d] says which row of `sums` belongs to a weight, `moment` is H [groups, d, d], `start`
    the nearest sums. Error feedback (GPTQ, with the columns in their order) and then two sweeps of coordinate
    descent; each row keeps what is better. Only sums that the weight can stand for are taken.
    """
    pieces = [each.chunk(len(moment)) for each in (weights, group, start)]
    chosen = [
        _choose(one.T, _SumLevels(sums, index.T, one.T), h.to(weights.dtype), nearest.T)
        for one, index, nearest, h in zip(*pieces, moment, strict=True)
    ]
    return torch.cat(chosen, dim=1).T


def _choose(weights: Tensor, sums: _SumLevels, h: Tensor, start: Tensor) -> Tensor:
    """As `choose` for rows with the same H, all of it [d, rows]."""
    damped = h + torch.eye(len(h), dtype=h.dtype, device=h.device) * h.diagonal().mean().clamp(min=1e-12) * _DAMPING
    fed = feedback_codes(weights, damped, sums, activation_order=False).long()
    least = _cost(weights, sums, h, start)
    choice = torch.where(_cost(weights, sums, h, fed) < least, fed, start)
    choice = descend(weights, damped, choice, sums, _SWEEPS, every_column=True)
    return torch.where(_cost(weights, sums, h, choice) < least, choice, start)


def _cost(weights: Tensor, sums: _SumLevels, h: Tensor, choice: Tensor) -> Tensor:
    error = (weights - sums.values(choice, slice(None))).T
    return ((error @ h) * error).sum(dim=1)


@dataclass(frozen=True)
class _SumLevels:
    """The sums that each weight can stand for, as `gptq.Levels`; a code is the index of a sum.

    `group`, `weights`: [d, rows]; `group` says which row of `sums` belongs to a weight.
    """

    sums: Levels
    group: Tensor
    weights: Tensor

    def nearest(self, target: Tensor, where: Where) -> Tensor:
        """Index of the sum nearest to each target of one column, among those that the weight can stand for; [rows]."""
        index = slice(None) if len(self.sums.value) == 1 else self.group[where]
        value, low, high = (table[index] for table in (self.sums.value, self.sums.low, self.sums.high))
        weights = self.weights[where].unsqueeze(1)
        distance = (value.to(target.dtype) - target.unsqueeze(1)).abs()
        return distance.masked_fill((weights < low) | (weights > high), torch.inf).argmin(dim=1)

    def values(self, codes: Tensor, where: Where) -> Tensor:
        """The sums of these indices."""
        return self.sums.value[self.group[where], codes.long()].to(self.weights.dtype)
