"""Asymmetric calibration: what the layers before have lost, and how a layer makes up for it.

Let x be the inputs that the float model gives a layer, and x̂ those that it gets behind solved layers. Its outputs
should be W x, and are Ŵ x̂. The mean square error of that is, but for a constant, tr((Ŵ - T) H (Ŵ - T)ᵀ) with H the
mean of x̂ x̂ᵀ, C that of x x̂ᵀ, and T = W C H⁻¹ in the place of W (GPTAQ, arXiv 2504.02692).
T is estimated from few inputs and by layers that are solved one by one, so only a part of the way from W to T is gone.

A layer whose outputs are added to the block's, as the last of a transformer's block are, can make up for all that the
block has lost so far, also on the way past this layer: with e what the block's outputs lack while the layer still has
its float weights, and E the mean of e x̂ᵀ, T = W + E H⁻¹. Where nothing goes past the layer that is the T above.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from splitquant_plugins.decoupleq.capture import Call, added_to_outputs, replay, rounding_tolerance
from splitquant_plugins.decoupleq.gated_layers import gated_layers, gated_moments
from splitquant_plugins.decoupleq.objective import prepared_moment
from splitquant_plugins.errors import InputError
from splitquant_plugins.passes.calibration import (
    CONVOLUTIONS,
    RunningMean,
    SecondMoment,
    moment_shape,
    naming_batch,
    out_features,
    plan_passes,
)
from splitquant_plugins.passes.outputs import output_tensor

if TYPE_CHECKING:
    from splitquant_plugins.decoupleq.capture import BlockInputs


# Moments for each row of a layer may take this part of the memory for calibration: solving them takes long.
_PART_FOR_ROWS = 32


@dataclass(frozen=True)
class PairedMoments:
    """What is known of a layer's inputs behind solved layers, x̂, beside the float model's, x.

    `moment`: H. `cross`: C [groups, d, d], the mean of x x̂ᵀ; None where the two call the layer with other shapes, as
    with routed experts. `missing`: E [groups, out / groups, d], where the layer's outputs are added to the block's the
    mean of e x̂ᵀ, and of gated layers that of their rows.
    """

    moment: SecondMoment
    cross: Tensor | None
    missing: Tensor | None = None


class FloatInputs:
    """What the float model gives a block's layers, call by call: kept as far as memory allows, else found again.

    `added`: names of the layers whose outputs are added to the block's. `gated`: names of those whose outputs are
    multiplied on their way to another layer, with the name of that.
    """

    def __init__(
        self,
        block: nn.Module,
        calls: Sequence[Call],
        float_values: Callable[[], AbstractContextManager[Any]],
        layers: Mapping[str, nn.Module],
        max_bytes: int,
    ) -> None:
        """`float_values` switches the model to its float values for a while; `layers` are all that will be asked for.

        At most a quarter of `max_bytes` is kept; `held` says how much is.
        """
        self.held = 0
        self._block, self.calls, self._float_values, self.layers = block, calls, float_values, layers
        self._limit = max_bytes // 4
        self._kept: dict[int, tuple[dict[str, list[Tensor]], Tensor | None]] = {}
        with float_values():
            self.added = _added_layers(block, calls[0], layers)
            self.gated = gated_layers(block, calls[0], layers)

    def of(self, index: int) -> tuple[dict[str, list[Tensor]], Tensor | None]:
        """The inputs of all layers in one of the block's calls, and its output where layers are added to that."""
        if index in self._kept:
            return self._kept[index]
        with self._float_values():
            inputs, returned = replay(self._block, self.calls[index], self.layers)
        output = output_tensor(returned) if self.added else None
        found = inputs, output
        size = sum(
            {id(one): one.nbytes for one in itertools.chain(*inputs.values(), [output]) if one is not None}.values()
        )
        if self.held + size <= self._limit:
            self._kept[index] = found
            self.held += size
        return found


