"""What quanto stores for a quantized layer, and what it dequantizes to."""

from __future__ import annotations

from typing import cast

from optimum.quanto import QTensor
from optimum.quanto.nn import QModuleMixin
from torch import Tensor, nn

from splitquant_plugins.backends import StoredWeight
from splitquant_plugins.modules import layer_of_part


def stored_layers(model: nn.Module) -> dict[str, list[StoredWeight]]:
    """Return what every quantized layer stores, by the name it had when it was float, a list of its parts."""
    layers: dict[str, list[StoredWeight]] = {}
    owners = layer_of_part(model)
    for name, module in model.named_modules():
        if isinstance(module, QModuleMixin) and isinstance(module.weight, QTensor):
            weight = module.weight.dequantize()
            layers.setdefault(owners.get(name, name), []).append(StoredWeight(weight, 8 * stored_bytes(module.weight)))
    return layers


def stored_bytes(weight: Tensor) -> int:
    """Bytes of a quanto weight: packed codes, scales and shifts."""
    names, _ = cast(QTensor, weight).__tensor_flatten__()
    total = 0
    for name in names:
        inner = getattr(weight, name)
        packed = getattr(inner, "_data", inner)
        total += packed.numel() * packed.element_size()
    return total
