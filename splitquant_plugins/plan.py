"""What the steps of a pass hand to each other: the plan of a layer and of each of its tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from torch import Tensor

    from splitquant_plugins.grid import Granularity


class SplitterOptions(BaseModel):
    """Options of a splitter; a splitter that takes any subclasses this."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


@dataclass(frozen=True)
class TensorPlan:
    """How one tensor is to be split.

    `granularity` is that of the clustering: `tensor` (over all values) or `channel` (once per index of dimension 0,
    which for every layer type holds the output channels); never `group`. `second_moment`, where calibration data were
    given, is the mean of x xᵀ over the inputs x of the layer, shape [groups, d, d] with d = tensor[0].numel().
    """

    layer: str
    role: Literal["weight", "bias"]
    k: int
    splitter: str
    granularity: Granularity
    options: SplitterOptions
    seed: int = 0
    second_moment: Tensor | None = field(default=None, repr=False)


@dataclass(frozen=True)
class LayerPlan:
    """A layer that is to be split, as `splitquant_select_layer` answers it.

    `kind` names the layer type and comes back in `splitquant_build_module`. `weight` has the output channels
    in dimension 0, `bias` has shape [out] or is None; both may be views of what the layer stores.
    """

    kind: str
    weight: Tensor = field(repr=False)
    bias: Tensor | None = field(repr=False)
    granularity: Granularity = "tensor"
    groups: int = 1


@dataclass(frozen=True)
class Skip:
    """A layer that stays whole, and why; the reason goes into the manifest."""

    reason: str
