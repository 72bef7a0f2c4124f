"""Running classifiers over data, and what a quantized one is measured by."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from splitquant_plugins.backends import Batch, QuantizedModel
from splitquant_plugins.passes.module_tree import is_transformers_conv1d

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Measures:
    """How near a quantized model is to its float original.

    `accuracy` and `agreement` (the share of inputs whose predicted label equals the float model's) are
    fractions; the signal-to-noise ratios 10 log10(Σx² / Σ(x − x̂)²) are in decibels, of the logits over all
    inputs and of the weights over all quantized layers. `linear_bytes` is what all Linear and convolution
    weights take, scales and zero points included, biases not.
    """

    accuracy: float
    agreement: float
    logit_sqnr_db: float
    weight_sqnr_db: float
    linear_bits_per_weight: float
    linear_bytes: int
    model_bytes: int
    layers_quantized: int


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


@torch.no_grad()
def logits_of(run: Callable[[Batch], Tensor], batches: Iterable[Batch]) -> Tensor:
    """Return the logits [n, labels] of all batches, in float64."""
    return torch.cat([run(batch).detach().to(torch.float64) for batch in batches])


def accuracy(logits: Tensor, labels: Sequence[int]) -> float:
    """Share of rows whose largest logit is that of the label."""
    return float((logits.argmax(-1) == torch.tensor(labels)).double().mean())


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


def measure(
    quantized: QuantizedModel, reference: nn.Module, reference_logits: Tensor, logits: Tensor, labels: Sequence[int]
) -> Measures:
    """Measure a quantized model against its float original."""
    weights = linear_weights(reference)
    signal = noise = 0.0
    bits = 0
    for name, weight in weights.items():
        stored = quantized.layers.get(name)
        if stored is None:
            bits += weight.numel() * weight.element_size() * 8
            continue
        total = torch.stack([part.weight.detach().double() for part in stored]).sum(0).reshape(weight.shape)
        signal += float(weight.double().pow(2).sum())
        noise += float((weight.double() - total).pow(2).sum())
        bits += sum(part.bits for part in stored)
    return Measures(
        accuracy=accuracy(logits, labels),
        agreement=float((logits.argmax(-1) == reference_logits.argmax(-1)).double().mean()),
        logit_sqnr_db=sqnr_db(reference_logits, logits),
        weight_sqnr_db=ratio_db(signal, noise),
        linear_bits_per_weight=bits / sum(weight.numel() for weight in weights.values()),
        linear_bytes=math.ceil(bits / 8),
        model_bytes=quantized.state_bytes,
        layers_quantized=quantized.layers_quantized,
    )


def linear_weights(model: nn.Module) -> Mapping[str, Tensor]:
    """Weights of the Linear and convolution layers by layer name, output channels first.

    Those of transformers' Conv1D, which it stores [in, out], are seen transposed.
    """
    return {
        name: module.weight.detach().t() if is_transformers_conv1d(module) else module.weight.detach()
        for name, module in model.named_modules()
        if isinstance(module, LAYERS) or is_transformers_conv1d(module)
    }
