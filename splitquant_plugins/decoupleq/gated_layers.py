"""Layers whose outputs are multiplied, value by value, with what others make, as `up` of a gated feed-forward layer.

Let u = W x be the outputs of such a layer, and h = s u (value by value) what a later layer is given. Behind layers that
were solved x has become x̂ and s has become ŝ, and row i should make up for both: ŝᵢ Ŵᵢ x̂ is to be hᵢ. The mean square
error of that is, but for a constant, (Ŵᵢ - Tᵢ) Hᵢ (Ŵᵢ - Tᵢ)ᵀ with Hᵢ the mean of ŝᵢ² x̂ x̂ᵀ and Tᵢ = Wᵢ + Eᵢ Hᵢ⁻¹, where
Eᵢ is the mean of (hᵢ - ŝᵢ Wᵢ x̂) ŝᵢ x̂ᵀ. Each row has an Hᵢ of its own, so this is for layers that are not too wide.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from splitquant_plugins.decoupleq.capture import Call, added_to_outputs, replay, rounding_tolerance
from splitquant_plugins.passes.calibration import CONVOLUTIONS, counted_rows, moment_shape, naming_batch, out_features

if TYPE_CHECKING:
    from splitquant_plugins.decoupleq.asymmetric_calibration import FloatInputs
    from splitquant_plugins.decoupleq.capture import BlockInputs

# Products of two inputs that are held at once.
_PRODUCTS = 1 << 24


@torch.no_grad()
def gated_layers(block: nn.Module, call: Call, layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """Names of layers whose outputs come to a later layer multiplied by factors that differ, with that layer's name.

    Tried with a call of the block, for layers that it calls once and that are no convolutions.
    """
    inputs, _ = replay(block, call, layers)
    once = [name for name, layer in layers.items() if len(inputs[name]) == 1 and not isinstance(layer, CONVOLUTIONS)]
    found: dict[str, str] = {}
    for name in once:
        layer, given = layers[name], inputs[name][0]
        shape = (*given.shape[:-1], out_features(layer))
        later = {other: layers[other] for other in once if other != name and inputs[other][0].shape == shape}
        if not later:
            continue
        change = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(given)
        factors, changed = (_changed_inputs(block, call, layer, later, by) for by in (torch.ones_like(change), change))
        for other in later:
            before = inputs[other][0]
            factor, difference = factors[other] - before, changed[other] - before
            # As a part of the largest value.
            tolerance = rounding_tolerance(before.dtype)
            unequal = (factor.amax() - factor.amin()) > tolerance * factors[other].abs().amax()
            if unequal and (difference - factor * change).abs().amax() <= tolerance * changed[other].abs().amax():
                found[name] = other
                break
    return found


@torch.no_grad()
def gated_moments(now: BlockInputs, before: FloatInputs, name: str) -> tuple[Tensor, Tensor, int] | None:
    """H [out, d, d] and E [out, 1, d] of a layer in `before.gated`, and the rows seen.

    None where some call of the block leaves the layer out, or gives the later one another shape than the float model.
    """
    layer, later = before.layers[name], before.gated[name]
    watched = {each: before.layers[each] for each in (name, later)}
    outputs, width = out_features(layer), moment_shape(name, layer)[-1]
    rows, columns = torch.triu_indices(width, width).to(next(layer.parameters()).device)
    upper = torch.zeros(outputs, len(rows), dtype=torch.float64, device=rows.device)
    lacking = torch.zeros(outputs, width, dtype=torch.float64, device=rows.device)
    seen = 0
    for index, masks in enumerate(now.masks):
        with naming_batch(index + 1, now.block):
            wanted = before.of(index)[0][later]
            found, _ = replay(now.block, now.calls[index], watched, dict.fromkeys(watched, 1))
            once = len(wanted) == len(found[later]) == len(found[name]) == 1
            if not once or wanted[0].shape != found[later][0].shape:
                return None
            ones = torch.ones_like(wanted[0])
            factor = _changed_inputs(now.block, now.calls[index], layer, {later: watched[later]}, ones)[later]
            lack, factor = wanted[0] - found[later][0], factor - found[later][0]
            each_row = [counted_rows(each, masks.of(layer)) for each in (found[name][0], factor, lack)]
        seen += len(each_row[0])
        chunks = (torch.split(each, max(_PRODUCTS // len(rows), 1)) for each in each_row)
        for x, s, e in zip(*chunks, strict=True):
            upper += s.square().T @ (x[:, rows] * x[:, columns])
            lacking += (e * s).T.double() @ x.double()
    moment = upper.new_zeros(outputs, width, width)
    moment[:, rows, columns] = moment[:, columns, rows] = upper / max(seen, 1)
    return moment, (lacking / max(seen, 1))[:, None], seen


def _changed_inputs(
    block: nn.Module, call: Call, layer: nn.Module, later: Mapping[str, nn.Module], change: Tensor
) -> dict[str, Tensor]:
    """What later layers are given, each called once, where `change` is added to the outputs of a layer."""
    with added_to_outputs(layer, change):
        inputs, _ = replay(block, call, later, dict.fromkeys(later, 1))
    return {name: each[0] for name, each in inputs.items()}
