"""What a backend offers so that its weights can be made one at a time, without a model in memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor, nn

    from splitquant_plugins.grid import Grid
    from splitquant_plugins.streaming.headers import TensorSpec

# Tensors of a packed layer whose names start so count as its stored bits.
WEIGHT_PREFIX = "weight"


class Packer(ABC):
    """Quantizes single weights to what the backend saves for them; see `Backend.packer`.

    `grid` is the grid that weights are rounded to. `pack` is called from several threads at once.
    """

    grid: Grid

    @abstractmethod
    def quantized(self, model: nn.Module) -> Sequence[str]:
        """Names of the layers of an unsplit model, on the meta device, whose weight this backend quantizes."""

    @abstractmethod
    def left(self, model: nn.Module) -> Sequence[str]:
        """Patterns of names of layers that are not to be split, because this backend leaves them float."""

    @abstractmethod
    def spec(self, shape: torch.Size, dtype: torch.dtype, *, part: bool) -> dict[str, TensorSpec]:
        """Return what `pack` makes of a weight, by the names it is saved under within the layer."""

    @abstractmethod
    def pack(self, weight: Tensor, *, part: bool) -> dict[str, Tensor]:
        """Quantize a weight: one part of a split layer, or a layer that stays whole."""

    @abstractmethod
    def describe(self, folder: Path, model: nn.Module, layers: Sequence[str], same_as: Mapping[str, str]) -> None:
        """Write the files beside the tensors, but for the manifest.

        `layers` are the names of what was packed, parts and whole layers; `same_as` gives for tensors that are
        not stored the one that they share. `model` is the unsplit model on the meta device.
        """
