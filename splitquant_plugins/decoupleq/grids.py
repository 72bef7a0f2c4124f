"""The grid of values a backend can store: which weights share a scale, and what kind of zero it has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from splitquant_plugins.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

ZeroKind = Literal["float", "integer", "none"]
ValueGranularity = Literal["row", "group", "tensor"]


@dataclass(frozen=True)
class ValueGrid:
    """Values scale * code + zero, with one (scale, zero) per cell: a row, a group of inputs, the tensor.

    `zero`: `float` is free (as the float shift of optimum-quanto); `integer` is -scale * zero_point with the
    zero point among the codes, so that 0 is exact (PT2E, INC, ONNX Runtime); `none` is symmetric, zero = 0.
    Codes are 0 to 2^bits - 1, and signed for `none`: ±(2^(bits-1) - 1), or with `full_range` down to
    -2^(bits-1).
    """

    bits: int
    granularity: ValueGranularity = "row"
    group_size: int | None = None
    zero: ZeroKind = "float"
    full_range: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ConfigError(f"bits={self.bits}: a grid has 2 to 8 bits")
        if self.granularity not in ("row", "group", "tensor"):
            raise ConfigError(f"granularity={self.granularity!r}: choose row, group or tensor")
        if (self.granularity == "group") != (self.group_size is not None):
            raise ConfigError("group_size goes with granularity='group', and is needed there")
        if self.group_size is not None and self.group_size < 1:
            raise ConfigError(f"group_size={self.group_size}: a group has at least one value")
        if self.zero not in ("float", "integer", "none"):
            raise ConfigError(f"zero={self.zero!r}: choose float, integer or none")
        if self.full_range and self.zero != "none":
            raise ConfigError("full_range is an option of the symmetric grid, zero='none'")

    @property
    def code_range(self) -> tuple[int, int]:
        """Lowest and highest code."""
        if self.zero != "none":
            return 0, 2**self.bits - 1
        high = 2 ** (self.bits - 1) - 1
        return (-high - 1 if self.full_range else -high), high

    @property
    def zero_points(self) -> tuple[int, ...]:
        """Codes that may stand for 0; empty where the zero is free."""
        if self.zero == "float":
            return ()
        low, high = self.code_range
        return tuple(range(low, high + 1)) if self.zero == "integer" else (0,)

    def cell_of_column(self, columns: int, device: torch.device | None = None) -> Tensor:
        """Index of the cell of each column within its row, [columns], int64; a last group may be shorter."""
        index = torch.arange(columns, device=device)
        return index // self.group_size if self.group_size is not None else torch.zeros_like(index)


@dataclass(frozen=True)
class Affine:
    """Scales and zeros, each [rows, cells per row], or [1, 1] where the whole tensor shares them."""

    scale: Tensor
    zero: Tensor

    def values(self, codes: Tensor, cell_of_column: Tensor) -> Tensor:
        """The weights that codes [rows, columns] stand for."""
        return codes * self.scale[:, cell_of_column] + self.zero[:, cell_of_column]

    def where(self, rows: Tensor, other: Affine) -> Affine:
        """Own values in the rows where the mask [rows] is true, those of `other` elsewhere."""
        mask = rows[:, None]
        return Affine(torch.where(mask, self.scale, other.scale), torch.where(mask, self.zero, other.zero))


def cell_ranges(weight: Tensor, grid: ValueGrid) -> tuple[Tensor, Tensor]:
    """Lowest and highest value of each cell, [rows or 1, cells]; 0 is always within."""
    cells = grid.cell_of_column(weight.shape[1], weight.device)
    index = cells.expand_as(weight)
    zeros = weight.new_zeros(weight.shape[0], int(cells[-1]) + 1)
    low = zeros.scatter_reduce(1, index, weight, "amin")
    high = zeros.scatter_reduce(1, index, weight, "amax")
    if grid.granularity == "tensor":
        return low.amin().reshape(1, 1), high.amax().reshape(1, 1)
    return low, high


def min_max_affine(weight: Tensor, grid: ValueGrid, shrink: float = 1.0) -> Affine:
    """Scale and zero from each cell's range, which always includes 0, times `shrink`.

    An all-zero cell has scale 1 and comes back as zeros.
    """
    low, high = (bound * shrink for bound in cell_ranges(weight, grid))
    lowest, highest = grid.code_range
    if grid.zero == "none":
        steps = (highest - lowest) / 2 if grid.full_range else highest
        scale = torch.maximum(-low, high) / steps
    else:
        scale = (high - low) / (highest - lowest)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    if grid.zero == "float":
        return Affine(scale, low)
    if grid.zero == "none":
        return Affine(scale, torch.zeros_like(scale))
    return Affine(scale, -scale * torch.round(-low / scale).clamp(lowest, highest))
