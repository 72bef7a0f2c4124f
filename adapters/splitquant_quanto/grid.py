"""The grid that quanto rounds a weight to, with the zero-exact optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from optimum.quanto import AbsmaxOptimizer, AffineOptimizer, MaxOptimizer, qint2, qint4, qint8, quantize_weight
from torch import Tensor

from splitquant_plugins.errors import ConfigError
from splitquant_plugins.grid import Granularity, Scheme, UniformGrid
from splitquant_quanto.optimizer import ZeroExactOptimizer, with_four_bits

QTYPES = {2: qint2, 4: qint4, 8: qint8}


def group_size_of(in_features: int, bits: int) -> int | None:
    """Return the group size that quanto takes for a weight: at most 128, None for whole rows.

    Only INT2 and INT4 weights with more than 128 inputs are grouped, by the largest of 128, 96, 64 and 32
    that divides their number.
    """
    if bits >= 8 or in_features <= 128:
        return None
    return next((size for size in (128, 96, 64, 32) if in_features % size == 0), None)


def kept_by_tinygemm(shape: torch.Size, dtype: torch.dtype, bits: int) -> bool:
    """Whether quanto keeps a weight in the format of torch's own int4 kernel, on a CPU too."""
    size = group_size_of(shape[1:].numel(), bits)
    return (bits, dtype, size, len(shape)) == (4, torch.bfloat16, 128, 2)


def tinygemm_shift(scale: Tensor, shift: Tensor) -> Tensor:
    """The shift that comes back from torch's int4 kernel: it holds 8 · scale − shift in its place, and rounds it."""
    half = 8 * scale
    return half - (-shift + half)


def refuse_tinygemm_rows(shape: torch.Size, dtype: torch.dtype, bits: int, device: str = "cpu") -> None:
    """Raise ConfigError for a weight that torch's int4 kernel cannot hold, where quanto would fail inside."""
    if device == "cpu" and kept_by_tinygemm(shape, dtype, bits) and shape[0] % 16:
        raise ConfigError(
            "quanto keeps bfloat16 INT4 weights in groups of 128 as torch's int4 kernel does, for a multiple of 16 "
            f"outputs, not {shape[0]}: leave the layer out of quantization, or convert the model to float32 or float16"
        )


@dataclass(frozen=True)
class QuantoGrid:
    """quanto's weights: INT2 and INT4 affine per row or group, INT8 symmetric per row."""

    bits: int

    def __post_init__(self) -> None:
        if self.bits not in QTYPES:
            raise ConfigError(f"bits={self.bits}: quanto has weights of 2, 4 and 8 bits")

    @property
    def scheme(self) -> Scheme:
        return "symmetric" if self.bits == 8 else "affine"

    @property
    def granularity(self) -> Granularity:
        """Per channel; quanto groups the rows of wide layers by itself."""
        return "channel"

    @property
    def group_size(self) -> int | None:
        """None: it follows from each weight's shape."""
        return None

    @property
    def quant_min(self) -> int:
        return self._uniform(torch.Size([1, 1])).quant_min

    @property
    def quant_max(self) -> int:
        return self._uniform(torch.Size([1, 1])).quant_max

    @property
    def whole(self) -> QuantoWholeGrid:
        return QuantoWholeGrid(self.bits)

    def _uniform(self, shape: torch.Size) -> UniformGrid:
        size = group_size_of(shape[1:].numel(), self.bits)
        return UniformGrid(self.bits, self.scheme, "group" if size else "channel", size)

    def groups(self, tensor: Tensor) -> tuple[Tensor, ...]:
        return self._uniform(tensor.shape).groups(tensor)

    def from_groups(self, groups: Sequence[Tensor], shape: torch.Size) -> Tensor:
        return self._uniform(shape).from_groups(groups, shape)

    def qparams(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point of 2-D `groups`, each of shape [groups, 1]."""
        scale, zero_point = self._uniform(torch.Size([1, 1])).qparams(groups)
        # A group of a wide weight, or a row as long, which loses little by a scale of few bits.
        if (self.bits, groups.dtype, groups.shape[1]) == (4, torch.bfloat16, 128):
            scale = with_four_bits(scale)
            low = groups.amin(dim=1, keepdim=True).clamp(max=0)
            zero_point = (self.quant_min - torch.round(low / scale)).clamp(self.quant_min, self.quant_max)
        return scale, zero_point

    def scale_significant_bits(self, tensor: Tensor) -> int:
        """How many bits the scales of a tensor's parts have, where torch's int4 kernel holds them; else 0: all."""
        return 4 if kept_by_tinygemm(tensor.shape, tensor.dtype, self.bits) else 0

    def quantize_dequantize(self, tensor: Tensor) -> Tensor:
        """Round a weight as quanto does; any number of rows, which torch's int4 kernel could not hold."""
        if self.bits == 8:
            scale = AbsmaxOptimizer()(tensor, qtype=qint8, axis=0)
            return quantize_weight(tensor, qtype=qint8, axis=0, scale=scale).dequantize()
        size = group_size_of(tensor.shape[1:].numel(), self.bits)
        scale, shift = self._optimizer()(tensor, qtype=QTYPES[self.bits], axis=0, group_size=size)
        codes = torch.ops.quanto.quantize_affine(
            tensor, bits=self.bits, axis=0, group_size=size, scale=scale, shift=shift
        )
        if kept_by_tinygemm(tensor.shape, tensor.dtype, self.bits):
            shift = tinygemm_shift(scale, shift)
        rounded: Tensor = (scale * codes).sub_(shift).reshape(tensor.shape)
        return rounded

    def _optimizer(self) -> AffineOptimizer:
        return ZeroExactOptimizer()

    def stored_bits(self, shape: torch.Size) -> int:
        """Bits that a weight of this shape takes: codes, and 32 for each scale and each shift."""
        uniform = self._uniform(shape)
        groups = sum(part.shape[0] for part in uniform.groups(torch.empty(shape, device="meta")))
        return shape.numel() * self.bits + groups * (32 if self.bits == 8 else 64)


@dataclass(frozen=True)
class QuantoWholeGrid(QuantoGrid):
    """quanto's own grid: below 8 bits from the lowest to the highest value, so that 0 may lie between two codes.

    `qparams` and `groups` are those of QuantoGrid; `quantize_dequantize` tells the difference.
    """

    @property
    def free_zero(self) -> bool:
        """Whether any value can be the zero."""
        return self.bits < 8

    @property
    def whole(self) -> QuantoWholeGrid:
        return self

    def _optimizer(self) -> AffineOptimizer:
        return MaxOptimizer()
