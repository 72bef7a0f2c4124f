"""Zeros that stay zero under HQQ, whose zero points are real numbers.

HQQ dequantizes a code c as (c - z) s with a real z, so that the zeros of a part come back as up to half a step.
When INC has put its layer in the place of a part, the zero points are rounded to whole numbers here, and the
codes chosen anew for them from the float weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from splitquant_plugins.modules import SplitModule
from splitquant_plugins.plugins import Plugins


def keep_zeros_exact(model: nn.Module, plugins: Plugins) -> None:
    """Correct every part of the model at the moment that HQQ replaces it."""
    for module in model.modules():
        if isinstance(module, SplitModule):
            module.notify(_Corrector(module, plugins))


class _Corrector:
    """Holds the float weights of one split layer until all its parts are replaced."""

    def __init__(self, split: SplitModule, plugins: Plugins) -> None:
        layers: list[Any] = split.parts()
        self._floats: dict[str, Any] = {
            name: layer.weight for name, layer in zip(split.part_names, layers, strict=True)
        }
        self._plugins = plugins

    def __call__(self, split: SplitModule, part: str, module: nn.Module) -> None:
        from neural_compressor.torch.algorithms.weight_only.hqq.core import HQQLinear

        if isinstance(module, HQQLinear):
            round_zero_points(module, self._floats[part].detach())
            if not any(isinstance(each, nn.Linear) and each.weight is not None for each in split.parts()):
                split.notify(self._plugins.part_replaced)  # drops the float weights
        self._plugins.part_replaced(split, part, module)


@torch.no_grad()
def round_zero_points(module: Any, weight: Tensor) -> None:
    """Round the zero points of an HQQLinear, and choose its codes anew from the float `weight` [out, in].

    A group that holds zeros gets a zero point within its codes.
    """
    from neural_compressor.torch.algorithms.weight_only.hqq.bitpack import Packer
    from neural_compressor.torch.algorithms.weight_only.hqq.core import HQQTensorHandle

    stored = module.q_weight
    meta = stored.meta_info
    highest = 2**meta.nbits - 1
    scale = HQQTensorHandle.dequantize(stored.scale) if stored.is_scale_quantized() else stored.scale
    values = weight.float() if meta.group_size is None else weight.float().reshape(meta.group_size, -1)
    zero_point = stored.zero.float().round()
    zero_point = torch.where((values == 0).any(dim=0, keepdim=True), zero_point.clamp(0, highest), zero_point)
    codes = (values / scale.float() + zero_point).round().clamp(0, highest)
    stored.val = Packer.get_pack_fn(meta.nbits)(codes)
    stored.zero = zero_point.to(stored.zero.dtype)
