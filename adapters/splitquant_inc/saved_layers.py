"""INC's weight-only layers in transformers' `save_pretrained` and `from_pretrained`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from splitquant_inc.packing import AnyPacked, PackedHqq, empty_module
from splitquant_inc.storage import refuse_misfit, state_of
from splitquant_plugins.checkpoints.saved_layers import SavedLayers
from splitquant_plugins.errors import InputError, SkeletonMismatchError


class IncLayers(SavedLayers):
    """Packed codes, scales and zero points, of RTN, GPTQ and HQQ, and how they are packed."""

    def describe(self, model: nn.Module) -> dict[str, dict[str, Any]]:
        """Return how INC has packed each layer."""
        return {name: layer.model_dump() for name, layer in state_of(model)[1].items()}

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the tensors as they were packed; forward passes widen some in place."""
        return state_of(model)[0]

    def make(self, layer: nn.Module, described: Mapping[str, Any], tensors: dict[str, Tensor], name: str) -> nn.Module:
        """Make an INC layer."""
        try:
            packed: Any = TypeAdapter(AnyPacked).validate_python(dict(described))
        except ValidationError as error:
            raise InputError(f"config.json is damaged: layer {name} {error.errors()[0]['msg']}") from None
        refuse_misfit(layer, name, packed, "config.json")
        if isinstance(packed, PackedHqq):
            return packed.module(tensors, name)
        made = empty_module(packed)
        try:
            made.load_state_dict(tensors, strict=True, assign=True)
        except RuntimeError as error:
            raise SkeletonMismatchError(f"{name} was packed in another way: {' '.join(str(error).split())}") from None
        return made
