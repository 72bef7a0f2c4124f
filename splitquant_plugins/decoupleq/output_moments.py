"""How much a block's outputs depend on those of its layers: the second moments of gradients, without any labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from splitquant_plugins.decoupleq.capture import Call, detached
from splitquant_plugins.errors import InputError
from splitquant_plugins.passes.calibration import CONVOLUTIONS, counted_rows, evaluating, out_features
from splitquant_plugins.passes.outputs import output_tensor
from splitquant_plugins.passes.token_masks import TokenMasks

# Rows of outputs (tokens) that are enough; the calls that are looked at for them are spread evenly over all.
_ENOUGH_ROWS = 8192


def output_moments(
    block: nn.Module,
    calls: Sequence[Call],
    masks: Sequence[TokenMasks],
    layers: Mapping[str, nn.Module],
    max_bytes: int,
) -> dict[str, Tensor]:
    """G [out, out] of each layer, float64: the mean of g gᵀ, with g the gradient of a block's outputs by the layer's.

    That is the gradient of the inner product with random normal numbers (seed 0), whose second moment is in the mean
    the sum of those of the single outputs (Hutchinson). Left out are convolutions, layers that the outputs do not
    depend on, and what takes more than `max_bytes`. Raises RuntimeError where torch has no gradients for the block, and
    InputError where the block's output is not one of rows.
    """
    chosen = {
        name: layer
        for name, layer in layers.items()
        if not isinstance(layer, CONVOLUTIONS) and out_features(layer) ** 2 * torch.float64.itemsize <= max_bytes
    }
    if not chosen:
        return {}
    sums: dict[str, Tensor] = {}
    seen: dict[str, int] = {}
    generator = torch.Generator().manual_seed(0)
    step, index = 1, 0
    while index < len(calls):
        outputs, probes = _with_probes(block, calls[index], chosen)
        if not probes:
            index += 1  # a call that reaches none of them
            continue
        if not outputs.requires_grad:
            raise RuntimeError("the block computes without gradients")
        if outputs.ndim < 2:
            raise InputError(f"a block returned a tensor of shape {tuple(outputs.shape)} first: expected rows")
        if index == 0:
            enough = max(_ENOUGH_ROWS // max(outputs[..., 0].numel(), 1), 1)
            step = max(len(calls) // enough, 1)
        mask = masks[index].of(block)
        direction = torch.randn(outputs.shape, generator=generator).to(outputs)
        if mask is not None and outputs.shape[: mask.ndim] == mask.shape:
            direction[mask.to(outputs.device) == 0] = 0.0
        for name, gradient in zip(probes, _gradients(outputs, direction, probes), strict=True):
            if gradient is not None:
                rows = counted_rows(gradient, masks[index].of(chosen[name])).double()
                sums[name] = sums.get(name, 0.0) + rows.T @ rows
                seen[name] = seen.get(name, 0) + len(rows)
        index += step
    return {name: total / max(seen[name], 1) for name, total in sums.items() if bool((total.diagonal() > 0).all())}


def _with_probes(block: nn.Module, call: Call, layers: Mapping[str, nn.Module]) -> tuple[Tensor, dict[str, Tensor]]:
    """The block's outputs, and zeros that were added to those of each layer, for their gradients."""
    probes: dict[str, Tensor] = {}

    def hook_of(name: str) -> Callable[..., Tensor]:
        def hook(_: nn.Module, _inputs: Any, result: Tensor) -> Tensor:
            if name in probes:  # of several calls, the first stands for all
                return result
            probes[name] = torch.zeros_like(result, requires_grad=True)
            return result + probes[name]

        return hook

    with evaluating(block), torch.enable_grad(), ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.callback(layer.register_forward_hook(hook_of(name)).remove)
        args, kwargs = detached(call)
        return output_tensor(block(*args, **kwargs)), probes


def _gradients(outputs: Tensor, direction: Tensor, probes: Mapping[str, Tensor]) -> Sequence[Tensor | None]:
    return torch.autograd.grad(outputs, list(probes.values()), direction, allow_unused=True)
