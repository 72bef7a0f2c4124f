"""A quanto optimizer whose grid has an exact zero.

quanto's INT2 and INT4 weights are affine with a shift in floating point, x = scale · code − shift, so that 0
lies between two codes. A part of a split layer is mostly zeros, and each of them would come back as up to half
a step. Here the range includes 0 and the shift is a whole number of steps, so a zero comes back as 0.
"""

from __future__ import annotations

import torch
from optimum.quanto import AffineOptimizer, MaxOptimizer, qtype
from torch import Tensor, nn


class ZeroExactOptimizer(AffineOptimizer):
    """Give the scale of another affine optimizer, and a shift that is a multiple of it.

    A range that does not include 0 is widened to it first. A group of zeros has scale 1.
    """

    def __init__(self, inner: AffineOptimizer | None = None) -> None:
        self.inner = MaxOptimizer() if inner is None else inner

    def __call__(
        self, base: Tensor, qtype: qtype, axis: int, group_size: int | None = None, zeropoint: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return scale and shift of a weight, per row or group; see quanto's AffineOptimizer."""
        scale, shift = super().__call__(base, qtype, axis, group_size)
        if (qtype.bits, base.dtype, group_size) == (4, torch.bfloat16, 128):
            # quanto keeps this format as tinygemm does, with 8 · scale − shift in bfloat16 instead of the shift.
            # A scale of 4 significant bits makes all its multiples up to 15 exact, and so the zero.
            scale = with_four_bits(scale)
            shift = torch.round(shift / scale) * scale
        if zeropoint:
            shift = torch.round(shift / scale).to(torch.uint8)
        return scale, shift

    @torch.no_grad()
    def optimize(self, base: Tensor, qtype: qtype, axis: int | None) -> tuple[Tensor, Tensor]:
        """Return scale and shift, each of the shape of `base` reduced over all but `axis`."""
        levels = 2**qtype.bits - 1
        if type(self.inner) is MaxOptimizer:
            dim = list(range(1, base.ndim)) if axis == 0 else list(range(0, base.ndim - 1))
            if axis is None:
                dim = list(range(base.ndim))
            low = base.amin(dim=dim, keepdim=True).clamp(max=0)
            high = base.amax(dim=dim, keepdim=True).clamp(min=0)
            scale, shift = (high - low) / levels, -low
        else:
            scale, shift = self.inner.optimize(base, qtype, axis)
            low, high = (-shift).clamp(max=0), (levels * scale - shift).clamp(min=0)
            includes_zero = (shift >= 0) & (shift <= levels * scale)
            scale = torch.where(includes_zero, scale, (high - low) / levels)
            shift = torch.where(includes_zero, shift, -low)
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
        return scale, torch.round(shift / scale).clamp(0, levels) * scale


def with_four_bits(scale: Tensor) -> Tensor:
    """Round positive scales up to 4 significant bits, or down by less than a quarter of a step over a range.

    The ends of a part's range are themselves rounded to 8 bits, and must not make its scale the next larger one.
    """
    mantissa, exponent = torch.frexp(scale.float())
    return torch.ldexp(torch.ceil(mantissa * 16 - 0.125) / 16, exponent).to(scale.dtype)


def make_zero_exact(module: nn.Module) -> None:
    """Wrap the optimizer of a quanto module below 8 bits; quanto's 8-bit weights are symmetric and exact."""
    qtype = getattr(module, "weight_qtype", None)
    optimizer = getattr(module, "optimizer", None)
    if qtype is None or qtype.bits >= 8 or not isinstance(optimizer, AffineOptimizer):
        return
    if not isinstance(optimizer, ZeroExactOptimizer):
        module.optimizer = ZeroExactOptimizer(optimizer)
