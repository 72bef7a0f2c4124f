"""What a split costs: the parts as the backend will round them, and the error of their sum."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from splitquant_plugins.grid import Grid


def quantized_sum(parts: Sequence[Tensor], grid: Grid) -> Tensor:
    """Sum of the parts, each rounded by itself as the backend will; float32 or wider."""
    wide = torch.promote_types(parts[0].dtype, torch.float32)
    total = grid.quantize_dequantize(parts[0]).to(wide)
    for part in parts[1:]:
        total = total + grid.quantize_dequantize(part).to(wide)
    return total


def weight_error(tensor: Tensor, parts: Sequence[Tensor], grid: Grid) -> float:
    """Sum of squared differences between `tensor` and what the backend makes of its parts."""
    rounded = quantized_sum(parts, grid)
    return float((tensor.to(rounded.dtype) - rounded).square().sum(dtype=torch.float64))


def output_error(
    tensor: Tensor, parts: Sequence[Tensor], grid: Grid, second_moment: Tensor | None = None
) -> float:
    """Mean squared error of the layer's outputs, tr(E H Eᵀ), or `weight_error` without a second moment.

    `second_moment` is H, shape [groups, d, d] with d = tensor[0].numel(); output channels are split evenly
    over the groups. E is the difference that rounding the parts makes.
    """
    if second_moment is None:
        return weight_error(tensor, parts, grid)
    rounded = quantized_sum(parts, grid)
    groups, d, _ = second_moment.shape
    error = (tensor.to(rounded.dtype) - rounded).reshape(groups, -1, d)
    return float((torch.bmm(error, second_moment.to(error)) * error).sum(dtype=torch.float64))


def cell_error(cells: Tensor, parts: Sequence[Tensor], grid: Grid) -> Tensor:
    """`weight_error` of every row of 2-D `cells` on its own, float64 [cells]; parts are cut the same way."""
    total = torch.zeros_like(cells)
    for part in parts:
        total = total + round_cells(part, grid)
    return (cells - total).square().sum(dim=1, dtype=torch.float64)


def round_cells(cells: Tensor, grid: Grid) -> Tensor:
    """Round 2-D `cells` as the grid rounds cells, from its scale and zero point: for search, not for truth."""
    scale, zero_point = grid.qparams(cells)
    qmin, qmax = grid.code_range
    return ((torch.round(cells / scale) + zero_point).clamp(qmin, qmax) - zero_point) * scale
