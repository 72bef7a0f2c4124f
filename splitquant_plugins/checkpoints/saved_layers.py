"""How the layers that a backend has quantized are saved by `save_pretrained`, and made anew by `from_pretrained`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class PartCodes:
    """The codes of a part, as bytes below 2^bits, and the codes that stand for zero, of a shape that extends to theirs.

    `rest` are the layer's tensors without those that held the codes.
    """

    codes: Tensor
    zeros: Tensor
    bits: int
    rest: dict[str, Tensor]


class SavedLayers(ABC):
    """What a backend knows of its layers on disk; see `Backend.saved_layers`."""

    @abstractmethod
    def describe(self, model: nn.Module) -> dict[str, dict[str, Any]]:
        """Return, by name, the layers that the backend has quantized, each with what JSON has to say of it.

        A model with none of them gives none. Raises InputError for a layer that is not ready to be saved.
        """

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """Return all tensors of the model, by the names that they are saved under: those of its modules."""
        return dict(model.state_dict())

    @abstractmethod
    def make(self, layer: nn.Module, described: Mapping[str, Any], tensors: dict[str, Tensor], name: str) -> nn.Module:
        """Make a quantized layer of its tensors, by their names within it.

        `layer` is the float layer, or the part of one, that it stands for, on the meta device; `name` is for errors.
        Raises SkeletonMismatchError where the three do not fit each other.
        """

    def described_in(self, folder: Path) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
        """Return what `describe` would say of the layers in a folder that the backend's packer described.

        Also, for each tensor that is not stored, the name of the one that it shares. For backends with a packer.
        """
        raise NotImplementedError

    def part_codes(self, described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> PartCodes | None:
        """Take the codes out of a layer's tensors; None where they are not plain codes with one for zero.

        Those that do are stored once for all parts of a split layer whose supports are disjoint.
        """
        return None

    def zero_codes(self, described: Mapping[str, Any], rest: Mapping[str, Tensor]) -> Tensor:
        """Return the zeros that `part_codes` found, from the other tensors."""
        raise NotImplementedError

    def with_codes(self, described: Mapping[str, Any], rest: Mapping[str, Tensor], codes: Tensor) -> dict[str, Tensor]:
        """Return the tensors that hold the codes, from which `part_codes` took them."""
        raise NotImplementedError