def iter_paired_moments(
    now: BlockInputs, before: FloatInputs, layers: Mapping[str, nn.Module], max_bytes: int
) -> Iterator[tuple[str, PairedMoments]]:
    """Yield the name and moments of each layer.

    `now` are the inputs of a block in the model as it is, `before` what its layers get in the float model. Whether rows
    of one shape belong together is not known. Gated layers come last, behind those that they are multiplied with, and
    only where the moments of their rows fit into a small part of `max_bytes`.
    """
    gated = [name for name in layers if name in before.gated and _fits(layers[name], max_bytes // _PART_FOR_ROWS)]
    others = {name: layer for name, layer in layers.items() if name not in gated}
    yield from _paired_moments(now, before, others, max_bytes)
    for name in gated:
        found = gated_moments(now, before, name)
        if found is None:
            yield from _paired_moments(now, before, {name: layers[name]}, max_bytes)
        else:
            moment, missing, samples = found
            yield name, PairedMoments(SecondMoment(moment, samples), moment, missing)


def _fits(layer: nn.Module, max_bytes: int) -> bool:
    """Whether a second moment for each output does."""
    return bool(out_features(layer) * moment_shape("", layer)[-1] ** 2 * torch.float64.itemsize <= max_bytes)


def _paired_moments(
    now: BlockInputs, before: FloatInputs, layers: Mapping[str, nn.Module], max_bytes: int
) -> Iterator[tuple[str, PairedMoments]]:
    sizes = {name: moment_shape(name, layer) for name, layer in layers.items()}
    itemsize = torch.float64.itemsize
    for names in plan_passes(sizes, 2 * itemsize, max_bytes - before.held):
        own = {name: RunningMean(name, layers[name], sizes[name], torch.float64) for name in names}
        pairs = {name: RunningMean(name, layers[name], sizes[name], torch.float64) for name in names}
        lacks = {
            name: RunningMean(name, layers[name], (1, out_features(layers[name]), sizes[name][2]), torch.float64)
            for name in names
            if name in before.added
        }
        unlike: set[str] = set()
        for index, masks in enumerate(now.masks):
            with naming_batch(index + 1, now.block):
                wanted, float_output = before.of(index)
                times = None if lacks else {name: len(wanted[name]) for name in names}
                found, output = replay(now.block, now.calls[index], {name: layers[name] for name in names}, times)
                for name in names:
                    for inputs in found[name]:
                        own[name].add(inputs, masks.of(layers[name]))
                    shapes = [one.shape for one in found[name]]
                    if [one.shape for one in wanted[name]] != shapes or (name in lacks and len(shapes) > 1):
                        unlike.add(name)
                    if name not in unlike:
                        for inputs, others in zip(found[name], wanted[name], strict=True):
                            pairs[name].add(inputs, masks.of(layers[name]), others)
                alike = [name for name in lacks if name not in unlike and found[name]]
                if alike and float_output is not None:
                    # Several that are solved at once share what is to be made up for.
                    share = (float_output - output_tensor(output)) / len(lacks)
                    for name in alike:
                        lacks[name].add(found[name][0], masks.of(layers[name]), share)
        for name in names:
            mean, pair, lack = own.pop(name), pairs.pop(name), lacks.pop(name, None)
            cross, missing = (None if name in unlike or one is None else one.matrix for one in (pair, lack))
            yield name, PairedMoments(SecondMoment(mean.matrix, mean.samples), cross, missing)


def asymmetric_target(weight: Tensor, pair: PairedMoments, part: float, damping: float) -> Tensor:
    """The weight [out, ...] moved by `part` of the way to T, with H damped as for the solution."""
    if pair.cross is None:
        return weight
    moment = pair.moment.matrix
    rows = weight.detach().double().reshape(len(moment), -1, moment.shape[-1])
    damped = torch.stack([prepared_moment(one, damping) for one in moment])
    lost = rows @ (pair.cross - moment).to(damped) if pair.missing is None else pair.missing.to(damped)
    moved = rows + part * torch.linalg.solve(damped, lost.mT).mT
    return moved.reshape(weight.shape).to(weight.dtype)


@torch.no_grad()
def _added_layers(block: nn.Module, call: Call, layers: Mapping[str, nn.Module]) -> frozenset[str]:
    """Names of the layers whose outputs are added to the block's: what is added to theirs comes out unchanged.

    Tried with a call of the block, for layers that it calls once and that are no convolutions.
    """
    inputs, output = replay(block, call, layers)
    found: set[str] = set()
    try:
        whole = output_tensor(output)
    except InputError:
        return frozenset()  # an output of no known kind
    for name, layer in layers.items():
        fits = len(inputs[name]) == 1 and inputs[name][0].shape[:-1] == whole.shape[:-1]
        if isinstance(layer, CONVOLUTIONS) or not fits or out_features(layer) != whole.shape[-1]:
            continue
        generator = torch.Generator().manual_seed(0)
        change = whole.abs().max() * torch.randn(whole.shape, generator=generator).to(whole)
        with added_to_outputs(layer, change):
            changed = output_tensor(replay(block, call, {})[1])
        if (changed - whole - change).abs().max() <= rounding_tolerance(whole.dtype) * changed.abs().max():
            found.add(name)
    return frozenset(found)
