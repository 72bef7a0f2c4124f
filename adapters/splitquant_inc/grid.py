"""The grid of INC's RTN, to the bit: minmax ranges that include 0, scales packed as 16-bit floats."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from splitquant_plugins.errors import ConfigError
from splitquant_plugins.grid import Granularity, GroupsOfRows, Scheme, UniformGrid

SCALE_BITS = 16
WORD_BITS = 32


@dataclass(frozen=True)
class IncRtnGrid(GroupsOfRows):
    """INC's integer weights as `RTNConfig` makes them and `INCWeightOnlyLinear` packs them.

    `group_size` None (INC: -1) gives each output channel one scale; otherwise runs of that many inputs share
    one, the last run of a channel being shorter where it must. Codes are chosen with the scale in 32 bits (or
    in the weight's dtype, where that is narrower; asymmetric codes of bfloat16 weights in 32 bits) and
    dequantized with the scale in 16 bits, in 16-bit arithmetic. `full_range` is INC's `use_full_range`: a
    symmetric scale of max|w| / 2^(b-1), negative where the largest magnitude is positive.
    """

    bits: int
    scheme: Scheme = "affine"
    group_size: int | None = None
    full_range: bool = False

    def __post_init__(self) -> None:
        UniformGrid(self.bits, self.scheme, self.granularity, self.group_size)  # refuses what no grid can be
        if self.scheme == "affine" and self.bits == 8:
            raise ConfigError("bits=8 with scheme='affine': INC wraps differences beyond ±127; choose symmetric")

    @property
    def granularity(self) -> Granularity:
        return "channel" if self.group_size is None else "group"

    @property
    def quant_min(self) -> int:
        """Lowest code; a symmetric code is stored with 2^(b-1) added to it."""
        return 0 if self.scheme == "affine" else -(1 << (self.bits - 1))

    @property
    def quant_max(self) -> int:
        return self.quant_min + (1 << self.bits) - 1

    def qparams(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point that choose the codes of 2-D `groups`, each of shape [groups, 1].

        A group of zeros is given the range that INC gives it: -1 to 1, or a largest magnitude of 1.
        """
        if self.scheme == "symmetric":
            largest, lowest = groups.amax(dim=1, keepdim=True), groups.amin(dim=1, keepdim=True)
            magnitude = torch.maximum(largest.abs(), lowest.abs())
            magnitude = torch.where(magnitude == 0, torch.ones_like(magnitude), magnitude)
            if self.full_range:
                scale = magnitude / 2 ** (self.bits - 1)
                scale = torch.where(largest.abs() > lowest.abs(), -scale, scale)
            else:
                scale = magnitude / (2 ** (self.bits - 1) - 1)
            return scale, torch.zeros_like(scale)
        # INC compares with a 32-bit zero, which widens the ends of a 16-bit weight.
        wide = torch.promote_types(groups.dtype, torch.float32)
        low = groups.amin(dim=1, keepdim=True).to(wide).clamp(max=0)
        high = groups.amax(dim=1, keepdim=True).to(wide).clamp(min=0)
        empty = (low == 0) & (high == 0)
        low, high = torch.where(empty, -1.0, low), torch.where(empty, 1.0, high)
        scale = (high - low) / (2**self.bits - 1)
        return scale, torch.round(-low / scale)

    def quantize(self, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes (as floats) of 2-D `groups`, with their scale and zero point."""
        if self.scheme == "affine" and groups.dtype == torch.bfloat16:
            groups = groups.float()
        scale, zero_point = self.qparams(groups)
        # 0 / 0, where the scale of a 16-bit weight underflows, dequantizes to 0.
        codes = groups.clone().div_(scale).round_().nan_to_num_(nan=0.0)
        if self.scheme == "affine":
            codes.add_(zero_point)
        return codes.clamp_(self.quant_min, self.quant_max), scale, zero_point

    def quantize_dequantize(self, tensor: Tensor) -> Tensor:
        """Round a tensor as INC will: what `recover()` of the packed layer gives, in the tensor's dtype."""
        rounded = []
        for groups in self.groups(tensor):
            codes, scale, zero_point = self.quantize(groups)
            rounded.append(((codes - zero_point).half() * scale.half()).to(tensor.dtype))
        return self.from_groups(rounded, tensor.shape)

    def stored_bits(self, shape: torch.Size) -> int:
        """Bits of the packed codes, scales and zero points, rows filled up to whole 32-bit words.

        INC stores zero points for symmetric weights too.
        """
        rows = shape[0] if len(shape) > 1 else 1
        inputs = shape[1:].numel() if len(shape) > 1 else shape.numel()
        per_word = WORD_BITS // self.bits
        groups = 1 if self.group_size is None else -(-inputs // self.group_size)
        words = -(-inputs // per_word) * rows + groups * -(-rows // per_word)
        return words * WORD_BITS + groups * rows * SCALE_BITS
