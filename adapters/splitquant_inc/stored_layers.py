"""What INC stores for a quantized layer, and what it dequantizes to."""

from __future__ import annotations

from collections.abc import Set
from typing import Any, cast

from neural_compressor.torch.algorithms.weight_only.hqq.core import HQQLinear
from neural_compressor.torch.algorithms.weight_only.modules import INCWeightOnlyLinear
from torch import Tensor, nn

from splitquant_plugins.backends import StoredWeight
from splitquant_plugins.modules import SplitLinear, layer_of_part

PACKED = ("qweight", "scales", "qzeros", "g_idx")
QUANTIZED = (INCWeightOnlyLinear, HQQLinear)


def quantized_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that INC has put in, parts counted one by one, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QUANTIZED)}


def dequantized(module: Any) -> Tensor:
    """Return a quantized module's weight [out, in], as its forward pass uses it."""
    if isinstance(module, HQQLinear):
        return cast(Tensor, module.dequantize_weight()).float()
    return cast(Tensor, module.recover()).float()


def stored_layers(model: nn.Module, transposed: Set[str] = frozenset()) -> dict[str, list[StoredWeight]]:
    """Return what INC stores, by the float layer's name, one entry per part.

    `transposed` names the layers whose float weight was [in, out], as transformers' Conv1D has it. The bits are
    those of the packed codes, scales, zero points and, where there is one, group index.
    """
    splits = layer_of_part(model)
    layers: dict[str, list[StoredWeight]] = {}
    for name, module in quantized_layers(model).items():
        layer = splits.get(name, name)
        split = model.get_submodule(layer)
        flip = split.transposed if isinstance(split, SplitLinear) else name in transposed
        weight = dequantized(module)
        bits = 8 * sum(buffer.numel() * buffer.element_size() for buffer in _packed(module))
        layers.setdefault(layer, []).append(StoredWeight(weight.t() if flip else weight, bits))
    return layers


def _packed(module: nn.Module) -> list[Tensor]:
    if isinstance(module, HQQLinear):
        stored = module.q_weight
        nested = [each for each in (stored.scale, stored.zero) if not isinstance(each, Tensor)]
        flat = [each for each in (stored.scale, stored.zero) if isinstance(each, Tensor)]
        return [stored.val, *flat, *(tensor for each in nested for tensor in (each.val, each.scale, each.zero))]
    return [module._buffers[name] for name in PACKED if module._buffers.get(name) is not None]  # type: ignore[misc]
