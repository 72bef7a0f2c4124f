"""Parts that sum to a tensor in its own dtype."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def complete(tensor: Tensor, targets: Sequence[Tensor]) -> list[Tensor]:
    """Turn all parts but the last (any float dtype) into parts of `tensor` that sum to it, in order.

    The last part is `tensor` minus the running sum of the others *as its dtype computes it*, so the sum
    differs from the tensor only where that subtraction is inexact: by less than half an ulp of the last part,
    and only where a weight is less than about half as large as its last part (Sterbenz' lemma).
    """
    parts: list[Tensor] = []
    running: Tensor | None = None
    for target in targets:
        part = target.to(tensor.dtype)
        parts.append(part)
        running = part if running is None else running + part
    parts.append(tensor if running is None else tensor - running)
    return parts


def sum_parts(parts: Sequence[Tensor]) -> Tensor:
    """Sum of the parts in order, in their own dtype."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def inexact(tensor: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """Boolean mask of the weights whose parts do not sum to them bit for bit."""
    return torch.ne(sum_parts(parts), tensor)
