"""Sums of parts on targets whose kernels take and write integers only.

Such a target has no place for a partial sum in float: whatever stays float is left to the host, and the program falls
into pieces. What tells it is the quantizer's annotation of a layer: an output with a static scale, its own or that of
the activation that is fused into it, and a bias of integers, to be added inside the integer kernel. There every part
gets an output scale of its own, and so do the sums.

The last sum takes the layer's place in front of a fused activation, whose output alone had a scale. Targets fuse
activations into layers, not into additions. So the sum is quantized with the scale that the activation's output has:
codes end where the activation ends, and it does nothing any more.

Scales on partial sums cost accuracy: see `partial_sum_cost`. Parts may be larger than the layer and cancel, and each
saturates by itself where calibration has not seen it so large. Where there are codes to spare, their scales therefore
reach further than what was observed: see `headroom`.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from splitquant_plugins.errors import SplitQuantWarning
from splitquant_plugins.solvers.rounding_error import row_error
from splitquant_pt2e.annotation import annotation_of, input_spec, resolved
from splitquant_pt2e.compat import ANNOTATION
from splitquant_pt2e.layers import LayerCall
from splitquant_pt2e.parallel_parts import PART, SplitCall

if TYPE_CHECKING:
    from splitquant_plugins.passes.split_layer import SplitTensors

aten = torch.ops.aten
_FUSED: dict[Any, tuple[float | None, float | None]] = {
    aten.relu.default: (0.0, None),
    aten.relu_.default: (0.0, None),
    aten.relu6.default: (0.0, 6.0),
}
_BOUNDED: dict[Any, tuple[float | None, float | None]] = {  # with the bounds that they have where none is given
    aten.hardtanh.default: (-1.0, 1.0),
    aten.hardtanh_.default: (-1.0, 1.0),
    aten.clamp.default: (None, None),
    aten.clamp_.default: (None, None),
}
INTEGER_NOTE = "the target's kernels write integers only: outputs of parts and their sums have scales of their own"
# How far an observer of Gaussian values is expected to see, in standard deviations: sqrt(2 ln n) of n values, 4.8 of
# 10^5 and 5.3 of 10^6. Scales of activations are per tensor, so the channel of the largest outputs decides.
REACH = 5.0
# With as many codes, what steps of several times the width add is far below what else is rounded.
_CODES_TO_SPARE = 2**14
_HEADROOM = 4.0  # a power of two, so that values are multiplied and divided without rounding


def writes_integers(call: LayerCall) -> bool:
    """Whether the quantizer asks for a kernel that takes and writes integers only, for this layer."""
    if call.bias is None or not _is_static(output_spec(call.node)):
        return False
    bias = input_spec(call.node, call.bias)
    dtype = getattr(resolved(bias), "dtype", None)
    return isinstance(dtype, torch.dtype) and not dtype.is_floating_point


def output_spec(node: Node) -> Any | None:
    """How a layer's output is quantized, directly or behind the activation that is fused into it; None: it is not."""
    annotation = annotation_of(node)
    if annotation is not None and annotation.output_qspec is not None:
        return resolved(annotation.output_qspec)
    fused = fused_activation(node)
    return None if fused is None else resolved(annotation_of(fused).output_qspec)  # type: ignore[union-attr]


def fused_activation(node: Node) -> Node | None:
    """The activation behind a layer whose output has a scale while its input has none."""
    users = list(node.users)
    if len(users) != 1 or users[0].op != "call_function" or len(users[0].all_input_nodes) != 1:
        return None
    annotation = annotation_of(users[0])
    if annotation is None or annotation.output_qspec is None or input_spec(users[0], node) is not None:
        return None
    return users[0]


def partial_sum_cost(parts: Sequence[Tensor], spec: Any, second_moment: Tensor | None = None) -> float:
    """Harm of the scales on a layer's partial sums, in the units of `output_error`.

    What gets a scale only because of the split are the outputs of the parts, and the sums of the first 2 to k - 1. Each
    is rounded to 2^b steps over `REACH` standard deviations to both sides, of the channel that has the largest, times
    `headroom` h: an error of (2 REACH h s / (2^b - 1))² / 12 in every channel. Inputs are taken to be as strong in all
    directions, unless their `second_moment` [groups, d, d] is known.
    """
    sums = list(itertools.accumulate(part.detach() for part in parts))[1:-1]
    cost = 0.0
    for weight in (*parts, *sums):
        power = row_error(weight.detach(), torch.zeros_like(weight), second_moment)
        cost += len(power) * float(power.max()) * (2 * REACH * headroom(spec) / codes_of(spec)) ** 2 / 12
    return cost


def sum_costs(
    split: Mapping[str, SplitTensors], specs: Mapping[str, Any], moments: Iterable[tuple[str, Tensor]] = ()
) -> dict[str, float]:
    """`partial_sum_cost` of every split, by the layer's name, where it is known what the split gains.

    `specs` says how the layers' outputs are quantized, None for those that stay float; `moments` are the second
    moments of inputs that splits were made with, one at a time.
    """

    def cost(name: str, second_moment: Tensor | None = None) -> dict[str, float]:
        tensors, spec = split[name], specs[name]
        if tensors.reason is not None or tensors.error is None or not _is_static(spec):
            return {}
        return {name: partial_sum_cost(tensors.weight, spec, second_moment)}

    costs: dict[str, float] = {}
    for name, second_moment in moments:
        costs |= cost(name, second_moment)
    for name in split.keys() - costs.keys():
        costs |= cost(name)
    return costs


