"""What a split costs: the parts as the backend will round them, and the error of their sum."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from typing import TYPE_CHECKING

import torch

from splitquant_plugins.parallel import CHUNK, in_threads
from splitquant_plugins.solvers.fused_error import fused_error

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from splitquant_plugins.grid import Grid

_WHOLE = 1 << 15  # weights that are measured at once
_TRIED = 1 << 12
_REMEMBERED = 6  # a splitter's candidates, and the whole


def quantized_sum(parts: Sequence[Tensor], grid: Grid) -> Tensor:
    """Sum of the parts, each rounded by itself as the backend will; float32 or wider."""
    wide = torch.promote_types(parts[0].dtype, torch.float32)
    total = grid.quantize_dequantize(parts[0]).to(wide)
    for number, part in enumerate(parts[1:]):
        rounded = grid.quantize_dequantize(part).to(wide)
        total = total.add_(rounded) if number else total + rounded
    return total


class _Remembered(threading.local):
    """What was measured last, with weak references to what it was measured on, and their versions."""

    def __init__(self) -> None:
        self.errors: deque[tuple[list[weakref.ref[Tensor]], list[int], Grid, Tensor]] = deque(maxlen=_REMEMBERED)

    def find(self, tensors: Sequence[Tensor], grid: Grid) -> Tensor | None:
        """The error of the same tensors, unchanged, on the same grid."""
        versions = [tensor._version for tensor in tensors]
        for known, before, on, error in self.errors:
            same = on is grid and before == versions and len(known) == len(tensors)
            if same and all(one() is tensor for one, tensor in zip(known, tensors, strict=True)):
                return error
        return None

    def keep(self, tensors: Sequence[Tensor], grid: Grid, error: Tensor) -> None:
        """Take the place of the oldest."""
        versions = [tensor._version for tensor in tensors]
        self.errors.append(([weakref.ref(tensor) for tensor in tensors], versions, grid, error))


_remembered = _Remembered()


def split_error(tensor: Tensor, parts: Sequence[Tensor], grid: Grid, second_moment: Tensor | None = None) -> Tensor:
    """`row_error` of the parts as the backend will round them, in little memory: float64 [tensor.shape[0]].

    Rows, or runs of values on a per-tensor grid, are rounded one after the other where the grid turns out to round
    them as it does together. The last few answers are remembered: what a splitter measured, the pass reports.
    """
    tensors = [tensor, *parts, *([] if second_moment is None else [second_moment])]
    if any(one.is_inference() for one in tensors):  # these have no versions that tell whether they changed
        return _measured(tensor, parts, grid, second_moment)
    error = _remembered.find(tensors, grid)
    if error is None:
        error = _measured(tensor, parts, grid, second_moment)
        _remembered.keep(tensors, grid, error)
    return error.clone()


def _measured(tensor: Tensor, parts: Sequence[Tensor], grid: Grid, second_moment: Tensor | None) -> Tensor:
    if second_moment is not None or tensor.numel() <= _WHOLE or not all(part.is_contiguous() for part in parts):
        return row_error(tensor, quantized_sum(parts, grid), second_moment)
    by_ends = grid.granularity == "tensor" or tensor.ndim < 2
    if not (rounds_by_ends(grid, tensor) if by_ends else rounds_rows_alone(grid, tensor)):
        return row_error(tensor, quantized_sum(parts, grid))
    fused = fused_error(tensor, parts, grid) if tensor.is_contiguous() else None
    if fused is not None:
        return fused
    rows = 1 if tensor.ndim < 2 else len(tensor)
    n = tensor.numel() // rows
    step = max(1, CHUNK // n)
    ends = [torch.stack(torch.aminmax(part)) for part in parts] if by_ends else []
    wide = torch.promote_types(tensor.dtype, torch.float32)

    def work(index: slice) -> Tensor:
        here = tensor.reshape(rows, n)[index]
        if not by_ends:
            here = here.reshape(-1, *tensor.shape[1:])
            return row_error(here, quantized_sum([part[index] for part in parts], grid))
        error = torch.zeros(len(here), dtype=torch.float64, device=tensor.device)
        for left in range(0, n, CHUNK):
            columns = slice(left, left + CHUNK)
            total = torch.zeros_like(here[:, columns], dtype=wide)
            for part, both in zip(parts, ends, strict=True):
                run = part.reshape(rows, n)[index, columns]
                rounded = grid.quantize_dequantize(torch.cat([run.flatten(), both]).reshape(1, -1))
                total += rounded[0, :-2].reshape(run.shape).to(wide)
            error += row_error(here[:, columns], total)
        return error

    return torch.cat(in_threads(work, [slice(at, min(at + step, rows)) for at in range(0, rows, step)]))


def rounds_rows_alone(grid: Grid, tensor: Tensor) -> bool:
    """Whether the grid rounds every row (dimension 0) of a tensor as it would by itself, tried on two of them."""
    if len(tensor) < 2:
        return False
    two = torch.stack([tensor[0], tensor[-1] * 64])
    both = grid.quantize_dequantize(two)
    return all(torch.equal(grid.quantize_dequantize(two[i : i + 1])[0], both[i]) for i in range(2))


def rounds_by_ends(grid: Grid, tensor: Tensor) -> bool:
    """Whether the grid rounds a value by the ends of the tensor's range alone, tried on some of the values."""
    some = tensor.reshape(-1)[:_TRIED]
    run = torch.cat([some[: _TRIED // 4], torch.stack(torch.aminmax(some))]).reshape(1, -1)
    wanted = grid.quantize_dequantize(some.reshape(1, -1))[:, : run.shape[1] - 2]
    return torch.equal(grid.quantize_dequantize(run)[:, :-2], wanted)


def weight_error(tensor: Tensor, parts: Sequence[Tensor], grid: Grid) -> float:
    """Sum of squared differences between `tensor` and what the backend makes of its parts."""
    return output_error(tensor, parts, grid)


def output_error(tensor: Tensor, parts: Sequence[Tensor], grid: Grid, second_moment: Tensor | None = None) -> float:
    """Mean squared error of the layer's outputs, tr(E H Eᵀ), or `weight_error` without a second moment.

    `second_moment` is H, shape [groups, d, d] with d = tensor[0].numel(); output channels are split evenly
    over the groups. E is the difference that rounding the parts makes.
    """
    return float(split_error(tensor, parts, grid, second_moment).sum())


def row_error(tensor: Tensor, rounded: Tensor, second_moment: Tensor | None = None) -> Tensor:
    """Error of every output channel on its own, float64 [tensor.shape[0]]; see `output_error`."""
    error = (tensor.to(rounded.dtype) - rounded).reshape(tensor.shape[0], -1)
    if second_moment is None:
        return error.square_().sum(dim=1, dtype=torch.float64)
    groups, d, _ = second_moment.shape
    error = error.reshape(groups, -1, d)
    return (torch.bmm(error, second_moment.to(error)) * error).sum(dim=2, dtype=torch.float64).flatten()


def round_groups(groups: Tensor, grid: Grid) -> Tensor:
    """Round 2-D `groups` as the grid rounds groups, from its scale and zero point: for search, not for truth."""
    scale, zero_point = grid.qparams(groups)
    qmin, qmax = grid.quant_min, grid.quant_max
    return ((torch.round(groups / scale) + zero_point).clamp(qmin, qmax) - zero_point) * scale
