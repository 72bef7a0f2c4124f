"""What the weights of a quantized model are measured by, and what outputs are compared with."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from splitquant_plugins.backends import QuantizedModel
from splitquant_plugins.passes.fold_batchnorm import fold_batchnorms
from splitquant_plugins.passes.module_tree import is_transformers_conv1d

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class LayerMeasures:
    """The same of one quantized layer: the signal-to-noise ratio of its weight in decibels, and its stored bits."""

    layer: str
    weight_sqnr_db: float
    bits_per_weight: float


@dataclass(frozen=True)
class WeightMeasures:
    """How near the weights of a quantized model are to those of its float original, and what they take.

    `weight_sqnr_db` is the signal-to-noise ratio 10 log10(Σx² / Σ(x − x̂)²) in decibels over all quantized layers.
    `linear_bytes` is what all Linear and convolution weights take, scales and zero points included, biases not.
    """

    weight_sqnr_db: float
    linear_bits_per_weight: float
    linear_bytes: int
    model_bytes: int
    layers_quantized: int
    layers: tuple[LayerMeasures, ...]


def tokenize(tokenizer: Any, texts: Sequence[str], max_length: int, batch_size: int = 128) -> list[dict[str, Tensor]]:
    """Tokenize texts in order, each batch padded to its longest text, cut at `max_length` tokens."""
    return [
        dict(
            tokenizer(
                list(texts[start : start + batch_size]),
                padding=True,
                truncation=True,
                max_length=max_length,
                return_tensors="pt",
            )
        )
        for start in range(0, len(texts), batch_size)
    ]


def sqnr_db(reference: Tensor, other: Tensor) -> float:
    """Signal-to-quantization-noise ratio in decibels; 300 where nothing differs, -300 where nothing is right."""
    return ratio_db(float(reference.double().pow(2).sum()), float((reference.double() - other.double()).pow(2).sum()))


def ratio_db(signal: float, noise: float) -> float:
    """Return 10 log10(signal / noise), cut at ±300 so that JSON can hold it."""
    if not math.isfinite(noise):
        return -300.0
    if noise <= 0 or signal <= 0:
        return 300.0 if noise <= 0 else -300.0
    return max(-300.0, min(300.0, 10 * (math.log10(signal) - math.log10(noise))))


def measure_weights(quantized: QuantizedModel, reference: nn.Module) -> WeightMeasures:
    """Measure the weights of a quantized model against those of its float original.

    A convolution into which a BatchNorm was folded, by a pass or by the backend, is measured against the folded weight.
    """
    weights = linear_weights(reference)
    folded = _folded_weights(reference)
    signal = noise = 0.0
    bits = 0
    layers = []
    for name, weight in weights.items():
        stored = quantized.layers.get(name)
        if stored is None:
            bits += weight.numel() * weight.element_size() * 8
            continue
        total = torch.stack([part.weight.detach().double() for part in stored]).sum(0).reshape(weight.shape)
        signals = [_signal_and_noise(each, total) for each in (weight, folded.get(name, weight))]
        nearer = min(signals, key=lambda pair: pair[1] / max(pair[0], 1e-300))
        signal, noise = signal + nearer[0], noise + nearer[1]
        taken = sum(part.bits for part in stored)
        bits += taken
        layers.append(LayerMeasures(name, ratio_db(*nearer), taken / weight.numel()))
    return WeightMeasures(
        weight_sqnr_db=ratio_db(signal, noise),
        linear_bits_per_weight=bits / sum(weight.numel() for weight in weights.values()),
        linear_bytes=math.ceil(bits / 8),
        model_bytes=quantized.state_bytes,
        layers_quantized=quantized.layers_quantized,
        layers=tuple(layers),
    )


def _signal_and_noise(weight: Tensor, stored: Tensor) -> tuple[float, float]:
    return float(weight.double().pow(2).sum()), float((weight.double() - stored).pow(2).sum())


def _folded_weights(model: nn.Module) -> Mapping[str, Tensor]:
    """The weights with every BatchNorm folded that can be; none where there is no BatchNorm."""
    if not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        return {}
    folded = copy.deepcopy(model)
    fold_batchnorms(folded)
    return linear_weights(folded)


def linear_weights(model: nn.Module) -> Mapping[str, Tensor]:
    """Weights of the Linear and convolution layers by layer name, output channels first.

    Those of transformers' Conv1D, which it stores [in, out], are seen transposed.
    """
    return {
        name: module.weight.detach().t() if is_transformers_conv1d(module) else module.weight.detach()
        for name, module in model.named_modules()
        if isinstance(module, LAYERS) or is_transformers_conv1d(module)
    }
