"""quanto's weights made one at a time, in blocks of rows and without modules; the same bits as quanto's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from optimum.quanto import AbsmaxOptimizer, AffineOptimizer, MaxOptimizer, QTensor, quantize_weight
from torch import Tensor, nn

from splitquant_plugins.backends import Packer
from splitquant_plugins.checkpoints.headers import TensorSpec
from splitquant_quanto.grid import (
    QTYPES,
    QuantoGrid,
    group_size_of,
    kept_by_tinygemm,
    refuse_tinygemm_rows,
    tinygemm_shift,
)
from splitquant_quanto.optimizer import ZeroExactOptimizer
from splitquant_quanto.quantization import LAYERS, splittable
from splitquant_quanto.storage import ACTIVATION_SCALES, saved_tensors, write_description

# Values quantized at once: enough to make calls cheap, few enough to stay in the cache.
BLOCK = 1 << 19


class QuantoPacker(Packer):
    """Packs as `quantize`, `freeze` and `state_dict` of quanto do, with the zero-exact grid for parts.

    In blocks: quanto's own way, all rows at once, takes 1.8 times as long at 2 bits and 4.7 times at 8, and twice the
    weight's memory besides ([2048, 4096] in float32, one thread, quanto 0.2.7).
    """

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self.qtype = QTYPES[bits]
        self.grid = QuantoGrid(bits)

    def quantized(self, model: nn.Module) -> Sequence[str]:
        return [name for name, module in model.named_modules() if isinstance(module, LAYERS)]

    def ignored(self, model: nn.Module) -> Sequence[str]:
        return [name for name, m in model.named_modules() if splittable(m) and not isinstance(m, LAYERS)]

    def spec(self, shape: torch.Size, dtype: torch.dtype, *, part: bool) -> dict[str, TensorSpec]:
        """Codes, scales and shifts, and the scales of activations; ConfigError for what quanto cannot load."""
        refuse_tinygemm_rows(shape, dtype, self.bits)
        return saved_tensors(shape, dtype, self.bits, part=part)

    def pack(self, weight: Tensor, bias: Tensor | None = None, *, part: bool) -> dict[str, Tensor]:
        """Quantize a weight to what quanto saves for it; it saves biases as they are."""
        last = {name: torch.ones((), dtype=weight.dtype) for name in ACTIVATION_SCALES}
        size = group_size_of(weight.shape[1:].numel(), self.bits)
        rows = weight if size is None else weight.reshape(-1, size)
        if len(rows) < 16 * 8 // self.bits or rows.numel() <= BLOCK:
            found = self._quantize_whole(weight, size, part)
        elif self.bits == 8:
            found = self._quantize_bytes(rows)
        else:
            found = self._quantize_packed(rows, size, part)
        if kept_by_tinygemm(weight.shape, weight.dtype, self.bits):
            found["weight._shift"] = tinygemm_shift(found["weight._scale"], found["weight._shift"])
        return {**found, **last}

    def _quantize_whole(self, weight: Tensor, size: int | None, part: bool) -> dict[str, Tensor]:
        """Let quanto itself do it at once; it has rules of its own for a single row."""
        if self.bits == 8:
            scale, shift = AbsmaxOptimizer()(weight, qtype=self.qtype, axis=0), None
        else:
            scale, shift = self._optimizer(part)(weight, qtype=self.qtype, axis=0, group_size=size)
        kwargs = {"qtype": self.qtype, "axis": 0, "scale": scale, "shift": shift, "group_size": size}
        quantized: QTensor = quantize_weight(weight, **kwargs, optimized=False)
        state: dict[str, Tensor] = {}
        quantized.save_to_state_dict(state, "weight.", False)
        return state

    def _quantize_bytes(self, rows: Tensor) -> dict[str, Tensor]:
        data = torch.empty(rows.shape, dtype=torch.int8)
        scales = []
        for start, end in _bounds(len(rows), rows[0].numel()):
            scale = AbsmaxOptimizer()(rows[start:end], qtype=self.qtype, axis=0)
            data[start:end] = torch.ops.quanto.quantize_symmetric(
                rows[start:end], dtype=torch.int8, axis=0, scale=scale
            )
            scales.append(scale)
        return {"weight._data": data, "weight._scale": torch.cat(scales)}

    def _quantize_packed(self, rows: Tensor, size: int | None, part: bool) -> dict[str, Tensor]:
        """Quantize blocks of rows; a byte holds the codes of rows r, r + height and so on, lowest bits first."""
        height = -(-len(rows) * self.bits // 8)
        data = torch.empty((height, *rows.shape[1:]), dtype=torch.uint8)
        scale = torch.empty((len(rows), *[1] * (rows.ndim - 1)), dtype=rows.dtype)
        shift = torch.empty_like(scale)
        optimizer = self._optimizer(part)
        for top, bottom in _bounds(height, rows[0].numel()):
            for lane in range(8 // self.bits):
                start, end = lane * height + top, min(lane * height + bottom, len(rows))
                block = rows[start:end]
                scale[start:end], shift[start:end] = optimizer(block, qtype=self.qtype, axis=0, group_size=size)
                codes = torch.ops.quanto.quantize_affine(
                    block, bits=self.bits, axis=0, group_size=None, scale=scale[start:end], shift=shift[start:end]
                )
                if lane == 0:
                    data[top:bottom] = codes
                else:
                    data[top : top + end - start] |= codes << (self.bits * lane)
        return {"weight._data._data": data, "weight._scale": scale, "weight._shift": shift}

    def _optimizer(self, part: bool) -> AffineOptimizer:
        """Zeros that a split injected must stay zero; a whole layer has quanto's own grid."""
        return ZeroExactOptimizer() if part else MaxOptimizer()

    def describe(self, folder: Path, model: nn.Module, layers: Sequence[str], same_as: Mapping[str, str]) -> None:
        entry = {"weights": self.qtype.name, "activations": "none"}
        write_description(folder, model, dict.fromkeys(layers, entry), dict(same_as))


def _bounds(rows: int, width: int) -> list[tuple[int, int]]:
    """Cut rows into even blocks of about BLOCK values, none of which is a single row: quanto treats those apart."""
    count = max(1, min(rows * width // BLOCK, rows // 16))
    cuts = [rows * number // count for number in range(count + 1)]
    return list(pairwise(cuts))
