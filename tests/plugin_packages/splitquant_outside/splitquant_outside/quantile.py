"""A splitter whose parts hold equally many values."""

import torch
from pydantic import Field

from splitquant_plugins import Splitter, SplitterOptions


class QuantileOptions(SplitterOptions):
    """`spread` moves the quantiles away from the middle."""

    spread: float = Field(1.0, gt=0, le=1)


class QuantileSplitter(Splitter):
    Options = QuantileOptions
    splits_bias = True

    def split(self, tensor, plan, grid):
        """Cut at the quantiles 1/k, 2/k, ... of the values."""
        at = 0.5 + (torch.arange(1, plan.k) / plan.k - 0.5) * plan.options.spread
        cuts = torch.quantile(tensor.double().flatten(), at.double())
        label = torch.bucketize(tensor.double(), cuts)
        return [torch.where(label == part, tensor, torch.zeros_like(tensor)) for part in range(plan.k)]
