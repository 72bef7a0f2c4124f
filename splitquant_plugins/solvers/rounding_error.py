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


def output_error(tensor: Tensor, parts: Sequence[Tensor], grid: Grid, second_moment: Tensor | None = None) -> float:
    """Mean squared error of the layer's outputs, tr(E H Eᵀ), or `weight_error` without a second moment.

    `second_moment` is H, shape [groups, d, d] with d = tensor[0].numel(); output channels are split evenly
    over the groups. E is the difference that rounding the parts makes.
    """
    return float(row_error(tensor, quantized_sum(parts, grid), second_moment).sum())


def row_error(tensor: Tensor, rounded: Tensor, second_moment: Tensor | None = None) -> Tensor:
    """Error of every output channel on its own, float64 [tensor.shape[0]]; see `output_error`."""
    error = (tensor.to(rounded.dtype) - rounded).reshape(tensor.shape[0], -1)
    if second_moment is None:
        return error.square().sum(dim=1, dtype=torch.float64)
    groups, d, _ = second_moment.shape
    error = error.reshape(groups, -1, d)
    return (torch.bmm(error, second_moment.to(error)) * error).sum(dim=2, dtype=torch.float64).flatten()


def round_groups(groups: Tensor, grid: Grid) -> Tensor:
    """Round 2-D `groups` as the grid rounds groups, from its scale and zero point: for search, not for truth."""
    scale, zero_point = grid.qparams(groups)
    qmin, qmax = grid.quant_min, grid.quant_max
    return ((torch.round(groups / scale) + zero_point).clamp(qmin, qmax) - zero_point) * scale
