"""Modules that hold a packed layer's tensors while transformers loads them, by the names that they have in the file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

if TYPE_CHECKING:
    from splitquant_plugins.checkpoints.headers import TensorSpec


class Placeholder(nn.Module):
    """Stands where a layer will stand. A tensor `weight._data` is one named `_data` of a child named `weight`.

    Its tensors are buffers: they keep their dtype where a model is loaded in another, and may be of integers.
    """

    def __init__(self, specs: Mapping[str, TensorSpec]) -> None:
        super().__init__()
        for name, spec in specs.items():
            owner, _, role = name.rpartition(".")
            module: nn.Module = self
            for child in owner.split(".") if owner else ():
                if child not in module._modules:
                    module.add_module(child, nn.Module())
                module = cast(nn.Module, module._modules[child])
            module.register_buffer(role, torch.empty(spec.shape, dtype=spec.dtype, device="meta"))
