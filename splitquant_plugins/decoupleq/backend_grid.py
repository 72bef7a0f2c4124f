"""What a backend's own rounding asks of the codes, so that it finds the same codes, scales and zeros again.

A backend takes scales and zeros from the extremes of each cell. Values scale * code + zero come back as they are
where every cell holds its outermost codes: both ends of an affine grid (0 counts as present where the range
includes it by itself), the largest magnitude of a symmetric one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from splitquant_plugins.decoupleq.grids import ValueGranularity, ValueGrid, ZeroKind

if TYPE_CHECKING:
    from splitquant_plugins.grid import Grid


@dataclass(frozen=True)
class Target:
    """A backend's grid for weights of one shape, in the words of the solver.

    `ends`: sets of codes; each cell has to hold at least one code of each set. `end_steps`: how many steps the
    end of a symmetric grid stands for when the backend takes the scale from it, its code unless values are clipped.
    """

    grid: Grid
    values: ValueGrid
    ends: tuple[tuple[int, ...], ...]
    end_steps: float

    def needed(self, end: tuple[int, ...], affine_point: Tensor) -> Tensor:
        """Whether cells with these zero points need the end: not where it stands for 0, which is in every range."""
        if self.values.zero != "integer":
            return torch.ones_like(affine_point, dtype=torch.bool)
        return affine_point != end[0]

    def floats(self, codes: Tensor, values: Tensor, scale: Tensor) -> Tensor:
        """The float weights to hand to the backend: the values, with ends that it clips put where it looks for them."""
        (end, *_), *_ = self.ends
        if self.values.zero != "none" or self.end_steps == abs(end):
            return values
        return torch.where(codes == end, scale * self.end_steps * (1 if end > 0 else -1), values)


def target_of(grid: Grid, shape: torch.Size) -> Target:
    """Describe a backend's grid for weights of this shape, output channels first.

    `grid` may have an attribute `free_zero`, true where its zero is any number within the range of the values.
    """
    groups = [part for part in grid.groups(torch.empty(shape, device="meta")) if part.shape[0]]
    width, columns = groups[0].shape[1], shape[1:].numel()
    tensor = groups[0].shape[0] == 1 and shape[0] > 1
    group_size = width if width < columns else None
    granularity: ValueGranularity = "tensor" if tensor else "row" if group_size is None else "group"
    low, high = grid.quant_min, grid.quant_max
    if grid.scheme == "affine":
        zero: ZeroKind = "float" if getattr(grid, "free_zero", False) else "integer"
        bits = (high - low).bit_length()
        return Target(grid, ValueGrid(bits, granularity, group_size, zero), ((0,), (high - low,)), 0.0)
    # The scale of a cell whose largest magnitude is 1 tells how many steps the backend takes it for.
    scale = float(grid.qparams(torch.tensor([[1.0, 0.0]]))[0])
    if scale < 0:  # the scale has the sign that makes the largest magnitude the lowest code
        values = ValueGrid(grid.bits, granularity, group_size, "none", full_range=True)
        return Target(grid, values, ((-(2 ** (grid.bits - 1)),),), 2.0 ** (grid.bits - 1))
    values = ValueGrid(grid.bits, granularity, group_size, "none")
    steps = 1 / scale
    # Where the end is clipped, the lowest code is out of reach but for a tie, and only the highest end is safe.
    exact = abs(steps - high) < 1e-3
    return Target(grid, values, ((high, -high) if exact else (high,),), float(high) if exact else steps)
