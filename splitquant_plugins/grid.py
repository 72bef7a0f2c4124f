"""Uniform quantization: the integer grid that a backend will round a tensor to.

The equations are (1) to (6) of SplitQuant (arXiv 2501.12428): with b bits, the scaling factor S maps
[beta, alpha] onto 2^b - 1 steps, Q(x) = clamp(round(S x) + Z), and x is recovered as (Q - Z) / S. Here
`scale` is 1/S, the width of a step, as every framework stores it.

A tensor is cut into *groups*, each with a scale and a zero point of its own; see `Granularity`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from splitquant_plugins.errors import ConfigError

Scheme = Literal["affine", "symmetric"]
Granularity = Literal["tensor", "channel", "group"]
"""What shares a scale and a zero point: the whole tensor, an output channel, or a run of `group_size` inputs of one.

Output channels are dimension 0, all other dimensions its inputs, so that `Grid.groups` cuts a weight as follows:

| weight | tensor | channel | group, `group_size` 32 |
|---|---|---|---|
| Linear [64, 128] | [1, 8192] | [64, 128] | [256, 32] |
| Linear [64, 100] | [1, 6400] | [64, 100] | [192, 32] and [64, 4], the last group of each channel |
| Conv2d [16, 8, 3, 3] | [1, 1152] | [16, 72] | [32, 32] and [16, 8] |
| bias [64] | [1, 64] | [1, 64] | [1, 64] |

