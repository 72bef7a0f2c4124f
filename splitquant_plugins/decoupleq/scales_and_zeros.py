"""Closed-form scales and zeros for given codes (decoupleQ, arXiv 2404.12759, section 3.3).

With fixed codes Q the objective is a quadratic in the scales and zeros of a row: its minimum solves a linear
system, 2 x 2 for one group per row, 2G x 2G for G groups. Its coefficients are sums of H over codes and ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from splitquant_plugins.compiled import compiled
from splitquant_plugins.decoupleq.objective import Rows
from splitquant_plugins.decoupleq.solver_grid import Affine, SolverGrid

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

# Relative to a diagonal of ones; only matters where the system is singular (a group with a single code).
_RIDGE = 1e-11


def fit_affine(problem: Sequence[Rows], codes: Tensor, grid: SolverGrid, current: Affine) -> Affine:
    """Scales and zeros that minimise the error of the sum of k parts with codes [k, rows, d].

    The groups of the answer (and of `current`) are those of the first part, then of the second, and so on:
    [rows, k * groups]. Directions that the codes leave undetermined stay as in `current`. With an integer
    zero point all of its values are tried, one group at a time. Rows (or the tensor) for which no positive
    scale is best keep `current`. The caller compares errors before it accepts the answer.
    """
    chunks = torch.split(codes, [len(rows.weight) for rows in problem], dim=1)
    sums = _Sums.of(problem, chunks, grid)
    points = grid.zero_points
    fitted = _fit_zero_points(sums, current, points) if points else _fit_free(sums, current)
    return fitted.where((fitted.scale > 0).all(dim=1), current)


@dataclass(frozen=True)
class _Sums:
    """Coefficients of the quadratic: inner products under H, [rows, C, C] and [rows, C] for C groups.

    q is the codes of a group (0 elsewhere), e its indicator, w the weights. One row of sums for all rows
    where these share their scale.
    """

    qq: Tensor
    qe: Tensor
    ee: Tensor
    wq: Tensor
    we: Tensor

    @classmethod
    def of(cls, problem: Sequence[Rows], codes: Sequence[Tensor], grid: SolverGrid) -> _Sums:
        found = [cls._of_rows(rows, part, grid) for rows, part in zip(problem, codes, strict=True)]
        joined = cls(*(torch.cat([getattr(sums, name.name) for sums in found]) for name in fields(cls)))
        if not grid.per_tensor:
            return joined
        # All rows share the unknowns: their quadratics add up.
        return cls(*(getattr(joined, name.name).sum(dim=0, keepdim=True) for name in fields(cls)))

    @classmethod
    def _of_rows(cls, rows: Rows, codes: Tensor, grid: SolverGrid) -> _Sums:
        parts, number, columns = codes.shape
        moment = rows.moment
        group_of_column = grid.group_of_column(columns, moment.device)
        count = int(group_of_column[-1]) + 1
        indicator = torch.nn.functional.one_hot(group_of_column, count).to(moment)  # [d, groups]
        e_moment = indicator.T @ moment  # [groups, d]
        qq = moment.new_empty(number, parts, count, parts, count)
        qe = moment.new_empty(number, parts, count, parts, count)
        width = grid.group_size or columns
        for group in range(count):
            inside = slice(group * width, (group + 1) * width)
            for part in range(parts):
                ahead = codes[part][:, inside] @ moment[inside]
                qq[:, part, group] = torch.stack([(ahead * other) @ indicator for other in codes], dim=1)
                qe[:, part, :, :, group] = ((codes[part] * e_moment[group]) @ indicator)[:, :, None]
        groups = parts * count
        return cls(
            qq=qq.reshape(number, groups, groups),
            qe=qe.reshape(number, groups, groups),
            ee=(e_moment @ indicator).repeat(parts, parts).expand(number, groups, groups),
            wq=torch.cat([(rows.weighted * part) @ indicator for part in codes], dim=1),
            we=(rows.weighted @ indicator).repeat(1, parts),
        )


def _fit_free(sums: _Sums, current: Affine) -> Affine:
    top = torch.cat([sums.qq, sums.qe], dim=2)
    bottom = torch.cat([sums.qe.mT, sums.ee], dim=2)
    solved = _solve(
        torch.cat([top, bottom], dim=1),
        torch.cat([sums.wq, sums.we], dim=1),
        torch.cat([current.scale, current.zero], dim=1),
    )
    scale, zero = solved.chunk(2, dim=1)
    return Affine(scale, zero)


def _fit_zero_points(sums: _Sums, current: Affine, candidates: tuple[int, ...]) -> Affine:
    """One sweep over the groups, each choosing its zero point given the others, then all scales together."""
    start = current.scale, torch.round(-current.zero / current.scale)
    scale, point = (each.detach().cpu().clone(memory_format=torch.contiguous_format) for each in start)
    known = (each.cpu().contiguous().numpy() for each in (sums.qq, sums.qe, sums.ee, sums.wq, sums.we))
    _choose_points(*known, np.array(candidates, np.float64), scale.numpy(), point.numpy())
    scale, point = (each.to(current.scale.device) for each in (scale, point))
    if scale.shape[1] > 1:
        rows, columns = point[:, :, None], point[:, None, :]
        system = sums.qq - columns * sums.qe - rows * sums.qe.mT + rows * columns * sums.ee
        joint = _solve(system, sums.wq - point * sums.we, scale)
        scale = torch.where((joint > 0).all(dim=1, keepdim=True), joint, scale)
    return Affine(scale, -scale * point)


def _solve(system: Tensor, right: Tensor, start: Tensor) -> Tensor:
    """Solve the symmetric semidefinite systems [n, m, m], staying at `start` in undetermined directions."""
    diagonal = system.diagonal(dim1=1, dim2=2)
    norm = torch.where(diagonal > 0, diagonal, torch.ones_like(diagonal)).sqrt()
    scaled = system / norm[:, :, None] / norm[:, None, :]
    scaled.diagonal(dim1=1, dim2=2).add_(_RIDGE)
    residual = (right - (system @ start[:, :, None]).squeeze(2)) / norm
    return start + torch.linalg.solve(scaled, residual) / norm


@compiled
def _choose_points(
    qq: Array, qe: Array, ee: Array, wq: Array, we: Array, candidates: Array, scale: Array, point: Array
) -> None:
    """Let each group choose its zero point and scale [rows, C] given those of the others, in place."""
    for r in range(len(scale)):
        scales, points = scale[r], point[r]
        for group in range(len(scales)):
            # The group's values are s (q - candidate e); what the other groups leave of the weights is fitted.
            codes, ones = wq[r, group], we[r, group]
            for h in range(len(scales)):
                if h != group:
                    codes -= (qq[r, group, h] - points[h] * qe[r, group, h]) * scales[h]
                    ones -= (qe[r, h, group] - points[h] * ee[r, h, group]) * scales[h]
            best = 0.0
            for candidate in candidates:
                norm = qq[r, group, group] - 2 * candidate * qe[r, group, group] + candidate**2 * ee[r, group, group]
                target = codes - candidate * ones
                if norm > 0 and target > 0 and target / norm * target > best:
                    best = target / norm * target
                    scales[group], points[group] = target / norm, candidate
