"""Codes by projected gradient descent, decoupleQ's own way of rounding (arXiv 2404.12759, section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from splitquant_plugins.solvers.gptq import Levels

_RUN = 16


def projected_codes(
    target: Tensor, moment: Tensor, levels: Levels, *, steps: int = 100, inner_steps: int = 5
) -> Tensor:
    """Relax the codes, of evenly spaced levels, to real numbers in their range, then fix them run by run of columns.

    After each run of columns is rounded, the others are adjusted by `inner_steps` of gradient descent, each
    followed by a projection onto the range of codes. Columns go in order of falling diagonal of H. Layout as in
    `solvers.gptq`. The paper uses Adam and fixes single columns; here the descent is accelerated (Nesterov) with
    the inverse of the largest eigenvalue of H as step length, which needs no learning rate.
    """
    low, high = (levels.values(torch.full_like(target, place)) for place in (0, levels.even - 1))
    length = 1 / torch.linalg.matrix_norm(moment, 2)
    free = torch.ones(target.shape[1], dtype=torch.bool, device=target.device)

    def descended(values: Tensor, count: int) -> Tensor:
        previous, momentum = values, 1.0
        for _ in range(count):
            following = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
            ahead = values + (momentum - 1) / following * (values - previous)
            moved = ahead - length * ((ahead - target) @ moment)
            previous, values = values, torch.where(free, moved.clamp(low, high), values)
            momentum = following
        return values

    values = descended(target.clamp(low, high), steps)
    order = torch.argsort(moment.diagonal(), descending=True, stable=True)
    for run in torch.split(order, _RUN if len(order) > _RUN else 1):
        own = levels.columns(run)
        values[:, run] = own.values(own.nearest(values[:, run]))
        free[run] = False
        values = descended(values, inner_steps)
    return levels.nearest(values)
