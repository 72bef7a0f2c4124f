"""A backend's grid in the words of the solver, and what the backend's plain rounding asks of the solution.

A backend takes scales and zeros from the extremes of each group. Values scale * code + zero come back as they are
where every group holds its outermost codes: both ends of an affine range (0 counts as present where the range
includes it by itself), the largest magnitude of a symmetric one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from splitquant_plugins.grid import Granularity, Grid

ZeroKind = Literal["free", "integer", "none"]


@dataclass(frozen=True)
class SolverGrid:
    """What a `Grid` lets the solver choose: codes `quant_min` to `quant_max`, and per group a scale and a zero.

    `zero`: `free` is any number (as the float shift of optimum-quanto); `integer` is -scale * zero_point with the
    zero point among the codes, so that 0 is exact (PT2E, INC, ONNX Runtime); `none` is symmetric, zero = 0. Where
    there is a zero, codes are counted from 0 on, whatever the backend counts from.

    `range_ends`: sets of codes; each group has to hold at least one code of each set. `end_steps`: how many steps the
    end of a symmetric range stands for when the backend takes the scale from it, its code unless values are clipped.
    """

    quant_min: int
    quant_max: int
    zero: ZeroKind = "free"
    granularity: Granularity = "channel"
    group_size: int | None = None
    range_ends: tuple[tuple[int, ...], ...] = ()
    end_steps: float = 0.0

    @property
    def number_of_codes(self) -> int:
        """How many codes there are."""
        return self.quant_max - self.quant_min + 1

    @property
    def zero_points(self) -> tuple[int, ...]:
        """Codes that may stand for 0; empty where the zero is free."""
        if self.zero == "free":
            return ()
        return tuple(range(self.quant_min, self.quant_max + 1)) if self.zero == "integer" else (0,)

    @property
    def per_tensor(self) -> bool:
        """Whether all output channels share one scale."""
        return self.granularity == "tensor"

    def group_of_column(self, columns: int, device: torch.device | None = None) -> Tensor:
        """Index of the group of each column within its row, [columns], int64; a last group may be shorter."""
        index = torch.arange(columns, device=device)
        return index // self.group_size if self.group_size is not None else torch.zeros_like(index)

    def needs_end(self, end: tuple[int, ...], zero_point: Tensor) -> Tensor:
        """Whether groups with these zero points need the end: not where it stands for 0, which is in every range."""
        if self.zero != "integer":
            return torch.ones_like(zero_point, dtype=torch.bool)
        return zero_point != end[0]

    def with_clipped_ends(self, codes: Tensor, values: Tensor, scale: Tensor) -> Tensor:
        """The values with the ends that a backend clips put where it looks for them: the float weights to give it."""
        (end, *_), *_ = self.range_ends
        if self.zero != "none" or self.end_steps == abs(end):
            return values
        return torch.where(codes == end, scale * self.end_steps * (1 if end > 0 else -1), values)


def solver_grid(grid: Grid, shape: torch.Size) -> SolverGrid:
    """Derive what the solver needs of a backend's grid for weights of this shape, output channels first.

    `grid` may have an attribute `free_zero`, true where its zero is any number within the range of the values.
    """
    groups = next(part for part in grid.groups(torch.empty(shape, device="meta")) if len(part))
    width = groups.shape[1]
    group_size = width if width < shape[1:].numel() else None
    granularity: Granularity = "channel" if group_size is None else "group"
    if len(groups) == 1 and shape[0] > 1:
        granularity = "tensor"
    low, high = grid.quant_min, grid.quant_max
    if grid.scheme == "affine":
        zero: ZeroKind = "free" if getattr(grid, "free_zero", False) else "integer"
        return SolverGrid(0, high - low, zero, granularity, group_size, ((0,), (high - low,)))
    # The scale of a group whose largest magnitude is 1 tells how many steps the backend takes it for.
    scale = float(grid.qparams(torch.tensor([[1.0, 0.0]]))[0])
    if scale < 0:  # the scale has the sign that makes the largest magnitude the lowest code
        return SolverGrid(low, high, "none", granularity, group_size, ((low,),), float(-low))
    steps = 1 / scale
    # Where the end is clipped, the lowest code is out of reach but for a tie, and only the highest end is safe.
    exact = abs(steps - high) < 1e-3
    ends = ((high, -high) if exact else (high,),)
    return SolverGrid(-high, high, "none", granularity, group_size, ends, float(high) if exact else steps)


@dataclass(frozen=True)
class Affine:
    """Scales and zeros, each [rows, groups per row], or [1, 1] where the whole tensor shares them."""

    scale: Tensor
    zero: Tensor

    def values(self, codes: Tensor, group_of_column: Tensor) -> Tensor:
        """The weights that codes [rows, columns] stand for."""
        if self.scale.shape[1] == 1:
            return codes * self.scale + self.zero
        return codes * self.scale[:, group_of_column] + self.zero[:, group_of_column]

    def where(self, rows: Tensor, other: Affine) -> Affine:
        """Own values in the rows where the mask [rows] is true, those of `other` elsewhere."""
        mask = rows[:, None]
        return Affine(torch.where(mask, self.scale, other.scale), torch.where(mask, self.zero, other.zero))


def group_ranges(weight: Tensor, grid: SolverGrid) -> tuple[Tensor, Tensor]:
    """Lowest and highest value of each group, [rows or 1, groups]; 0 is always within."""
    groups = grid.group_of_column(weight.shape[1], weight.device)
    index = groups.expand_as(weight)
    zeros = weight.new_zeros(weight.shape[0], int(groups[-1]) + 1)
    low = zeros.scatter_reduce(1, index, weight, "amin")
    high = zeros.scatter_reduce(1, index, weight, "amax")
    if grid.per_tensor:
        return low.amin().reshape(1, 1), high.amax().reshape(1, 1)
    return low, high
