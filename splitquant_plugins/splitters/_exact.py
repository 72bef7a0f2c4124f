"""Parts that sum to a tensor in its own dtype."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from splitquant_plugins.parts import sum_parts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def complete(tensor: Tensor, targets: Sequence[Tensor]) -> list[Tensor]:
    """Turn all parts but the last (any float dtype) into parts of `tensor` that sum to it, in order.

    The last part is `tensor` minus the running sum of the others *as its dtype computes it*. Where that
    subtraction is inexact, the part before the last gives up its lowest bits. A weight much smaller than its
    last part has bits that no float of the last part's size can hold; there the sum stays off, by at most eps
    times the last part's magnitude (eps is that of the dtype: the last part is off by half an ulp, and the sum,
    rounded to the nearest float, by no more than that again). Where the others overflow the dtype, the last
    part holds the weight alone.
    """
    if not targets:
        return [tensor]
    parts = [target.to(tensor.dtype) for target in targets]
    running = sum_parts(parts)
    last = tensor - running
    finite = torch.isfinite(last) & torch.isfinite(running + last)
    if not bool(finite.all()):
        parts = [torch.where(finite, part, 0.0) for part in parts]
        running, last = torch.where(finite, running, 0.0), torch.where(finite, last, tensor)
    for coarser in (1, 2, 4):
        wrong = torch.ne(running + last, tensor)
        if not bool(wrong.any()):
            break
        unit = torch.ldexp(
            torch.full_like(last[wrong], coarser * torch.finfo(tensor.dtype).eps), last[wrong].frexp().exponent - 1
        )
        before = sum_parts([part[wrong] for part in parts[:-1]]) if len(parts) > 1 else torch.zeros_like(unit)
        snapped = torch.round(running[wrong] / unit) * unit
        moved = torch.where(unit > 0, snapped - before, parts[-1][wrong])
        rest = tensor[wrong] - (before + moved)
        good = torch.eq(before + moved + rest, tensor[wrong])
        index = wrong.nonzero(as_tuple=True)
        index = tuple(axis[good] for axis in index)
        parts[-1] = parts[-1].index_put(index, moved[good])
        running = running.index_put(index, (before + moved)[good])
        last = last.index_put(index, rest[good])
    return [*parts, last]
