"""Tensors that make `from_pretrained` fail where this package was not imported.

transformers only warns of a method of quantization that it does not know: it builds the unsplit model, reports the
parts as unexpected, and makes up the weights of the layers that they are parts of. It does fail on a tensor of the
wrong shape. So each split or quantized layer is saved with one, under the name of the weight that it no longer has.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor, nn

_SHAPE = (1,)  # of no layer's weight


def guard_name(layer: str) -> str:
    """Name of the tensor that guards a layer."""
    return f"{layer}.weight"


def guards(layers: Iterable[str]) -> dict[str, Tensor]:
    """Return the tensors for layers of those names, in memory of their own."""
    return {guard_name(layer): torch.zeros(_SHAPE) for layer in layers}


def expect_guards(model: nn.Module, layers: Iterable[str]) -> None:
    """Let transformers find the guards of those layers in the files without a word."""
    names = "|".join(re.escape(guard_name(layer)) for layer in layers)
    known: Any = model
    if names:
        known._keys_to_ignore_on_load_unexpected = {
            *(known._keys_to_ignore_on_load_unexpected or ()),
            rf"(^|\.)({names})$",
        }
