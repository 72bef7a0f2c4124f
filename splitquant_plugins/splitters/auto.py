"""`auto`, the default: parts for the recipe's grid where it is known, and the paper's k-means where it is not."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from splitquant_plugins.errors import ConfigError
from splitquant_plugins.splitters.base import Splitter, StandIn

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from splitquant_plugins.grid import Grid
    from splitquant_plugins.plan import TensorPlan

FOR_THE_GRID = StandIn("grid", "the grid that the parts will be rounded to is known")
WITHOUT_GRID = StandIn("kmeans", "no grid is known that the parts will be rounded to: the paper's k-means")


class AutoSplitter(Splitter):
    """Lets `grid` or `kmeans` do the work, layer by layer; see `stand_in`."""

    uses_calibration: ClassVar[bool] = True

    def stand_in(self, grid: Grid | None) -> StandIn:
        """Return `grid` where the layer's grid is known, else `kmeans`."""
        return WITHOUT_GRID if grid is None else FOR_THE_GRID

    def split(self, tensor: Tensor, plan: TensorPlan, grid: Grid | None) -> Sequence[Tensor]:
        """Never called: the pass asks for the stand-in and lets it split."""
        raise ConfigError(f"{plan.layer}: splitter 'auto' names the splitter to use with stand_in(grid)")
