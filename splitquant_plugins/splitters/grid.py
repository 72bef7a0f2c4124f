"""Parts chosen for the grid that they will be rounded to: sums of k codes instead of one code and zeros."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from splitquant_plugins.clustering import optimal_clusters
from splitquant_plugins.errors import CannotSplit
from splitquant_plugins.solvers.rounding_error import split_error
from splitquant_plugins.splitters._exact import complete
from splitquant_plugins.splitters._feedback import joint_parts_for_outputs
from splitquant_plugins.splitters._joint import MOST_SUMS, joint_parts
from splitquant_plugins.splitters._pieces import by_group, required
from splitquant_plugins.splitters._residual_search import rule_of
from splitquant_plugins.splitters._shapes import shapes
from splitquant_plugins.splitters._vernier import suits_vernier, vernier_parts
from splitquant_plugins.splitters.base import Splitter, SplitterOptions
from splitquant_plugins.splitters.kmeans import KMeansOptions, KMeansSplitter
from splitquant_plugins.splitters.range import choose_cuts, range_parts
from splitquant_plugins.splitters.residual import choose_ranges, residual_parts

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from splitquant_plugins.grid import Grid
    from splitquant_plugins.plan import TensorPlan

    Maker = Callable[[Tensor], list[Tensor]]

# Up to this many weights every candidate is made; beyond, those that could win, judged by a sample.
_ALL_CANDIDATES = 1 << 17
# Weights in a sample.
_SAMPLE = 1 << 13
# On a per-tensor grid a candidate is made where the sample promises at most this times the least error so far.
_CLOSE = 1.5
# With more levels than these k-means takes longer than making the candidates.
_FEW_LEVELS = 64


class GridOptions(SplitterOptions):
    """Options of the `grid` splitter.

    `use_second_moment`: choose codes for the least output error where calibration data were given.
    """

    use_second_moment: bool = True


class GridSplitter(Splitter):
    """Choose scales and codes of all parts jointly, for the least error of the sum of the rounded parts.

    Measured through the grid, per output channel (per tensor on a per-tensor grid), the result is never worse than
    the tensor in one part; nor than the parts of `residual`, `range` and `kmeans`, which are tried as well. On a
    tensor of more than 2^17 weights these are tried on a sample, the channels on which the joint parts do worst and
    others evenly, and everywhere if they win on one of the others.
    """

    Options: ClassVar[type[SplitterOptions]] = GridOptions
    uses_calibration: ClassVar[bool] = True
    needs_grid: ClassVar[bool] = True

    def split(self, tensor: Tensor, plan: TensorPlan, grid: Grid | None) -> Sequence[Tensor]:
        """Return `plan.k` parts of `tensor`'s shape and dtype.

        Their sum differs from the tensor by at most eps times the last part's magnitude, value by value; see
        `complete`. Raises InputError where there is no grid.
        """
        if plan.k == 1:
            return [tensor]
        k, grid_, options = plan.k, required(grid, plan), plan.options
        use = not isinstance(options, GridOptions) or options.use_second_moment
        moment = plan.second_moment if use else None
        if moment is not None:
            moment = moment.to(tensor.device)

        def residual(some: Tensor) -> list[Tensor]:
            def split(groups: Tensor) -> list[Tensor]:
                return residual_parts(groups, choose_ranges(groups, grid_, k)[0], grid_)

            return complete(some, by_group(some, grid_, split)[:-1])

        def ranges(some: Tensor) -> list[Tensor]:
            return by_group(some, grid_, lambda groups: range_parts(groups, choose_cuts(groups, grid_, k)[0]))

        found = shapes(grid_)
        race = _Race(tensor, k, grid_, moment)
        if max(len(shape.codes) for shape in found) ** k <= MOST_SUMS:
            race.enter(lambda some: joint_parts(some, grid_, found, k))
            if moment is not None:
                race.enter(lambda some: joint_parts_for_outputs(some, grid_, found, k, moment))
            race.enter(residual, sampled=True)
        else:
            rule = rule_of(grid_)
            if rule is not None and suits_vernier(rule):
                race.enter(
                    lambda some: complete(some, by_group(some, grid_, lambda each: vernier_parts(each, rule))[:-1])
                )
            race.enter(residual)
        race.enter(lambda some: [some])
        if not race.beats_disjoint():
            race.enter(ranges, sampled=True)
            race.enter(lambda some: clusters(some, plan), sampled=True)
        return race.winner()


def clusters(tensor: Tensor, plan: TensorPlan) -> list[Tensor]:
    """The parts of the `kmeans` splitter; the tensor itself where it cannot be clustered."""
    try:
        return KMeansSplitter().split(tensor, replace(plan, options=KMeansOptions()), None)
    except CannotSplit:
        return [tensor]


class _Race:
    """Keeps, per output channel, the candidate of least measured error; the whole tensor's on a per-tensor grid."""

    def __init__(self, tensor: Tensor, k: int, grid: Grid, moment: Tensor | None) -> None:
        self._tensor, self._k, self._grid, self._moment = tensor, k, grid, moment
        self._whole = grid.granularity == "tensor" or tensor.ndim < 2
        self._best: list[Tensor] = []
        self._least = torch.empty(0)
        self._single: list[Tensor] = []
        self._single_error = float("inf")
        self._mixed = False
        self._norm = torch.empty(0)

    def enter(self, make: Maker, *, sampled: bool = False) -> None:
        """Make and measure a candidate, and keep what is better about it.

        `sampled`: of a large tensor it is made only where a sample shows that it could win.
        """
        if sampled and self._moment is None and self._tensor.numel() > _ALL_CANDIDATES and not self._promising(make):
            return
        parts = make(self._tensor)
        error = self._error(self._tensor, parts)
        total = float(error.sum())
        if self._best and total >= self._single_error and (self._whole or not bool((error < self._least).any())):
            return
        parts = self._filled(parts)
        if total < self._single_error or not self._single:
            self._single, self._single_error = parts, total
        if not self._best:
            self._best, self._least = parts, error
        elif not self._whole:
            better = error < self._least
            if bool(better.any()):
                mask = better.reshape(-1, *[1] * (self._tensor.ndim - 1))
                self._best = [torch.where(mask, new, old) for new, old in zip(parts, self._best, strict=True)]
                self._least = torch.where(better, error, self._least)
                self._mixed = not bool(better.all())

    def _promising(self, make: Maker) -> bool:
        """Whether to make a candidate of the whole tensor; where it wins on sampled channels, it has these."""
        if self._whole:
            sample = self._sampled_values()
            likely = float(self._error(sample, make(sample)).sum()) * self._tensor.numel() / sample.numel()
            return likely < _CLOSE * self._single_error
        rows, even = self._sampled_channels()
        sample = self._tensor[rows]
        parts = self._filled(make(sample))
        error = self._error(sample, parts)
        better = error < self._least[rows]
        if bool(torch.isin(rows[better], even).any()):
            return True
        if bool(better.any()):
            self._mixed = True
            self._best = [each.clone() for each in self._best] if self._best is self._single else self._best
            for best, part in zip(self._best, parts, strict=True):
                best[rows[better]] = part[better]
            self._least[rows[better]] = error[better]
        return False

    def beats_disjoint(self) -> bool:
        """Whether, on the sample, no parts that share no place can win.

        Each weight has a code of one part then, and 0 of the others, so that the levels are few, and k-means of as
        many clusters bounds the error from below.
        """
        levels = self._k * (2**self._grid.bits - 1) + 1
        if self._moment is not None or self._tensor.numel() <= _ALL_CANDIDATES or levels > _FEW_LEVELS:
            return False
        if self._whole:
            sample = self._sampled_values()
            likely = float(optimal_clusters(sample, levels).inertia.sum()) * self._tensor.numel() / sample.numel()
            return likely > _CLOSE * self._single_error
        rows, _ = self._sampled_channels()
        sample = self._tensor[rows]
        groups = self._grid.groups(sample)
        each = [optimal_clusters(some, levels).inertia[:, None].expand(some.shape) / some.shape[1] for some in groups]
        bound = self._grid.from_groups(each, sample.shape).flatten(1).sum(dim=1)
        return bool((bound.to(self._least.device) > self._least[rows]).all())

    def _sampled_values(self) -> Tensor:
        flat = self._tensor.reshape(-1)
        ends = torch.stack([flat.amin(), flat.amax()])
        return torch.cat([flat[:: max(1, len(flat) // _SAMPLE)], ends]).reshape(1, -1)

    def _sampled_channels(self) -> tuple[Tensor, Tensor]:
        """Channels of the largest error relative to their energy together with even ones, and the even ones."""
        channels = len(self._tensor)
        number = max(1, min(channels, _SAMPLE // self._tensor[0].numel()))
        if not len(self._norm):
            wide = torch.promote_types(self._tensor.dtype, torch.float32)
            self._norm = torch.linalg.vector_norm(self._tensor.flatten(1), dim=1, dtype=wide).double()
        relative = self._least / self._norm.square().clamp(min=torch.finfo(torch.float64).tiny)
        even = torch.linspace(0, channels - 1, number, device=relative.device).round().long()
        return torch.unique(torch.cat([relative.topk(number).indices, even])), even

    def _filled(self, parts: list[Tensor]) -> list[Tensor]:
        return [*parts, *(torch.zeros_like(parts[0]) for _ in range(self._k - len(parts)))]

    def winner(self) -> list[Tensor]:
        """The parts of least error."""
        if self._whole or not self._mixed:
            return self._single
        # channels are independent on every grid known; where they turn out not to be, no mixture
        mixed = float(self._error(self._tensor, self._best).sum())
        return self._best if mixed <= self._single_error else self._single

    def _error(self, tensor: Tensor, parts: Sequence[Tensor]) -> Tensor:
        error = split_error(tensor, parts, self._grid, self._moment)
        return error.where(torch.isfinite(error), torch.inf)
