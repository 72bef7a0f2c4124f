"""quanto as a backend of the command line and of the matrix."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Sequence
from typing import ClassVar

from torch import nn

from splitquant_plugins.backends import (
    ROUND_TO_NEAREST,
    Backend,
    Batch,
    Packer,
    QuantizedModel,
    Support,
    WeightFormat,
    WeightRequest,
    quantized_by,
)
from splitquant_plugins.checkpoints.saved_layers import SavedLayers
from splitquant_plugins.errors import ConfigError
from splitquant_plugins.grid import Grid
from splitquant_plugins.passes.base import ModelPass


class QuantoBackend(Backend):
    """optimum-quanto, weights only: affine rows or groups at INT2 and INT4, symmetric rows at INT8."""

    name = "quanto"
    extra = "quanto"
    packages = ("optimum-quanto", "accelerate")
    storage = "splitquant_quanto.storage"
    support: ClassVar = {
        "int2": Support(("channel",), ("affine",)),
        "int4": Support(("channel",), ("affine",)),
        "int8": Support(("channel",), ("symmetric",)),
    }
    methods = ("rtn", "hqq")
    library = "optimum.quanto"

    def resolve(self, request: WeightRequest) -> WeightFormat:
        """Fill the gaps of a request; HQQ is for weights with a shift."""
        chosen = super().resolve(request)
        if chosen.method == "hqq" and chosen.scheme == "symmetric":
            raise ConfigError(f"backend quanto has no method 'hqq' at {request.weights}: choose int2 or int4")
        return chosen

    def grid(self, chosen: WeightFormat) -> Grid:
        from splitquant_quanto.grid import QuantoGrid

        return QuantoGrid(chosen.bits)

    def packer(self, chosen: WeightFormat) -> Packer | None:
        """Return what packs single weights as quanto does; None where values are not those rounded to."""
        if chosen.method != ROUND_TO_NEAREST:
            return None
        from splitquant_quanto.packer import QuantoPacker

        return QuantoPacker(chosen.bits)

    def saved_layers(self) -> SavedLayers:
        """Return how quanto's layers are saved."""
        from splitquant_quanto.saved_layers import QuantoLayers

        return QuantoLayers()

    def quantize(
        self,
        model: nn.Module,
        chosen: WeightFormat,
        first: ModelPass | None = None,
        batches: Iterable[Batch] = (),
        ignore: Sequence[str] | None = None,
    ) -> QuantizedModel:
        """Quantize and freeze in place; no example inputs are needed."""
        from splitquant_quanto.quantization import quantize_after
        from splitquant_quanto.stored_layers import stored_layers

        def work() -> nn.Module:
            whole = [glob.escape(name) for name in ignore or ()]
            return quantize_after(first, model, chosen.weights, ignore=whole, method=chosen.method)

        return quantized_by(work, first, layers=stored_layers)
