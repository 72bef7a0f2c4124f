"""Codes of parts with disjoint supports as one code and the number of its part.

SplitQuant (arXiv 2501.12428), section 6: of the k parts of a weight, all but one hold the code of zero, and need not be
stored. Three parts at 2 bits take 2 + log2 3 bits instead of 6.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def joined(codes: Sequence[Tensor], zeros: Sequence[Tensor]) -> tuple[Tensor, Tensor] | None:
    """Return the code of each weight, and the number of the part that it is of, as bytes.

    `codes` has a tensor for each part, all of one shape; `zeros` the codes that stand for zero there, of a shape that
    extends to it. Where no part holds anything but zero, the first one is named. None where more than one does.
    """
    whole, part_of = codes[0].clone(), torch.zeros(codes[0].shape, dtype=torch.uint8, device=codes[0].device)
    held = codes[0] != zeros[0]
    for number, (part, zero) in enumerate(zip(codes[1:], zeros[1:], strict=True), start=1):
        holds = part != zero
        if bool((held & holds).any()):
            return None
        whole = torch.where(holds, part, whole)
        part_of[holds] = number
        held |= holds
    return whole, part_of


def parted(whole: Tensor, part_of: Tensor, zeros: Sequence[Tensor]) -> list[Tensor]:
    """Return the codes of each part, whose codes of zero are `zeros`; what `joined` was given."""
    return [torch.where(part_of == number, whole, zero.to(whole.dtype)) for number, zero in enumerate(zeros)]
