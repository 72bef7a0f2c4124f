"""What of a module's output is looked at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from splitquant_plugins.errors import InputError


def output_tensor(output: Any) -> Tensor:
    """The tensor that a block's output is compared by: itself, the first of a tuple, or of an HF output."""
    kind = type(output).__name__
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        output = tuple(output.values())
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        return output[0]
    raise InputError(f"a block returned {kind}: expected a tensor, or a tuple starting with one")


def predictions(output: Any) -> tuple[Tensor, bool]:
    """The tensor that a model's output is compared by, and whether it is its `logits`."""
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    return (logits, True) if isinstance(logits, Tensor) else (output_tensor(output), False)
