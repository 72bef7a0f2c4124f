"""What a splitter is: one tensor in, parts that sum to it out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from splitquant_plugins.plan import SplitterOptions

__all__ = ["Splitter", "SplitterOptions", "StandIn"]

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from splitquant_plugins.grid import Grid
    from splitquant_plugins.plan import TensorPlan


@dataclass(frozen=True)
class StandIn:
    """The splitter that does another's work, and why; the manifest records both."""

    splitter: str
    why: str


class Splitter(ABC):
    """A strategy that turns one tensor into parts.

    `needs_grid`: the splitter cannot work without the grid of the recipe it precedes.
    `splits_bias`: it also splits biases; otherwise a bias stays in one part.
    `uses_calibration`: it makes use of `plan.second_moment`.
    `always_splits`: it splits a layer also where the recipe's grid is known and makes more of an error of the parts
    than of the whole, which the manifest and a warning then say; of other splitters the layer stays whole.
    """

    Options: ClassVar[type[SplitterOptions]] = SplitterOptions
    needs_grid: ClassVar[bool] = False
    splits_bias: ClassVar[bool] = False
    uses_calibration: ClassVar[bool] = False
    always_splits: ClassVar[bool] = False

    def stand_in(self, grid: Grid | None) -> StandIn | None:
        """Return the splitter that should split a layer of that grid instead; None: this one."""
        return None

    @abstractmethod
    def split(self, tensor: Tensor, plan: TensorPlan, grid: Grid | None) -> Sequence[Tensor]:
        """Return at most `plan.k` parts of `tensor`'s shape and dtype that sum to it.

        The parts are summed in order, in the tensor's own dtype. Output channels are dimension 0.
        Raises CannotSplit with a reason where the tensor should stay whole.
        """
