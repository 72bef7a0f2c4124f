"""What a split does to one layer's weight: ranges, scaling factors, expected gain and cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from splitquant_plugins.evaluation.metrics import sqnr_db
from splitquant_plugins.grid import Grid
from splitquant_plugins.modules import part_names
from splitquant_plugins.solvers.rounding_error import quantized_sum

OUTLIER_FENCE = 3.0
HISTOGRAM_BINS = 80


@dataclass(frozen=True)
class Histogram:
    """Counts of a weight's values and of each part's nonzero values, over the same `edges` [bins + 1]."""

    edges: Tensor
    whole: Tensor
    parts: tuple[Tensor, ...]


@dataclass(frozen=True)
class GridGain:
    """Weight SQNR in decibels when a grid rounds the weight whole, and when it rounds each part by itself."""

    plain_db: float
    split_db: float
    plain_bits_per_weight: float
    split_bits_per_weight: float

    @property
    def gain_db(self) -> float:
        """What the split adds."""
        return self.split_db - self.plain_db


@dataclass(frozen=True)
class Range:
    """A part's least and greatest value, and the paper's S, None where all values are equal."""

    name: str
    min: float
    max: float
    scaling_factor: float | None


@dataclass(frozen=True)
class Inspection:
    """One layer's weight before and after the split.

    `outliers` counts values beyond `OUTLIER_FENCE` interquartile ranges from the quartiles. `scaling_factor` is the
    paper's S, None where all values are equal. `boundaries` are the values halfway between neighbouring parts, empty
    where the parts' ranges overlap. `gains` are by grid granularity.
    """

    layer: str
    kind: str
    shape: tuple[int, ...]
    min: float
    max: float
    outliers: int
    scaling_factor: float | None
    parts: tuple[Range, ...]
    boundaries: tuple[float, ...]
    gains: dict[str, GridGain]
    histogram: Histogram = field(repr=False)
    reason: str | None = None

    @property
    def weights(self) -> int:
        """Number of weights."""
        return int(np.prod(self.shape))

    @property
    def least_part_scaling_factor(self) -> float | None:
        """The coarsest part's S."""
        return min((part.scaling_factor for part in self.parts if part.scaling_factor is not None), default=None)


def inspect_weight(
    layer: str,
    kind: str,
    weight: Tensor,
    parts: Mapping[str, Sequence[Tensor]],
    grids: Mapping[str, Grid],
    reason: str | None = None,
) -> Inspection:
    """Inspect a float weight [out, ...] and its parts.

    `grids` are those to be compared, by granularity, and `parts` what the splitter made for each of them; ranges
    and scaling factors are of the first. A layer that stays whole, for `reason`, has itself as its only part.
    """
    weight = _wide(weight)
    wide = {name: [_wide(part) for part in found] for name, found in parts.items()}
    shown = wide[next(iter(grids))]
    bits = next(iter(grids.values())).bits
    return Inspection(
        layer=layer,
        kind=kind,
        shape=tuple(weight.shape),
        min=float(weight.min()),
        max=float(weight.max()),
        outliers=count_outliers(weight),
        scaling_factor=scaling_factor(weight, bits),
        parts=tuple(
            Range(name, float(part.min()), float(part.max()), scaling_factor(part, bits))
            for name, part in zip(part_names(len(shown)), shown, strict=True)
        ),
        boundaries=boundaries_of(shown),
        gains={name: grid_gain(weight, wide[name], grid) for name, grid in grids.items()},
        histogram=histogram_of(weight, shown),
        reason=reason,
    )


def scaling_factor(tensor: Tensor, bits: int) -> float | None:
    """Return the paper's S = (2^b - 1) / (α - β), equation (2), over the tensor's range [β, α].

    A part is taken as it will be quantized, with its injected zeros. None where all values are equal.
    """
    low, high = float(tensor.min()), float(tensor.max())
    return (2**bits - 1) / (high - low) if high > low else None


def count_outliers(tensor: Tensor) -> int:
    """Count the values more than three interquartile ranges below the first or above the third quartile."""
    values = tensor.detach().cpu().numpy().ravel()
    first, third = np.percentile(values, [25, 75])
    reach = OUTLIER_FENCE * (third - first)
    return int(((values < first - reach) | (values > third + reach)).sum())


def boundaries_of(parts: Sequence[Tensor]) -> tuple[float, ...]:
    """Return the values halfway between the nonzero values of neighbouring parts; () where ranges overlap."""
    ranges = [(float(held.min()), float(held.max())) for held in (part[part != 0] for part in parts) if held.numel()]
    ranges.sort()
    pairs = list(pairwise(ranges))
    if any(below[1] >= above[0] for below, above in pairs):
        return ()
    return tuple((below[1] + above[0]) / 2 for below, above in pairs)


def grid_gain(weight: Tensor, parts: Sequence[Tensor], grid: Grid) -> GridGain:
    """Measure a grid on the weight and on its parts, each rounded by itself and then summed."""
    return GridGain(
        plain_db=sqnr_db(weight, quantized_sum([weight], grid)),
        split_db=sqnr_db(weight, quantized_sum(parts, grid)),
        plain_bits_per_weight=grid.stored_bits(weight.shape) / weight.numel(),
        split_bits_per_weight=sum(grid.stored_bits(part.shape) for part in parts) / weight.numel(),
    )


def histogram_of(weight: Tensor, parts: Sequence[Tensor], bins: int = HISTOGRAM_BINS) -> Histogram:
    """Count the values of a weight, and the nonzero values of each part, in equal bins over all their range."""
    low = min(float(tensor.min()) for tensor in (weight, *parts))
    high = max(float(tensor.max()) for tensor in (weight, *parts))
    if high <= low:
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, bins + 1)

    def counts(tensor: Tensor) -> Tensor:
        return torch.from_numpy(np.histogram(tensor.detach().cpu().numpy(), edges)[0])

    return Histogram(torch.from_numpy(edges), counts(weight), tuple(counts(part[part != 0]) for part in parts))


def _wide(tensor: Tensor) -> Tensor:
    """At least float32, so that 16-bit weights are measured against the grid and not against their own dtype."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))
