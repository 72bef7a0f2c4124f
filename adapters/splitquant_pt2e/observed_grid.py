"""The grid of any weight specification, found out by calling its observer.

A quantizer says how a weight is observed, not which grid results. So its observer (or fake quantizer) is made as
`prepare_pt2e` makes it and shown tensors: zeros, values of one sign and of both, rows of very different sizes. Where
its answers are those of PT2E's min-max rule, bit for bit, the grid is a `Pt2eGrid`; else an `ObservedGrid`, which
asks the observer each time.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from splitquant_plugins.errors import ConfigError
from splitquant_plugins.grid import Granularity, Grid, Scheme
from splitquant_pt2e.compat import new_observer
from splitquant_pt2e.grid import Pt2eGrid

_ASKED = 16  # groups that an observer of whole weights is asked about at once
_ROWS, _COLUMNS = 3, 5  # of the weight that shows which dimension has scales of its own


class CannotAskError(Exception):
    """The observer cannot be called, or answers with what is no linear grid; the message says how."""


@dataclass(frozen=True)
class ObservedGrid:
    """A grid whose scales and zero points are those that a specification's observer answers with.

    `axis` is the dimension whose indices have scales of their own, None where the whole weight shares one; in the
    orientation of the weight with its output channels first. Codes go from `quant_min` to `quant_max`. A fresh
    observer is asked each time, once: an observer that answers otherwise when it sees a weight again is refused by
    `grid_of_spec`.

    Where the whole weight shares a scale, an observer answers for one group only, and some take long to. A splitter
    that asks about many groups at once (ranges that it may try) gets the answers of `like`, the min-max grid of the
    same codes; what it makes of them is measured by `quantize_dequantize`, which always asks the observer.
    """

    spec: Any = field(repr=False, compare=False)
    like: Pt2eGrid
    quant_min: int
    quant_max: int
    scheme: Scheme
    axis: int | None
    transposed: bool = False

    @property
    def bits(self) -> int:
        """Bits per code."""
        return (self.quant_max - self.quant_min).bit_length()

    @property
    def granularity(self) -> Granularity:
        """What shares a scale."""
        return "tensor" if self.axis is None else "channel"

    @property
    def group_size(self) -> int | None:
        """None: a group is a channel or the tensor."""
        return None

    def groups(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Cut a weight into 2-D groups [groups, values]."""
        if self.axis is None or tensor.ndim < 2:
            return (tensor.reshape(1, -1),)
        return (tensor.movedim(self.axis, 0).reshape(tensor.shape[self.axis], -1),)

    def from_groups(self, groups: Sequence[Tensor], shape: torch.Size) -> Tensor:
        """Put what `groups` cut back together."""
        if self.axis is None or len(shape) < 2 or self.axis == 0:
            return groups[0].reshape(shape)
        moved = [shape[self.axis], *(size for dim, size in enumerate(shape) if dim != self.axis)]
        return groups[0].reshape(moved).movedim(0, self.axis)

    def qparams(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point of 2-D `groups`, each float32 of shape [groups, 1]."""
        if self.axis is None and len(groups) > _ASKED:
            return self.like.qparams(groups)
        if self.axis is None:
            answers = [_ask(self.spec, row.unsqueeze(0)) for row in groups.float()]
            scale, zero_point = (torch.cat(column) for column in zip(*answers, strict=True))
        else:
            rows = groups.float()
            dimension = self.axis ^ 1 if self.transposed else self.axis
            scale, zero_point = _ask(self.spec, rows.movedim(0, dimension).contiguous() if dimension else rows)
        return scale.reshape(-1, 1).to(groups.device), zero_point.reshape(-1, 1).to(groups.device)

    def quantize(self, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes (as floats) of 2-D `groups`, with their scale and zero point."""
        scale, zero_point = self.qparams(groups)
        codes = torch.round(groups.float() * (1.0 / scale)) + zero_point
        return codes.clamp(self.quant_min, self.quant_max), scale, zero_point

    def quantize_dequantize(self, tensor: Tensor) -> Tensor:
        """Round a weight as convert_pt2e does; the arithmetic is float32, the answer has the weight's dtype."""
        (groups,) = self.groups(tensor)
        codes, scale, zero_point = self.quantize(groups)
        return self.from_groups([((codes - zero_point) * scale).to(tensor.dtype)], tensor.shape)

    def stored_bits(self, shape: torch.Size) -> int:
        """Bits that a weight of this shape takes in packed form; PT2E itself stores a byte for each code."""
        return self.like.stored_bits(shape)


def grid_of_spec(spec: Any, axis: int) -> Grid:
    """Return the grid of a weight's QuantizationSpec; `axis` is the dimension of its output channels.

    Raises ConfigError where the observer cannot be called, or does not answer with scales and zero points per tensor
    or per index of one dimension; the message says why.
    """
    if spec is None:
        raise ConfigError("it has no quantization specification")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # observers deprecate their own arguments
            return _grid(spec, axis)
    except CannotAskError as error:
        raise ConfigError(str(error)) from error.__cause__


def _grid(spec: Any, axis: int) -> Grid:
    observer = _made(spec)
    dtype = getattr(observer, "dtype", None) or getattr(spec, "dtype", None)
    if not isinstance(dtype, torch.dtype) or dtype.is_floating_point:
        raise CannotAskError(f"its weights become {dtype}, which is no integer type")
    if getattr(spec, "is_dynamic", False):
        raise CannotAskError("its weights are quantized dynamically")
    lowest, highest = (getattr(observer, name, None) for name in ("quant_min", "quant_max"))
    lowest = int(torch.iinfo(dtype).min if lowest is None else lowest)
    highest = int(torch.iinfo(dtype).max if highest is None else highest)
    own = _own_dimension(spec)
    # the weight as the layer has it, with its output channels first: a transposed one swaps its two dimensions
    turned = axis == 1
    dimension = own if own is None or not turned else own ^ 1
    probes = _probes()
    shown = probes if own in (None, 0) else probes.t().contiguous()
    answers = [_ask(spec, row.unsqueeze(0)) for row in probes] if own is None else [_ask(spec, shown)]
    scale, zero_point = (torch.cat([answer[i].reshape(-1) for answer in answers]).reshape(-1, 1) for i in (0, 1))
    again = _made(spec)
    first = probes[-1:] if own is None else shown
    _look(again, first)
    once = _answer(again)
    _look(again, first)
    if not torch.equal(once[0], _answer(again)[0]):
        raise CannotAskError("its observer answers differently when it sees the same weight again")
    granularity: Granularity = "tensor" if own is None else "channel"
    scheme: Scheme = "symmetric" if bool((zero_point == zero_point[0]).all()) else "affine"
    # unsigned codes may be symmetric around a code in the middle: count them from there
    middle = zero_point[0] if scheme == "symmetric" else torch.zeros(1)
    if dimension in (None, 0):
        for grid in _closed_forms(lowest - int(middle), highest - int(middle), granularity, float(scale[0])):
            like_scale, like_zero_point = grid.qparams(probes)
            if torch.equal(like_scale, scale) and torch.equal(like_zero_point, zero_point - middle):
                return grid
    try:
        like = Pt2eGrid(lowest, highest, "affine" if lowest == 0 else scheme, granularity, float(scale.min()))
    except ConfigError as error:
        raise CannotAskError(str(error)) from error
    return ObservedGrid(spec, like, lowest, highest, scheme, dimension, turned)


def _closed_forms(lowest: int, highest: int, granularity: Granularity, eps: float) -> list[Pt2eGrid]:
    found = []
    schemes: tuple[Scheme, ...] = ("symmetric", "affine")
    for scheme, power_of_two in itertools.product(schemes, (False, True)):
        try:
            found.append(Pt2eGrid(lowest, highest, scheme, granularity, eps, power_of_two))
        except ConfigError:
            continue
    return found


def _made(spec: Any) -> Any:
    try:
        return new_observer(spec)
    except Exception as error:
        raise CannotAskError(f"its observer cannot be made: {_text(error)}") from error


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _look(observer: Any, weight: Tensor) -> None:
    try:
        with torch.no_grad():
            observer(weight.clone())
    except Exception as error:
        raise CannotAskError(f"its observer cannot be called: {_text(error)}") from error


def _answer(observer: Any) -> tuple[Tensor, Tensor]:
    try:
        with torch.no_grad():
            scale, zero_point = observer.calculate_qparams()[:2]
        scale, zero_point = torch.as_tensor(scale), torch.as_tensor(zero_point)
    except Exception as error:
        raise CannotAskError(f"its observer gives no scale and zero point: {_text(error)}") from error
    if scale.numel() != zero_point.numel() or not bool(torch.isfinite(scale).all()) or not bool((scale > 0).all()):
        raise CannotAskError("its observer answers with scales that are not positive numbers")
    return scale.detach().float(), zero_point.detach().float()


def _ask(spec: Any, weight: Tensor) -> tuple[Tensor, Tensor]:
    observer = _made(spec)
    _look(observer, weight)
    return _answer(observer)


def _own_dimension(spec: Any) -> int | None:
    """The dimension of a 2-D weight whose indices have scales of their own, or None."""
    weight = torch.linspace(-1, 2, _ROWS * _COLUMNS).reshape(_ROWS, _COLUMNS)
    number = _ask(spec, weight)[0].numel()
    if number == 1:
        return None
    if number == _ROWS:
        return 0
    if number == _COLUMNS:
        return 1
    raise CannotAskError(f"its observer answers with {number} scales for a weight of {_ROWS} x {_COLUMNS}")


def _probes() -> Tensor:
    """Weights, one a row, that tell grids apart; the first is all zero, which shows the least scale there is."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(40, 64, generator=generator) * torch.logspace(-6, 6, 40).unsqueeze(1)
    rows[0] = 0
    rows[1] = rows[1].abs()
    rows[2] = -rows[2].abs()
    rows[20] = rows[20].abs()
    rows[21] = -rows[21].abs()
    rows[22] = rows[22].abs() + 1
    rows[23] = 0.3
    rows[24] = -0.3
    rows[25, 1:] = 0
    rows[26] = torch.linspace(-2, 1, 64)
    rows[27] = torch.linspace(-1, 2, 64)
    rows[28] *= 10 * torch.rand(64, generator=generator).pow(8)
    rows[29] = 2.0**-3
    rows[30] = -1.75
    return rows
