"""The grid that PT2E's min-max observers and decomposed operators round a weight to, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from splitquant_plugins.errors import ConfigError
from splitquant_plugins.grid import Granularity, GroupsOfRows, Scheme, UniformGrid, next_power_of_two

EPS = torch.finfo(torch.float32).tiny  # floors no scale but that of an all-zero group
SCHEMES: dict[torch.qscheme, tuple[Scheme, Granularity]] = {
    torch.per_tensor_affine: ("affine", "tensor"),
    torch.per_tensor_symmetric: ("symmetric", "tensor"),
    torch.per_channel_affine: ("affine", "channel"),
    torch.per_channel_symmetric: ("symmetric", "channel"),
}


@dataclass(frozen=True)
class Pt2eGrid(GroupsOfRows):
    """Codes from `lowest` to `highest`, scales in float32 and at least `eps`.

    An affine scale is (max - min) / (highest - lowest) over a range that includes 0, with an integer zero
    point. A symmetric one is max|w| / ((highest - lowest) / 2): the restricted rule of NPUs where the codes are
    -(2^(b-1) - 1) to 2^(b-1) - 1, and PT2E's own, which clips the largest positive values, where they start
    one lower. Codes may be unsigned (`lowest` 0) where the scheme is affine. `power_of_two_scale` rounds scales up
    to a power of two, as targets that shift instead of multiplying have them.
    """

    lowest: int
    highest: int
    scheme: Scheme = "affine"
    granularity: Granularity = "channel"
    eps: float = EPS
    power_of_two_scale: bool = False

    def __post_init__(self) -> None:
        unsigned = self.lowest == 0 and self.scheme == "affine"
        if not (self.lowest < 0 or unsigned) or self.highest <= 0 or not 2 <= self.bits <= 8:
            raise ConfigError(
                f"codes {self.lowest} to {self.highest}: PT2E's weights have 2 to 8 bits and a code for 0; unsigned "
                "ones are affine"
            )
        if self.granularity == "group":
            raise ConfigError("granularity 'group': PT2E's decomposed operators have scales per tensor or channel")
        self._uniform  # noqa: B018 - it checks the other fields

    @property
    def _uniform(self) -> UniformGrid:
        return UniformGrid(self.bits, self.scheme, self.granularity)

    @property
    def bits(self) -> int:
        return (self.highest - self.lowest).bit_length()

    @property
    def group_size(self) -> int | None:
        return None

    @property
    def quant_min(self) -> int:
        return self.lowest

    @property
    def quant_max(self) -> int:
        return self.highest

    def qparams(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point of 2-D `groups`, each float32 of shape [groups, 1]."""
        groups = groups.float()
        low = groups.amin(dim=1, keepdim=True).clamp(max=0)
        high = groups.amax(dim=1, keepdim=True).clamp(min=0)
        floor = torch.tensor(self.eps, device=groups.device)
        if self.scheme == "symmetric":
            scale = torch.maximum(torch.maximum(-low, high) / ((self.highest - self.lowest) / 2), floor)
            return self._allowed(scale), torch.zeros_like(scale)
        scale = self._allowed(torch.maximum((high - low) / (self.highest - self.lowest), floor))
        return scale, (self.lowest - torch.round(low / scale)).clamp(self.lowest, self.highest)

    def _allowed(self, scale: Tensor) -> Tensor:
        return next_power_of_two(scale) if self.power_of_two_scale else scale

    def quantize(self, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes (as floats) of 2-D `groups`, with their scale and zero point."""
        scale, zero_point = self.qparams(groups)
        codes = torch.round(groups.float() * (1.0 / scale)) + zero_point  # the operators multiply by 1/scale
        return codes.clamp(self.lowest, self.highest), scale, zero_point

    def quantize_dequantize(self, tensor: Tensor) -> Tensor:
        """Round a weight as convert_pt2e does; the arithmetic is float32, the answer has the weight's dtype."""
        rounded = []
        for groups in self.groups(tensor):
            codes, scale, zero_point = self.quantize(groups)
            rounded.append(((codes - zero_point) * scale).to(tensor.dtype))
        return self.from_groups(rounded, tensor.shape)

    def stored_bits(self, shape: torch.Size) -> int:
        """Bits that a weight of this shape takes in packed form; PT2E itself stores a byte for each code."""
        return self._uniform.stored_bits(shape)
