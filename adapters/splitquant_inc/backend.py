"""Intel Neural Compressor as a backend of the command line and of the matrix."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib import import_module, metadata
from importlib.util import find_spec
from typing import Any, ClassVar

import torch
from torch import nn

from splitquant_plugins.backends import (
    ROUND_TO_NEAREST,
    Backend,
    Batch,
    Packer,
    QuantizedModel,
    Support,
    WeightFormat,
    quantized_by,
)
from splitquant_plugins.checkpoints.saved_layers import SavedLayers
from splitquant_plugins.errors import ConfigError, InputError
from splitquant_plugins.grid import Grid
from splitquant_plugins.passes.base import ModelPass

DISTRIBUTIONS = ("neural-compressor", "neural-compressor-pt")


class IncBackend(Backend):
    """INC's RTN, weights only, of Linear layers.

    INC 3.10 wraps 8-bit asymmetric weights, so that INT8 is symmetric only.
    """

    name = "inc"
    extra = "inc"
    packages = ("neural-compressor",)
    storage = "splitquant_inc.storage"
    support: ClassVar = {
        "int2": Support(("channel", "group"), ("affine", "symmetric")),
        "int4": Support(("channel", "group"), ("affine", "symmetric")),
        "int8": Support(("channel", "group"), ("symmetric",)),
    }
    default_group_size = 32
    methods = ("rtn", "hqq", "gptq")
    calibrated = ("gptq",)
    library = "neural_compressor.torch"

    def require(self) -> None:
        for name in DISTRIBUTIONS:
            try:
                metadata.version(name)
            except metadata.PackageNotFoundError:
                continue
            return
        super().require()

    def grid(self, chosen: WeightFormat) -> Grid:
        """Return RTN's grid of that format; other methods have none that is known beforehand."""
        from splitquant_inc.grid import IncRtnGrid

        return IncRtnGrid(chosen.bits, chosen.scheme, chosen.group_size)

    def packer(self, chosen: WeightFormat) -> Packer | None:
        """Return what packs single weights as RTN does; other methods choose codes by data, or with a search."""
        if chosen.method != ROUND_TO_NEAREST:
            return None
        _import_in_order()
        from splitquant_inc.grid import IncRtnGrid
        from splitquant_inc.packer import IncRtnPacker

        return IncRtnPacker(IncRtnGrid(chosen.bits, chosen.scheme, chosen.group_size), _rtn(chosen))

    def saved_layers(self) -> SavedLayers:
        """Return how INC's layers are saved."""
        _import_in_order()
        from splitquant_inc.saved_layers import IncLayers

        return IncLayers()

    def quantize(
        self,
        model: nn.Module,
        chosen: WeightFormat,
        first: ModelPass | None = None,
        batches: Iterable[Batch] = (),
        ignore: Sequence[str] | None = None,
    ) -> QuantizedModel:
        """Quantize in place with `first + RTNConfig(...)`, HQQConfig or GPTQConfig.

        Where `ignore` is None, INC leaves the head of a language model float. Only GPTQ uses the batches. HQQ's zero
        points are not quantized.
        """
        _import_in_order()
        from neural_compressor.torch.quantization import convert, prepare

        from splitquant_inc.storage import state_of
        from splitquant_inc.stored_layers import stored_layers
        from splitquant_inc.weight_only import chosen_layers, leave_float, widen_bfloat16
        from splitquant_plugins.passes.module_tree import is_transformers_conv1d

        transposed = {name for name, module in model.named_modules() if is_transformers_conv1d(module)}
        recipe = _recipe(chosen, model)
        if ignore is not None:
            leave_float(recipe, ignore, model)

        def work() -> nn.Module:
            if first is None and chosen.method == ROUND_TO_NEAREST:
                widen_bfloat16(model, chosen_layers(recipe, model))
            prepared = prepare(model, recipe if first is None else first + recipe)
            if not getattr(prepared, "is_prepared", False):
                raise InputError(_nothing(prepared))
            if chosen.method in self.calibrated:
                with torch.no_grad():
                    for batch in batches:
                        prepared(**batch)
            converted: nn.Module = convert(prepared)
            return converted

        quantized = quantized_by(
            work, first, layers=lambda made: stored_layers(made, transposed), state=lambda made: state_of(made)[0]
        )
        if not quantized.layers:
            raise InputError(_nothing(quantized.model))
        return quantized


def _import_in_order() -> None:
    if find_spec("transformers") is not None:
        import_module("transformers")  # INC fails where it is imported later


def _nothing(model: nn.Module) -> str:
    return f"INC quantized no layer of this {type(model).__name__}; it takes Linear layers"


def _rtn(chosen: WeightFormat) -> Any:
    from neural_compressor.torch.quantization import RTNConfig

    group_size = -1 if chosen.group_size is None else chosen.group_size
    return RTNConfig(
        bits=chosen.bits, group_size=group_size, use_sym=chosen.scheme == "symmetric", use_layer_wise=False
    )


def _recipe(chosen: WeightFormat, model: nn.Module) -> Any:
    from neural_compressor.torch.quantization import GPTQConfig, HQQConfig

    if chosen.method == ROUND_TO_NEAREST:
        return _rtn(chosen)
    if chosen.scheme == "symmetric":
        raise ConfigError(f"backend inc has {chosen.method} with scheme 'affine' only")
    group_size = -1 if chosen.group_size is None else chosen.group_size
    if chosen.method == "hqq":
        recipe = HQQConfig(bits=chosen.bits, group_size=group_size, quant_zero=False)
        for name, module in model.named_modules():
            # INC packs the rows of whole channels into bytes, and cannot unpack what does not fill them.
            if isinstance(module, torch.nn.Linear) and group_size == -1 and module.out_features % (8 // chosen.bits):
                recipe.set_local(name, HQQConfig(dtype="fp32"))
        return recipe
    # INC looks a model without a folder of its own up on the Hub.
    path = getattr(model, "name_or_path", "") or "."
    return GPTQConfig(bits=chosen.bits, group_size=group_size, use_sym=False, model_path=path)
