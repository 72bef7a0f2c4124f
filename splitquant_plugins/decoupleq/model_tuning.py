"""The last stage: all quantized weights of a model, and its norms, trained on the model's own outputs.

What is minimised is the divergence KL(float model || quantized model) of the predictions, with no labels; LLM-QAT
(arXiv 2305.17888) trains so on text that the model wrote itself. Layer and block stages see only their own errors:
here, those of different layers may make up for each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from splitquant_plugins.decoupleq.capture import Call
from splitquant_plugins.decoupleq.training import Objective
from splitquant_plugins.passes.outputs import predictions


def model_objective(
    model: nn.Module,
    calls: Sequence[Call],
    rows: Sequence[int],
    masks: Sequence[Tensor | None],
    float_outputs: Callable[[int], Any],
    max_bytes: int,
) -> Objective:
    """The divergence of the model's predictions from `float_outputs(place)`, mean over those that count.

    For outputs without `logits` it is their square error. The float model's outputs are kept, in 16 bits, while they
    take at most `max_bytes`, and otherwise made anew each time.
    """
    kept: dict[int, Tensor] = {}
    used = 0

    def target(place: int) -> tuple[Tensor, bool]:
        nonlocal used
        found = kept.get(place)
        if found is not None:
            return found.float(), True
        with torch.no_grad():
            values, is_logits = predictions(float_outputs(place))
            values = values.float().log_softmax(dim=-1) if is_logits else values.float()
        if is_logits and used + 2 * values.numel() <= max_bytes:
            # The same values, whether they were kept or not. Chances below 2^-24 do not matter to the mean.
            kept[place] = values.clamp(min=-60000).half()
            used += 2 * values.numel()
            return kept[place].float(), True
        return values, is_logits

    def error(place: int, output: Any) -> Tensor:
        wanted, is_logits = target(place)
        found = predictions(output)[0].float()
        if is_logits:
            found = found.log_softmax(dim=-1)
            wanted, found = _counted(wanted, masks[place]), _counted(found, masks[place])
            return (wanted.exp() * (wanted - found)).sum(dim=-1).mean()
        return (_counted(found, masks[place]) - _counted(wanted, masks[place])).square().mean()

    return Objective(model, calls, rows, error)


def _counted(values: Tensor, mask: Tensor | None) -> Tensor:
    if mask is not None and values.ndim > mask.ndim and values.shape[: mask.ndim] == mask.shape:
        return values[mask.to(values.device) != 0]
    return values
