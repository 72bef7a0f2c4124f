"""Parts chosen for the grid that they will be rounded to: sums of k codes instead of one code and zeros."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from splitquant_plugins.errors import CannotSplit
from splitquant_plugins.solvers.rounding_error import quantized_sum, row_error
from splitquant_plugins.splitters._codebook import Codebook, Search
from splitquant_plugins.splitters._exact import complete
from splitquant_plugins.splitters._feedback import choose
from splitquant_plugins.splitters._pieces import by_group, required
from splitquant_plugins.splitters._realise import levels, nearest, realise
from splitquant_plugins.splitters._shapes import Shape, shapes
from splitquant_plugins.splitters._sketch import sketch, sketch_size
from splitquant_plugins.splitters.base import Splitter, SplitterOptions
from splitquant_plugins.splitters.kmeans import KMeansOptions, KMeansSplitter
from splitquant_plugins.splitters.range import choose_cuts, range_parts
from splitquant_plugins.splitters.residual import choose_ranges, residual_parts

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from splitquant_plugins.grid import Grid
    from splitquant_plugins.plan import TensorPlan

_SKETCH = 256
_MOST_SUMS = 1024  # with more, codes are chosen part after part


class GridOptions(SplitterOptions):
    """Options of the `grid` splitter.

    `use_second_moment`: choose codes for the least output error where calibration data were given.
    """

    use_second_moment: bool = True


class GridSplitter(Splitter):
    """Choose scales and codes of all parts jointly, for the least error of the sum of the rounded parts.

    Also makes the parts of `residual`, `range` and `kmeans`, and the tensor in one part, measures each through
    the grid, and returns per output channel (per tensor on a per-tensor grid) what is best. So its measured
    error is never above theirs.
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

        def residual(groups: Tensor) -> list[Tensor]:
            return residual_parts(groups, choose_ranges(groups, grid_, k)[0], grid_)

        def ranges(groups: Tensor) -> list[Tensor]:
            return range_parts(groups, choose_cuts(groups, grid_, k)[0])

        makers: list[Callable[[], list[Tensor]]] = [
            lambda: complete(tensor, by_group(tensor, grid_, residual)[:-1]),
            lambda: by_group(tensor, grid_, ranges),
            lambda: clusters(tensor, plan),
            lambda: [tensor],
        ]
        found = shapes(grid_)
        if max(len(shape.codes) for shape in found) ** k <= _MOST_SUMS:
            if moment is not None:
                makers.insert(0, lambda: complete(tensor, joint_parts(tensor, grid_, found, k, moment)[:-1]))
            makers.insert(0, lambda: complete(tensor, joint_parts(tensor, grid_, found, k)[:-1]))
        return _best(tensor, k, makers, grid_, moment)


def clusters(tensor: Tensor, plan: TensorPlan) -> list[Tensor]:
    """The parts of the `kmeans` splitter; the tensor itself where it cannot be clustered."""
    try:
        return KMeansSplitter().split(tensor, replace(plan, options=KMeansOptions()), None)
    except CannotSplit:
        return [tensor]


def _padded(parts: list[Tensor], k: int) -> list[Tensor]:
    return parts + [torch.zeros_like(parts[0]) for _ in range(k - len(parts))]


def joint_parts(
    tensor: Tensor, grid: Grid, found: Sequence[Shape], k: int, moment: Tensor | None = None
) -> list[Tensor]:
    """The k parts, float32 or wider, that make the most of the sums of k codes."""

    def book(groups: Tensor) -> Codebook:
        peak = groups.abs().amax(dim=1, keepdim=True).double()
        chosen = Search(found, k, sketch(groups, sketch_size(len(groups), _SKETCH))).best()
        return Codebook(chosen.shape, chosen.scale * peak)

    if moment is None:
        return by_group(tensor, grid, lambda groups: realise(groups, found, book(groups)))
    return by_cells_with_moment(tensor, grid, found, book, moment)


def by_cells_with_moment(
    tensor: Tensor,
    grid: Grid,
    found: Sequence[Shape],
    book: Callable[[Tensor], Codebook],
    moment: Tensor,
) -> list[Tensor]:
    """As `by_group`, but codes are chosen for whole output channels, across the groups of a channel."""
    wide = torch.promote_types(tensor.dtype, torch.float32)
    pieces = [groups.to(wide) for groups in grid.groups(tensor)]
    # an all-zero group has no codebook; one that is tiny next to everything else stands in
    tiny = torch.finfo(wide).tiny * 1e6
    filled = [torch.where((groups != 0).any(dim=1, keepdim=True), groups, tiny) for groups in pieces]
    books = [book(groups) for groups in filled]
    tables = [levels(found, one) for one in books]
    sums = type(tables[0])(*(torch.cat([getattr(t, name) for t in tables]) for name in tables[0].__dataclass_fields__))
    offset, group, start = 0, [], []
    for groups, one in zip(pieces, tables, strict=True):
        index = torch.arange(len(groups), device=groups.device).unsqueeze(1) + offset
        group.append(index.expand_as(groups))
        start.append(nearest(groups, one))
        offset += len(groups)
    rows = tensor.shape[0]
    joined = [grid.from_groups(values, tensor.shape).reshape(rows, -1) for values in (pieces, group, start)]
    choice = choose(joined[0], joined[1], sums, moment, joined[2]).reshape(tensor.shape)
    parts = []
    for groups, codebook, picked in zip(pieces, books, grid.groups(choice), strict=True):
        values = realise(groups, found, codebook, picked)
        live = (groups != 0).any(dim=1, keepdim=True)
        parts.append([torch.where(live, part, 0.0) for part in values])
    return [grid.from_groups([piece[i] for piece in parts], tensor.shape) for i in range(len(parts[0]))]


def _best(
    tensor: Tensor, k: int, makers: Sequence[Callable[[], list[Tensor]]], grid: Grid, moment: Tensor | None
) -> list[Tensor]:
    """Per output channel the candidate of least measured error; the whole tensor's on a per-tensor grid."""
    whole = grid.granularity == "tensor" or tensor.ndim < 2
    best: list[Tensor] = []
    least = torch.empty(0)
    single: list[Tensor] = []
    single_error = float("inf")
    for make in makers:
        parts = _padded(make(), k)
        error = row_error(tensor, quantized_sum(parts, grid), moment)
        error = error.where(torch.isfinite(error), torch.inf)
        total = float(error.sum())
        if total < single_error:
            single, single_error = parts, total
        if not best:
            best, least = parts, error
        elif not whole:
            better = error < least
            mask = better.reshape(-1, *[1] * (tensor.ndim - 1))
            best = [torch.where(mask, new, old) for new, old in zip(parts, best, strict=True)]
            least = torch.where(better, error, least)
    if whole:
        return single
    # channels are independent on every grid known; where they turn out not to be, no mixture
    mixed = float(row_error(tensor, quantized_sum(best, grid), moment).sum())
    return best if mixed <= single_error else single
