"""What k codes can add up to: the sumset of k small grids, 64 sums for three of 2 bits."""

from __future__ import annotations

import torch
from torch import Tensor


def sums_of_codes(values: Tensor) -> Tensor:
    """All sums of one value per part: `values` [n, k, c] give [n, c ** k], the last part's value changing fastest."""
    total = values[:, 0]
    for part in range(1, values.shape[1]):
        total = (total.unsqueeze(2) + values[:, part].unsqueeze(1)).flatten(1)
    return total


def combinations(codes: Tensor, k: int) -> Tensor:
    """Every choice of k out of `codes` [c], in the order of their sums in `sums_of_codes`: [c ** k, k]."""
    return torch.cartesian_prod(*[codes] * k).reshape(-1, k)