Where layers are clustered, the word says what is clustered at once: `tensor` or `channel`.
"""
SymmetricScale = Literal["restricted", "full"]


@runtime_checkable
class Grid(Protocol):
    """What a splitter needs to know of the grid that its parts will be rounded to."""

    @property
    def bits(self) -> int:
        """Bits per stored code."""

    @property
    def scheme(self) -> Scheme:
        """`affine` (scale and integer zero point) or `symmetric` (scale only)."""

    @property
    def granularity(self) -> Granularity:
        """What shares a scale: the tensor, an output channel, or a group of inputs of a channel."""

    @property
    def group_size(self) -> int | None:
        """Values per group where `granularity` is `group`."""

    @property
    def quant_min(self) -> int:
        """Lowest code that the backend stores."""

    @property
    def quant_max(self) -> int:
        """Highest code that the backend stores."""

    def groups(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Cut a tensor into 2-D views [groups, values]; a second one holds the shorter last groups."""

    def from_groups(self, groups: Sequence[Tensor], shape: torch.Size) -> Tensor:
        """Put what `groups` cut back together."""

    def qparams(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point that the backend chooses for 2-D `groups`, each of shape [groups, 1]."""

    def quantize_dequantize(self, tensor: Tensor) -> Tensor:
        """Round a tensor as the backend will, bit for bit."""

    def stored_bits(self, shape: torch.Size) -> int:
        """Bits that a tensor of this shape takes in packed form, scales and zero points included."""


class GroupsOfRows:
    """Cuts tensors into the groups of a grid, as `Granularity` says."""

    def groups(self: Grid, tensor: Tensor) -> tuple[Tensor, ...]:
        if self.granularity == "tensor" or tensor.ndim < 2:
            return (tensor.reshape(1, -1),)
        rows = tensor.reshape(tensor.shape[0], -1)
        if self.group_size is None or rows.shape[1] < self.group_size:
            return (rows,)
        whole = rows.shape[1] // self.group_size * self.group_size
        grouped = rows[:, :whole].reshape(-1, self.group_size)
        return (grouped,) if whole == rows.shape[1] else (grouped, rows[:, whole:])

    def from_groups(self: Grid, groups: Sequence[Tensor], shape: torch.Size) -> Tensor:
        if len(groups) == 1:
            return groups[0].reshape(shape)
        return torch.cat([part.reshape(shape[0], -1) for part in groups], dim=1).reshape(shape)


@dataclass(frozen=True)
class UniformGrid(GroupsOfRows):
    """The common linear grid: min-max range that includes 0, integer zero point, round half to even.

    `symmetric_scale`: `restricted` is max|x| / (2^(b-1) - 1) with codes ±(2^(b-1) - 1), as NPUs have it;
    `full` is 2 max|x| / (2^b - 1) with codes -2^(b-1) to 2^(b-1) - 1, as torchao's PT2E observers have it
    (its largest positive values are clipped, and it is not idempotent). `power_of_two_scale` rounds scales up to a
    power of two, as ESP-DL and other targets that shift instead of multiplying have them.
    """

    bits: int
    scheme: Scheme = "affine"
    granularity: Granularity = "channel"
    group_size: int | None = None
    symmetric_scale: SymmetricScale = "restricted"
    scale_bits: int = 32
    power_of_two_scale: bool = False

    def __post_init__(self) -> None:
        if type(self.bits) is not int or not 2 <= self.bits <= 8:
            raise ConfigError(f"bits={self.bits!r}: a grid has 2 to 8 bits")
        if self.scheme not in ("affine", "symmetric"):
            raise ConfigError(f"scheme={self.scheme!r}: choose affine or symmetric")
        if self.granularity not in ("tensor", "channel", "group"):
            raise ConfigError(f"granularity={self.granularity!r}: choose tensor, channel or group")
        if (self.granularity == "group") != (self.group_size is not None):
            raise ConfigError("group_size goes with granularity='group', and is needed there")
        if self.group_size is not None and self.group_size < 1:
            raise ConfigError(f"group_size={self.group_size}: a group has at least one value")

    @property
    def quant_min(self) -> int:
        return -self.quant_max - (0 if self.scheme == "symmetric" and self.symmetric_scale == "restricted" else 1)

    @property
    def quant_max(self) -> int:
        return 2 ** (self.bits - 1) - 1

    def qparams(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point of 2-D `groups`, each of shape [groups, 1]; an all-zero group has scale 1."""
        qmin, qmax = self.quant_min, self.quant_max
        low = groups.amin(dim=1, keepdim=True).clamp(max=0)
        high = groups.amax(dim=1, keepdim=True).clamp(min=0)
        if self.scheme == "affine":
            scale = (high - low) / (qmax - qmin)
        else:
            scale = torch.maximum(-low, high) / ((qmax - qmin) / 2)
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        if self.power_of_two_scale:
            scale = next_power_of_two(scale)
        if self.scheme == "symmetric":
            return scale, torch.zeros_like(scale)
        return scale, (qmin - torch.round(low / scale)).clamp(max=qmax)  # beyond it where the scale is subnormal

    def quantize(self, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes (as floats) of 2-D `groups`, with their scale and zero point."""
        scale, zero_point = self.qparams(groups)
        qmin, qmax = self.quant_min, self.quant_max
        codes = (groups / scale).round_().add_(zero_point).clamp_(qmin, qmax)  # in place: fresh pages cost the most
        return codes, scale, zero_point

    def quantize_dequantize(self, tensor: Tensor) -> Tensor:
        """Round a tensor to the grid that it would get by itself."""
        rounded = []
        for groups in self.groups(tensor):
            codes, scale, zero_point = self.quantize(groups)
            rounded.append(codes.sub_(zero_point).mul_(scale))
        return self.from_groups(rounded, tensor.shape)

    def stored_bits(self, shape: torch.Size) -> int:
        number = sum(part.shape[0] for part in self.groups(torch.empty(shape, device="meta")))
        zero_point_bits = self.bits if self.scheme == "affine" else 0
        return shape.numel() * self.bits + number * (self.scale_bits + zero_point_bits)


def next_power_of_two(scale: Tensor) -> Tensor:
    """The least powers of two that are not below positive scales; exact, in the scales' dtype."""
    mantissa, exponent = torch.frexp(scale)  # scale = mantissa * 2**exponent, mantissa in [0.5, 1)
    return torch.ldexp(torch.ones_like(scale), torch.where(mantissa == 0.5, exponent - 1, exponent))
