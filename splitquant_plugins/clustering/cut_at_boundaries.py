"""From boundaries to labels and to parts."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from splitquant_plugins.parallel import CHUNK, chunks, in_threads, spans


def assign(values: Tensor, boundaries: Tensor) -> Tensor:
    """Cluster number of each value: [rows, n] or [n] with boundaries [rows, k - 1] or [1, k - 1], int64."""
    bounds = boundaries if boundaries.ndim == 2 else boundaries[None]
    labels = torch.zeros(values.shape, dtype=torch.int64, device=values.device)
    for column in bounds.unbind(1):
        labels += values >= (column if values.ndim < 2 else column[:, None])
    return labels


def masked_parts(rows: Tensor, boundaries: Tensor) -> list[Tensor]:
    """Split `rows` [rows, n] into k tensors of its shape; each value is in one of them, 0 in the others.

    boundaries: [rows, k - 1], or [1, k - 1] for all rows, in the dtype of `rows`, ascending.
    The values must be finite.
    """
    k = boundaries.shape[1] + 1
    if k == 1:
        return [rows.clone()]
    rows = rows.contiguous()
    parts = [torch.empty_like(rows) for _ in range(k)]
    if boundaries.shape[0] == 1:
        flat, targets = rows.view(-1), [part.view(-1) for part in parts]
        # `threshold` keeps what is greater than a number, in one pass.
        below = torch.nextafter(boundaries[0], torch.full_like(boundaries[0], -torch.inf)).tolist()

        def write(span: slice) -> None:
            for chunk in chunks(span):
                tails = [target[chunk] for target in targets]
                for bound, tail in zip(below, tails[1:], strict=True):
                    torch.ops.aten.threshold.out(flat[chunk], bound, 0.0, out=tail)
                _differences(flat[chunk], tails)

        in_threads(write, spans(flat.numel()))
        return parts
    zero = torch.zeros((), dtype=rows.dtype, device=rows.device)
    height = max(1, CHUNK // max(1, rows.shape[1]))

    def write_rows(span: slice) -> None:
        for chunk in chunks(span, height):
            values = rows[chunk]
            tails = [part[chunk] for part in parts]
            for number, tail in enumerate(tails[1:]):
                torch.where(values >= boundaries[chunk, number : number + 1], values, zero, out=tail)
            _differences(values, tails)

    in_threads(write_rows, spans(rows.shape[0], max(1, (1 << 18) // max(1, rows.shape[1]))))
    return parts


def _differences(values: Tensor, tails: list[Tensor]) -> None:
    """Turn tails[j], what is left from boundary j on, into parts; tails[0] stands for all values.

    The differences are exact: wherever both tails have a value it is the same one.
    """
    torch.sub(values, tails[1], out=tails[0])
    for low, high in pairwise(tails[1:]):
        low -= high