def weighed(
    split: Mapping[str, SplitTensors], specs: Mapping[str, Any], costs: Mapping[str, float], splitter: str
) -> dict[str, SplitTensors]:
    """Weigh what each split gains against what the scales on its partial sums cost, all by the layer's name.

    With `splitter` auto, a layer that would lose stays whole, with the reason. A splitter that was asked for does what
    was asked, with a warning.
    """
    out, losers = dict(split), []
    for name, tensors in split.items():
        cost = costs.get(name, 0.0)
        gain = 0.0 if tensors.error is None else tensors.error.whole - tensors.error.split
        if name not in costs or tensors.error is None or gain > cost:
            continue
        if splitter == "auto":
            reason = (
                f"the target quantizes partial sums to {codes_of(specs[name]).bit_length()} bits, which is expected to "
                f"add a squared error of {cost:.4g}; the split removes {max(gain, 0):.4g} of {tensors.error.whole:.4g}"
            )
            out[name] = replace(tensors, weight=[], bias=[], reason=reason)
        else:
            losers.append(name)
    if losers:
        warnings.warn(
            f"splitter {splitter!r}: the target quantizes partial sums, which is expected to cost more than the split "
            f"gains in {len(losers)} of {len(split)} layers ({', '.join(losers[:3])}{', …' if len(losers) > 3 else ''}"
            "); splitter 'auto' leaves such layers whole",
            SplitQuantWarning,
            stacklevel=2,
        )
    return out


def codes_of(spec: Any) -> int:
    """Highest minus lowest code of a specification."""
    lowest, highest = (getattr(spec, name, None) for name in ("quant_min", "quant_max"))
    if lowest is None or highest is None:
        info = torch.iinfo(spec.dtype)
        lowest, highest = (info.min if lowest is None else lowest), (info.max if highest is None else highest)
    return int(highest) - int(lowest)


def headroom(spec: Any) -> float:
    """How many times further than what calibration saw the scales of partial sums reach."""
    return _HEADROOM if codes_of(spec) >= _CODES_TO_SPARE else 1.0


def give_sums_scales(calls: Iterable[SplitCall]) -> None:
    """Annotate the outputs of parts and their sums."""
    for call in calls:
        last = call.sums[-1]
        own, fused = output_spec(last), fused_activation(last)
        source = call.parts[0]
        spec = own or resolved(input_spec(source, source.args[source.meta[PART]]))
        if not _is_static(spec):
            continue
        wider = _observed_wider(spec, headroom(spec))
        for node in (*call.parts, *call.sums[:-1]):
            node.meta[ANNOTATION] = _with_output(node, wider)
        for node in call.sums if "custom" in source.meta else ():
            node.meta["custom"] = dict(source.meta["custom"])  # where a backend notes what it quantizes: Arm's does
        if fused is not None and own is not None:
            bounds = _bounds(fused)
            within = own if bounds is None else _observed_within(own, *bounds)
            last.meta[ANNOTATION] = _with_output(last, within)


def _with_output(node: Node, spec: Any) -> Any:
    annotation: Any = annotation_of(node)
    return replace(annotation, output_qspec=spec)


def _is_static(spec: Any) -> bool:
    if spec is None or getattr(spec, "is_dynamic", False):
        return False
    dtype = getattr(spec, "dtype", None)
    return (
        isinstance(dtype, torch.dtype) and not dtype.is_floating_point and hasattr(spec, "observer_or_fake_quant_ctr")
    )


def _bounds(node: Node) -> tuple[float | None, float | None] | None:
    """Where an activation that is the identity in between ends; None for any other."""
    if node.target in _FUSED:
        return _FUSED[node.target]
    if node.target in _BOUNDED:
        given: list[Any] = list(node.args[1:3])
        low, high = (*given, *_BOUNDED[node.target][len(given) :])[:2]
        if all(value is None or isinstance(value, (int, float)) for value in (low, high)):
            return low, high
    return None


def _observed_within(spec: Any, low: float | None, high: float | None) -> Any:
    return replace(spec, observer_or_fake_quant_ctr=_Hooked(spec.observer_or_fake_quant_ctr, _Clamp(low, high)))


def _observed_wider(spec: Any, times: float) -> Any:
    if times == 1:
        return spec
    return replace(spec, observer_or_fake_quant_ctr=_Hooked(spec.observer_or_fake_quant_ctr, _Widen(times)))


class _Hooked:
    """A constructor of observers, or fake quantizers, with hooks that change what is observed."""

    def __init__(self, constructor: Any, add_to: Callable[[nn.Module], None]) -> None:
        self.constructor, self.add_to = constructor, add_to
        partial = getattr(constructor, "p", None)
        self.__name__ = getattr(partial.func if partial is not None else constructor, "__name__", "observer")

    def with_args(self, **options: Any) -> _Hooked:
        """As PT2E's constructors have it."""
        return _Hooked(self.constructor.with_args(**options), self.add_to)

    def __call__(self) -> nn.Module:
        observer: nn.Module = self.constructor()
        self.add_to(observer)
        return observer


@dataclass(frozen=True)
class _Clamp:
    """Lets values through only as far as the activation behind does."""

    low: float | None
    high: float | None

    def __call__(self, observer: nn.Module) -> None:
        observer.register_forward_pre_hook(self._clamped)

    def _clamped(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0].clamp(self.low, self.high), *args[1:])


@dataclass(frozen=True)
class _Widen:
    """Shows an observer a multiple of the values, which go on as they are."""

    times: float

    def __call__(self, observer: nn.Module) -> None:
        inner = getattr(observer, "activation_post_process", observer)  # of a fake quantizer, its observer alone
        inner.register_forward_pre_hook(self._multiplied)
        inner.register_forward_hook(self._divided)

    def _multiplied(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0] * self.times, *args[1:])

    def _divided(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return output / self.times
