"""Percentile clipping that loses nothing: what the clip cuts off is the second part."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field

from splitquant_plugins.splitters._exact import complete
from splitquant_plugins.splitters.base import Splitter, SplitterOptions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from splitquant_plugins.grid import Grid
    from splitquant_plugins.plan import TensorPlan


class PercentileOptions(SplitterOptions):
    """Options of the `percentile` splitter.

    `percentile`: percentile of the magnitudes at which the first part is clipped.
    """

    percentile: float = Field(default=99.0, gt=0, lt=100)


class PercentileSplitter(Splitter):
    """The first part is the tensor clipped at a percentile of its magnitudes, the second the excess."""

    Options: ClassVar[type[SplitterOptions]] = PercentileOptions

    def split(self, tensor: Tensor, plan: TensorPlan, grid: Grid | None = None) -> Sequence[Tensor]:
        """Return one part for k = 1 and two for every larger k; they sum to `tensor`.

        The excess w - clip(w) is exact up to twice the clip (Sterbenz); beyond, the sum differs from w by at
        most eps times the excess (see `complete`).
        """
        options = plan.options if isinstance(plan.options, PercentileOptions) else PercentileOptions()
        if plan.k == 1 or tensor.numel() == 0:
            return [tensor]
        by_channel = plan.granularity == "channel" and tensor.ndim > 1
        rows = tensor.reshape(tensor.shape[0] if by_channel else 1, -1)
        magnitude = rows.abs()
        # kthvalue, as quantile has a limit on its input's size
        rank = max(1, round(options.percentile / 100 * magnitude.shape[1]))
        limit = magnitude.kthvalue(rank, dim=1, keepdim=True).values
        clipped = torch.minimum(torch.maximum(rows, -limit), limit)
        return complete(tensor, [clipped.reshape(tensor.shape)])
