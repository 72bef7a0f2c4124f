"""A backend that rounds weights to any linear grid in place: for targets that are not at hand, and for tables.

Weights of 2 to 8 bits, affine or symmetric, per tensor, channel or group, as `UniformGrid` has them. The rounded
values stay floats: it shows what a grid does to a model, and runs nowhere faster.
"""

from __future__ import annotations

import glob
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from splitquant_plugins.backends import (
    Backend,
    Batch,
    QuantizedModel,
    StoredWeight,
    Support,
    WeightFormat,
    quantized_by,
)
from splitquant_plugins.errors import ConfigError, InputError
from splitquant_plugins.evaluation.metrics import linear_weights
from splitquant_plugins.grid import Grid, UniformGrid
from splitquant_plugins.modules import layer_of_part
from splitquant_plugins.passes.base import ModelPass

EVERYTHING = Support(("channel", "tensor", "group"), ("affine", "symmetric"))


class SimulatedBackend(Backend):
    """Linear grids by fake quantization; with `power_of_two_scale`, those of targets that shift and cannot multiply."""

    name = "simulated"
    extra = "eval"
    packages = ("torch",)
    support: ClassVar = {f"int{bits}": EVERYTHING for bits in range(2, 9)}
    default_group_size = 128

    def __init__(self, *, power_of_two_scale: bool = False) -> None:
        self.power_of_two_scale = power_of_two_scale

    def grid(self, chosen: WeightFormat) -> Grid:
        return UniformGrid(
            chosen.bits,
            chosen.scheme,
            chosen.granularity,
            chosen.group_size,
            power_of_two_scale=self.power_of_two_scale,
        )

    @torch.no_grad()
    def quantize(
        self,
        model: nn.Module,
        chosen: WeightFormat,
        first: ModelPass | None = None,
        batches: Iterable[Batch] = (),
        ignore: Sequence[str] | None = None,
    ) -> QuantizedModel:
        """Round every Linear and convolution weight, or part of one, in place."""
        grid = self.grid(chosen)
        layers: dict[str, list[StoredWeight]] = {}
        kept = set(ignore or ())

        def work() -> nn.Module:
            split = model if first is None else first.apply(model, grid=grid, ignore=[glob.escape(n) for n in kept])
            owners = layer_of_part(split)
            rounded: dict[int, Tensor] = {}
            weights = linear_weights(split)
            if not weights:
                raise InputError(f"simulated finds no layer to quantize in {type(model).__name__}")
            for name, weight in weights.items():
                if name in kept:
                    continue
                memory = weight.data_ptr()
                if memory not in rounded:
                    rounded[memory] = weight.copy_(grid.quantize_dequantize(weight))
                bits = grid.stored_bits(weight.shape)
                layers.setdefault(owners.get(name, name), []).append(StoredWeight(weight, bits))
            return split

        quantized = quantized_by(work, first, layers=lambda _: layers)
        return replace(quantized, state_bytes=quantized.state_bytes - _saved_bytes(layers))

    def save(self, quantized: QuantizedModel, folder: Path) -> None:
        raise ConfigError("backend simulated stores no integers; choose a real backend to save a quantized model")

    def load(self, folder: Path) -> nn.Module:
        raise ConfigError("backend simulated saves nothing that could be loaded")


def _saved_bytes(layers: dict[str, list[StoredWeight]]) -> int:
    """Bytes that packed integers would save over the floats that stand for them."""
    stored = [part for parts in layers.values() for part in parts]
    return sum(part.weight.numel() * part.weight.element_size() - part.bits // 8 for part in stored)
