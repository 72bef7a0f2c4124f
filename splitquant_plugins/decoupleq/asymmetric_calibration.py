"""Asymmetric calibration: what the layers before have lost, and how a layer makes up for it.

Let x be the inputs that the float model gives a layer, and x̂ those that it gets behind solved layers. Its outputs
should be W x, and are Ŵ x̂. The mean square error of that is, but for a constant, tr((Ŵ - T) H (Ŵ - T)ᵀ) with H the
mean of x̂ x̂ᵀ, C that of x x̂ᵀ, and T = W C H⁻¹ in the place of W (GPTAQ, arXiv 2504.02692).
T is estimated from few inputs and by layers that are solved one by one, so only a part of the way from W to T is gone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from splitquant_plugins.decoupleq.capture import Call, detached
from splitquant_plugins.decoupleq.objective import prepared_moment
from splitquant_plugins.passes.calibration import (
    RunningMean,
    SecondMoment,
    evaluating,
    moment_shape,
    naming_batch,
    only_input,
    plan_passes,
)

if TYPE_CHECKING:
    from splitquant_plugins.decoupleq.capture import BlockInputs


class FloatInputs:
    """What the float model gives a block's layers, call by call: kept as far as memory allows, else found again."""

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
        self._block, self._calls, self._float_values, self._layers = block, calls, float_values, layers
        self._limit = max_bytes // 4
        self._kept: dict[int, dict[str, list[Tensor]]] = {}

    def of(self, index: int) -> dict[str, list[Tensor]]:
        """The inputs of all layers in one of the block's calls."""
        if index in self._kept:
            return self._kept[index]
        with self._float_values():
            found = _inputs(self._block, self._calls[index], self._layers)
        size = sum({id(one): one.nbytes for inputs in found.values() for one in inputs}.values())
        if self.held + size <= self._limit:
            self._kept[index] = found
            self.held += size
        return found


def iter_paired_moments(
    now: BlockInputs, before: FloatInputs, layers: Mapping[str, nn.Module], max_bytes: int
) -> Iterator[tuple[str, SecondMoment, Tensor | None]]:
    """Yield each layer's name, second moment H [groups, d, d], and C of the same shape.

    `now` are the inputs of a block in the model as it is, `before` what its layers get in the float model. C is None
    where the two call the layer with other shapes, as with routed experts; whether rows of one shape belong together
    is not known.
    """
    sizes = {name: moment_shape(name, layer) for name, layer in layers.items()}
    itemsize = torch.float64.itemsize
    for names in plan_passes(sizes, 2 * itemsize, max_bytes - before.held):
        own = {name: RunningMean(name, layers[name], sizes[name], torch.float64) for name in names}
        pairs = {name: RunningMean(name, layers[name], sizes[name], torch.float64) for name in names}
        unlike: set[str] = set()
        for index, mask in enumerate(now.masks):
            with naming_batch(index + 1, now.block):
                wanted = before.of(index)
                times = {name: len(wanted[name]) for name in names}
                found = _inputs(now.block, now.calls[index], {name: layers[name] for name in names}, times)
                for name in names:
                    for inputs in found[name]:
                        own[name].add(inputs, mask)
                    if [one.shape for one in wanted[name]] != [one.shape for one in found[name]]:
                        unlike.add(name)
                    if name not in unlike:
                        for inputs, others in zip(found[name], wanted[name], strict=True):
                            pairs[name].add(inputs, mask, others)
        for name in names:
            mean, pair = own.pop(name), pairs.pop(name)
            yield name, SecondMoment(mean.matrix, mean.samples), None if name in unlike else pair.matrix


def asymmetric_target(weight: Tensor, moment: Tensor, cross: Tensor, part: float, damping: float) -> Tensor:
    """The weight [out, ...] moved by `part` of the way to T = W C H⁻¹, with H damped as for the solution.

    `moment` and `cross` are H and C, [groups, d, d], with the mean taken over the same inputs.
    """
    rows = weight.detach().double().reshape(len(moment), -1, moment.shape[-1])
    damped = torch.stack([prepared_moment(one, damping) for one in moment])
    lost = rows @ (cross - moment).to(damped)
    moved = rows + part * torch.linalg.solve(damped, lost.mT).mT
    return moved.reshape(weight.shape).to(weight.dtype)


class _AllSeen(Exception):  # noqa: N818 - control flow, not a failure
    pass


@torch.no_grad()
def _inputs(
    block: nn.Module, replayed: Call, layers: Mapping[str, nn.Module], times: Mapping[str, int] | None = None
) -> dict[str, list[Tensor]]:
    """What the layers get while a call of the block is replayed, call by call; one copy where they share a tensor.

    `times`: how often each layer is called; once all are, what comes behind them need not be computed.
    """
    found: dict[str, list[Tensor]] = {name: [] for name in layers}
    last: tuple[Tensor, int, Tensor] | None = None
    missing = sum(times.values()) if times and all(times.values()) else -1

    def hook_of(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal last, missing
            given = only_input(name, args, kwargs)
            if last is None or given is not last[0] or given._version != last[1]:
                last = given, given._version, given.clone()
            found[name].append(last[2])
            missing -= times is not None and len(found[name]) <= times[name]
            if missing == 0:
                raise _AllSeen

        return hook

    with evaluating(block), ExitStack() as hooks, suppress(_AllSeen):
        for name, layer in layers.items():
            hooks.callback(layer.register_forward_pre_hook(hook_of(name), with_kwargs=True).remove)
        args, kwargs = detached(replayed)
        block(*args, **kwargs)
    return found
