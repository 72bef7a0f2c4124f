"""The sum of parts, as every check and every fused layer computes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def sum_parts(parts: Sequence[Tensor]) -> Tensor:
    """Sum tensors of one shape in order, in their own dtype."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
