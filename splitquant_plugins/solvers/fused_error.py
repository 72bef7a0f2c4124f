"""The error of rounded parts in one compiled pass, on grids that round a value by its group's scale and zero point.

Nothing is dequantized into memory: each value of each part is read once. What the pass does to a value,
(clamp(round(x / scale) + zero point) - zero point) * scale in the tensor's dtype, is compared bit for bit with what the
grid makes of some rows of every part, and a grid that does anything else is left to its own `quantize_dequantize`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from splitquant_plugins.compiled import compiled
from splitquant_plugins.parallel import in_threads

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from splitquant_plugins.grid import Grid

    Array = NDArray[Any]

# Rows, or runs on a per-tensor grid, of each part that are compared with what the grid makes of them.
_COMPARED = 4
# Values in such a run.
_RUN = 1 << 12
# Values that one thread measures at once.
_SPAN = 1 << 18
# The loop is compiled for tuples of so many parts, the first repeated, and anew where there are more.
_PARTS = 4
# Values whose sum of parts is held at once, and sums of squares that are added up side by side.
_BLOCK, _LANES = 1024, 16


@compiled
def _rounded(x: Any, scale: Any, zero_point: Any, lowest: Any, highest: Any) -> Any:
    return (min(max(np.rint(x / scale) + zero_point, lowest), highest) - zero_point) * scale


@compiled
def round_row(values: Array, scale: Array, zero_point: Array, width: int, ends: Array, out: Array) -> None:
    """Round `values` [d] whose groups are `width` long, by scales and zero points [groups]."""
    for start in range(0, len(values), width):
        here, zero = scale[start // width], zero_point[start // width]
        for i in range(start, min(start + width, len(values))):
            out[i] = _rounded(values[i], here, zero, ends[0], ends[1])


@compiled
def row_errors(
    rows: Array,
    parts: tuple[Array, ...],
    k: int,
    scale: Array,
    zero_point: Array,
    width: int,
    ends: Array,
    error: Array,
) -> None:
    """Squared error [r] of `rows` [r, d] in which the first k of `parts` [r, d], rounded, are summed in order.

    Groups are `width` values of a row, with scales and zero points [k, r, groups]; `ends`: lowest and highest code.
    Differences and squares are in the parts' dtype, their sums in float64, in an order that d alone settles.
    """
    total = np.empty(_BLOCK, rows.dtype)
    lanes = np.empty(_LANES)
    d = rows.shape[1]
    for row in range(len(rows)):
        lanes[:] = 0.0
        for group in range(0, d, width):
            for start in range(group, min(group + width, d), _BLOCK):
                n = min(start + _BLOCK, group + width, d) - start
                for j in range(k):
                    here, zero = scale[j, row, group // width], zero_point[j, row, group // width]
                    values = parts[j][row, start : start + n]
                    if j == 0:
                        for i in range(n):
                            total[i] = _rounded(values[i], here, zero, ends[0], ends[1])
                    else:
                        for i in range(n):
                            total[i] += _rounded(values[i], here, zero, ends[0], ends[1])
                weight = rows[row, start : start + n]
                for i in range(n):
                    off = weight[i] - total[i]
                    total[i] = off * off
                whole = n // _LANES * _LANES
                for at in range(0, whole, _LANES):
                    for lane in range(_LANES):
                        lanes[lane] += np.float64(total[at + lane])
                for i in range(whole, n):
                    lanes[i - whole] += np.float64(total[i])
        error[row] = lanes.sum()


def fused_error(tensor: Tensor, parts: Sequence[Tensor], grid: Grid) -> Tensor | None:
    """Squared error of every output channel, float64 [tensor.shape[0]]; None where the grid rounds in another way.

    The tensor and its parts are contiguous, and the grid was found to round rows alone, or by the ends of the tensor.
    """
    whole = grid.granularity == "tensor" or tensor.ndim < 2
    groups = [grid.groups(part) for part in parts]
    if tensor.device.type != "cpu" or tensor.dtype not in (torch.float32, torch.float64) or tensor.ndim < 2:
        return None
    if any(len(cut) > 1 or cut[0].data_ptr() != part.data_ptr() for cut, part in zip(groups, parts, strict=True)):
        return None
    rows, d = len(tensor), tensor[0].numel()
    width = d if whole else groups[0][0].shape[1]
    found = [grid.qparams(_ends(cut[0])) for cut in groups]
    if any(one.dtype != tensor.dtype or one.numel() * width != (d if whole else rows * d) for one, _ in found):
        return None
    shape = (1, 1) if whole else (rows, d // width)
    scale, zero_point = (
        torch.stack([one[i].to(tensor.dtype).reshape(shape) for one in found]).expand(-1, rows, -1).detach().numpy()
        for i in range(2)
    )
    ends = np.array([grid.quant_min, grid.quant_max], scale.dtype)
    flat = [part.detach().reshape(rows, d) for part in parts]
    for j, part in enumerate(flat):
        if not _as_the_grid(part, grid, scale[j], zero_point[j], width, ends, tensor.shape):
            return None
    weight = tensor.detach().reshape(rows, d).numpy()
    arrays = tuple(part.numpy() for part in [*flat, *flat[:1] * (_PARTS - len(flat))])
    error = np.empty(rows)

    def work(index: slice) -> None:
        row_errors(
            *(weight[index], tuple(part[index] for part in arrays), len(flat)),
            *(np.ascontiguousarray(scale[:, index]), np.ascontiguousarray(zero_point[:, index])),
            *(width, ends, error[index]),
        )

    step = max(1, _SPAN // d)
    in_threads(work, [slice(at, min(at + step, rows)) for at in range(0, rows, step)])
    return torch.from_numpy(error)


def _ends(groups: Tensor) -> Tensor:
    """The least and the greatest value of each group, [groups, 2]."""
    if len(groups) == 1:
        return torch.stack(torch.aminmax(groups)).reshape(1, 2)  # many times faster than along a dimension
    step = max(1, _SPAN // groups.shape[1])

    def work(at: int) -> Tensor:
        some = groups[at : at + step]
        return torch.stack([some.amin(dim=1), some.amax(dim=1)], dim=1)  # faster than aminmax of a dimension

    return torch.cat(in_threads(work, range(0, len(groups), step)))


def _as_the_grid(
    part: Tensor, grid: Grid, scale: Array, zero_point: Array, width: int, ends: Array, shape: torch.Size
) -> bool:
    """Whether the pass makes of some rows of a part [rows, d], or of runs of them, what the grid makes of them."""
    chosen = torch.linspace(0, len(part) - 1, min(_COMPARED, len(part))).round().long()
    some = part[chosen]
    out = np.empty(some.shape, scale.dtype)
    for place, row in enumerate(chosen.tolist()):
        round_row(
            *(some[place].numpy(), np.ascontiguousarray(scale[row]), np.ascontiguousarray(zero_point[row])),
            *(width, ends, out[place]),
        )
    if grid.granularity == "tensor":
        runs = some[:, :_RUN]
        held = torch.cat([runs.flatten(), torch.stack(torch.aminmax(part))]).reshape(1, -1)
        wanted = grid.quantize_dequantize(held)[0, :-2].reshape(runs.shape)
        return torch.equal(wanted, torch.from_numpy(out[:, :_RUN]))
    wanted = grid.quantize_dequantize(some.reshape(len(some), *shape[1:])).reshape(some.shape)
    return torch.equal(wanted, torch.from_numpy(out))
