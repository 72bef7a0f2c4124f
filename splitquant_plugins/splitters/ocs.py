"""Outlier channel splitting (arXiv 1901.09504), written as parts that sum to the weight."""

from __future__ import annotations

import math
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


class OcsOptions(SplitterOptions):
    """Options of the `ocs` splitter.

    `ratio`: splits as a fraction of the number of input channels (the paper uses 0.01 to 0.05).
    """

    ratio: float = Field(default=0.02, gt=0, le=1)


class OcsSplitter(Splitter):
    """Share the input channels that hold the largest weights between parts.

    OCS duplicates an input channel and halves its weights. Here the copy of the channel lives in another part,
    which costs a whole layer where OCS costs one channel, and keeps the layer's shape. With a grid, the halves
    are w/2 -/+ a quarter of a step, so that rounding them adds up to rounding w (section 3.3 of the paper).
    A channel that is chosen again is shared by one more part.
    """

    Options: ClassVar[type[SplitterOptions]] = OcsOptions

    def split(self, tensor: Tensor, plan: TensorPlan, grid: Grid | None = None) -> Sequence[Tensor]:
        """Return at most `plan.k` parts that sum to `tensor`, but for eps times the last part (see `complete`).

        Input channels are the last dimension of a 2-D tensor, dimension 1 otherwise; a 1-D tensor stays whole.
        """
        if plan.k == 1 or tensor.ndim < 2 or tensor.numel() == 0:
            return [tensor]
        options = plan.options if isinstance(plan.options, OcsOptions) else OcsOptions()
        inputs = tensor.shape[1]
        times = share_counts(tensor, math.ceil(options.ratio * inputs), plan.k)
        parts_wanted = int(times.max())
        shape = [1] * tensor.ndim
        shape[1] = inputs
        number = times.reshape(shape)
        # quarter steps of the grid that the shared tensor will have, as nearly as it is known beforehand
        step = _step(tensor / number, grid)
        shares = []
        for part in range(1, parts_wanted):
            offset = (part - (number - 1) / 2) * step / number
            shares.append(torch.where(number > part, tensor / number + offset, torch.zeros_like(tensor)))
        # the last part holds the channels that are not shared, and the remainder of the others
        return complete(tensor, shares)


def share_counts(tensor: Tensor, splits: int, k: int) -> Tensor:
    """How many parts share each input channel, int64 [inputs], after `splits` splits of the largest one."""
    peak = tensor.detach().abs().transpose(0, 1).flatten(1).amax(dim=1).double()
    times = torch.ones_like(peak, dtype=torch.long)
    for _ in range(splits):
        size = torch.where(times < k, peak / times, torch.full_like(peak, -1))
        times[size.argmax()] += 1
    return times.clamp(max=k)


def _step(tensor: Tensor, grid: Grid | None) -> Tensor:
    """Width of a step of the grid at every weight; zero without a grid."""
    if grid is None:
        return torch.zeros_like(tensor)
    steps = [grid.qparams(groups)[0].to(groups.dtype).expand_as(groups) for groups in grid.groups(tensor)]
    return grid.from_groups(steps, tensor.shape)
