"""Outlier halving: the largest weights are shared equally by two parts."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field

from splitquant_plugins.splitters.base import Splitter, SplitterOptions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from splitquant_plugins.grid import Grid
    from splitquant_plugins.plan import TensorPlan


class HalveOptions(SplitterOptions):
    """Options of the `halve` splitter.

    `threshold`: weights whose magnitude exceeds this fraction of the largest magnitude are shared.
    """

    threshold: float = Field(default=0.5, gt=0, lt=1)


class HalveSplitter(Splitter):
    """Two parts: half of each outlier goes into the second, everything else stays in the first.

    The idea of PPQ's horizontal layer split. Halving a float is exact, so the parts sum to the tensor bit for
    bit (subnormal numbers may lose their last bit in one half, which the other half makes up for).
    """

    Options: ClassVar[type[SplitterOptions]] = HalveOptions

    def split(self, tensor: Tensor, plan: TensorPlan, grid: Grid | None = None) -> Sequence[Tensor]:
        """Return one part for k = 1, and two for every larger k."""
        options = plan.options if isinstance(plan.options, HalveOptions) else HalveOptions()
        if plan.k == 1:
            return [tensor]
        magnitude = tensor.abs()
        if plan.granularity == "channel" and tensor.ndim > 1:
            peak = magnitude.reshape(tensor.shape[0], -1).amax(dim=1)
            peak = peak.reshape(-1, *[1] * (tensor.ndim - 1))
        else:
            peak = magnitude.amax()
        half = torch.where(magnitude > options.threshold * peak, tensor / 2, torch.zeros_like(tensor))
        return [tensor - half, half]
