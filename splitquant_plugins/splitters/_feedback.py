"""Choice of sums for the least output error, given the second moment of a layer's inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from splitquant_plugins.splitters._realise import Levels

_BLOCK = 128
_DAMPING = 0.01


def choose(weights: Tensor, cell: Tensor, sums: Levels, moment: Tensor, start: Tensor) -> Tensor:
    """Indices of sums [rows, d] for `weights` [rows, d] that make tr(E H Eᵀ) small; E is the rounding error.

    `cell` [rows, d] says which row of `sums` belongs to a weight, `moment` is H [groups, d, d], `start`
    the nearest sums. Error feedback (GPTQ, arXiv 2210.17323, with the columns in their order) and then two
    sweeps of coordinate descent; each row keeps what is better. Only sums that the weight can stand for
    are taken.
    """
    groups = len(moment)
    per_group = len(weights) // groups
    out = start.clone()
    for group in range(groups):
        rows = slice(group * per_group, (group + 1) * per_group)
        h = moment[group].to(weights.dtype)
        out[rows] = _choose(weights[rows], cell[rows], sums, h, start[rows])
    return out


def _choose(weights: Tensor, cell: Tensor, sums: Levels, h: Tensor, start: Tensor) -> Tensor:
    damped = h + torch.eye(len(h), dtype=h.dtype, device=h.device) * h.diagonal().mean().clamp(min=1e-12) * _DAMPING
    fed = _error_feedback(weights, cell, sums, damped)
    better = _cost(weights, cell, sums, h, fed) < _cost(weights, cell, sums, h, start)
    choice = torch.where(better.unsqueeze(1), fed, start)
    for _ in range(2):
        choice = _descend(weights, cell, sums, damped, choice)
    better = _cost(weights, cell, sums, h, choice) < _cost(weights, cell, sums, h, start)
    return torch.where(better.unsqueeze(1), choice, start)


def _value(cell: Tensor, sums: Levels, choice: Tensor, dtype: torch.dtype) -> Tensor:
    width = sums.value.shape[1]
    return sums.value.flatten()[cell * width + choice].to(dtype)


def _cost(weights: Tensor, cell: Tensor, sums: Levels, h: Tensor, choice: Tensor) -> Tensor:
    error = weights - _value(cell, sums, choice, weights.dtype)
    return ((error @ h) * error).sum(dim=1)


def _pick(target: Tensor, weights: Tensor, cell: Tensor, sums: Levels) -> Tensor:
    """The sum nearest to each target, among those that the weight can stand for; 1-D."""
    one = len(sums.value) == 1
    value, low, high = (table if one else table[cell] for table in (sums.value, sums.low, sums.high))
    weights = weights.unsqueeze(1)
    distance = (value.to(target.dtype) - target.unsqueeze(1)).abs()
    return distance.masked_fill((weights < low) | (weights > high), torch.inf).argmin(dim=1)


def _error_feedback(weights: Tensor, cell: Tensor, sums: Levels, h: Tensor) -> Tensor:
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h.double()))
    upper = torch.linalg.cholesky(inverse, upper=True).to(weights.dtype)
    target = weights.clone()
    choice = torch.zeros_like(cell)
    d = weights.shape[1]
    for left in range(0, d, _BLOCK):
        right = min(left + _BLOCK, d)
        scaled = torch.zeros_like(target[:, left:right])
        for i in range(left, right):
            picked = _pick(target[:, i], weights[:, i], cell[:, i], sums)
            choice[:, i] = picked
            error = (target[:, i] - _value(cell[:, i], sums, picked, weights.dtype)) / upper[i, i]
            target[:, i + 1 : right] -= error.unsqueeze(1) * upper[i, i + 1 : right]
            scaled[:, i - left] = error
        target[:, right:] -= scaled @ upper[left:right, right:]
    return choice


def _descend(weights: Tensor, cell: Tensor, sums: Levels, h: Tensor, choice: Tensor) -> Tensor:
    """Move one column at a time to the sum that is best given all the others."""
    choice = choice.clone()
    rounded = _value(cell, sums, choice, weights.dtype)
    gradient = (weights - rounded) @ h
    d = weights.shape[1]
    for left in range(0, d, _BLOCK):
        right = min(left + _BLOCK, d)
        before = rounded[:, left:right].clone()
        for i in range(left, right):
            target = rounded[:, i] + gradient[:, i] / h[i, i]
            picked = _pick(target, weights[:, i], cell[:, i], sums)
            new = _value(cell[:, i], sums, picked, weights.dtype)
            moved = new - rounded[:, i]
            choice[:, i] = picked
            rounded[:, i] = new
            gradient[:, i:right] -= moved.unsqueeze(1) * h[i, i:right]
        # the columns to the right see the whole block's change at once
        gradient[:, right:] -= (rounded[:, left:right] - before) @ h[left:right, right:]
    return choice
