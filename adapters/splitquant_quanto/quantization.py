"""Quantizing a model with quanto behind a pass."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from typing import cast

import torch
from optimum.quanto import HqqOptimizer, QTensor, freeze, quantize
from torch import Tensor, nn

from splitquant_plugins.errors import ConfigError, InputError
from splitquant_plugins.passes.base import ModelPass
from splitquant_plugins.passes.module_tree import is_transformers_conv1d
from splitquant_plugins.passes.select import matches
from splitquant_quanto.grid import QuantoGrid, refuse_tinygemm_rows

LAYERS = (nn.Linear, nn.Conv2d)


def refuse_activations(first: ModelPass) -> None:
    """Raise ConfigError where the pass splits activations, which quanto's weight-only recipes do not quantize."""
    if first.splits_activations:
        raise ConfigError(
            "activations=True: the quanto adapter quantizes weights only, and a split activation would gain "
            "nothing; use the pt2e or inc backend for activations"
        )


def quantize_after(
    first: ModelPass | None,
    model: nn.Module,
    weights: str,
    *,
    ignore: Sequence[str] = (),
    kinds: tuple[type[nn.Module], ...] = LAYERS,
    method: str = "rtn",
) -> nn.Module:
    """Run the pass `first`, then quantize and freeze the layers of those kinds; return the model.

    `ignore` are patterns of layer names that stay float. `method`, rtn or hqq, chooses scales and shifts. Raises
    InputError where no layer is quantized.
    """
    bits = int(weights.removeprefix("int"))
    for name, module in model.named_modules():  # parts have the shape of their layer
        if isinstance(module, kinds) and not _ignored(name, ignore):
            _refuse_what_quanto_cannot_hold(name, module, bits)
    if first is not None:
        refuse_activations(first)
        unsupported = [n for n, m in model.named_modules() if splittable(m) and not isinstance(m, kinds)]
        model = first.apply(model, grid=QuantoGrid(bits), ignore=[*ignore, *map(glob.escape, unsupported)])
    names = [name for name, module in model.named_modules() if isinstance(module, kinds) and not _ignored(name, ignore)]
    if not names:
        raise InputError(f"quanto finds no layer to quantize in {type(model).__name__}")
    quantize(model, weights=f"q{weights}", include=names, optimizer=HqqOptimizer() if method == "hqq" else None)
    with torch.no_grad():  # quanto's HQQ turns parameters into numbers, which torch warns about
        freeze(model)
    missed = [name for name in names if not isinstance(getattr(model.get_submodule(name), "weight", None), QTensor)]
    if missed:
        raise InputError(f"quanto did not quantize {len(missed)} of {len(names)} layers, {missed[0]} among them")
    return model


def _refuse_what_quanto_cannot_hold(name: str, module: nn.Module, bits: int) -> None:
    weight = cast("Tensor", module.weight)
    try:
        refuse_tinygemm_rows(weight.shape, weight.dtype, bits, weight.device.type)
    except ConfigError as error:
        raise ConfigError(f"{name or 'the model'}: {error}") from None


def splittable(module: nn.Module) -> bool:
    """Whether a module is of a kind that the pass splits, whatever quanto does with it."""
    return isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) or is_transformers_conv1d(module)


def _ignored(name: str, ignore: Sequence[str]) -> bool:
    return matches([name, name.rpartition(".")[0]], ignore)
