"""The k parts that make the most of all sums of k codes: codebooks searched group by group, and parts for them."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from splitquant_plugins.parallel import CHUNK, in_threads
from splitquant_plugins.solvers.gptq import Levels
from splitquant_plugins.splitters._few_bits import scale_bits, scales_of_few_bits
from splitquant_plugins.splitters._power_of_two import round_scales
from splitquant_plugins.splitters._search import rank_starts, search_groups
from splitquant_plugins.splitters._shapes import MARGIN, Shape
from splitquant_plugins.splitters._sum_parts import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    SHORT,
    force_pins,
    levels_of_groups,
    pins_of,
    realise_groups,
    realise_span,
    tabulate,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from splitquant_plugins.grid import Grid

    Array = NDArray[Any]

# With more, codes are chosen part after part by `residual`, which is as good then: two parts of 8 bits come within
# 0.5 dB of a plain grid of 16. On three parts of 4 bits, 4096 sums, the joint search is 1.5 to 5 dB better, and 20 to
# 35 dB on symmetric full grids, whose clipped ends the other parts can make up for.
MOST_SUMS = 4096

_KINDS = {torch.float64: FLOAT64, torch.float32: FLOAT32, torch.float16: FLOAT16, torch.bfloat16: BFLOAT16}


@dataclass(frozen=True)
class Effort:
    """How much is searched, and what each number was chosen by.

    Decibels and times (one core) are of 2048 x 2048 Student-t(4) weights, INT2 affine in groups of 64, k = 3, where
    nothing else is said.
    """

    # Scale ratios of neighbouring parts to start from, times 4 / codes for wider parts.
    ratios: tuple[float, ...] = (0.12, 0.2, 0.25, 0.3, 0.4, 0.6, 0.85)
    # And so many from 0.1 to 1 where all starts together have room for them: 0.3 dB per tensor
    # on symmetric grids.
    dense: int = 19
    # By how much ranges exceed the group's where their ends are clipped, as they are on symmetric full grids.
    slack: tuple[float, ...] = (1.0, 1.3)
    # Sums of all starts together, which bounds the time of ranking them: 40 ms a tensor. A quarter of them lose 0.04 dB
    # on three parts of INT3 per tensor, and save nothing where parts have four codes.
    start_sums: int = 1 << 22
    # Starts that are best on one group, and tried on eight; more where there are fewer groups.
    first_kept: int = 1024
    ranking_groups: int = 8
    # Starts that a sample group, or a group of a tensor that has few, tries.
    shortlist: int = 16
    # Groups that are searched for what all others start from: 64 give 32.47, 256 give 32.59 dB, and take 0.05 s.
    library_groups: int = 256
    # One in so many at most.
    one_in: int = 16
    # Fewer groups are searched in full whatever they hold: see `for_groups`.
    many: int = 8192
    # Up to so many groups, and sums of them together, are searched by themselves, as up to `alone_at_least` always
    # are: 0.2 to 0.8 dB on the nets of the tests, whose rows are unlike, for 0.1 to 0.5 milliseconds a group.
    alone: int = 1024
    alone_sums: int = 1 << 18
    alone_at_least: int = 64
    # Sums that a library's groups have together: bounds the time for wide parts.
    library_sums: int = 1 << 14
    # Starts in the library: 16, 32 and 64 give 32.3, 32.6 and 32.7 dB; 64 take half as long again.
    library: int = 32
    # Sums that are priced for a group from its library, which bounds the time for wide parts.
    priced_sums: int = 1 << 15
    # Starts from which a sample group descends, and all groups together where there are few: 0.1 dB per tensor, and
    # 0.2 to 0.4 dB per channel or group from 2048 in place of 256.
    descents: int = 4
    descents_in_all: int = 2048
    most_descents: int = 256
    # Sums of the starts that one group, and all of them, descend from: bounds the time for wide parts.
    descent_sums: int = 1 << 16
    descent_sums_in_all: int = 1 << 20
    # Steps of the pattern search on scales, as parts of them: from every start, and from the best one's end. From a
    # library long steps gain 0.005 dB, and a second start 0.1 dB for half as much time again.
    # Where there are few, 0.05 from every start gains up to 0.4 dB on symmetric full grids.
    coarse: tuple[float, ...] = (0.2, 0.1)
    coarse_alone: tuple[float, ...] = (0.2, 0.1, 0.05)
    fine: tuple[float, ...] = (0.05, 0.05, 0.025, 0.025, 0.012, 0.006)
    from_library: tuple[float, ...] = (0.05,)
    then: tuple[float, ...] = (0.025,)
    # One in so many groups, those of the largest errors, is searched from all starts: 0.03 to 0.07 dB, on symmetric
    # grids too, for a tenth to a fifth of the time.
    again_one_in: int = 16
    # How far placements move at once, in steps of the grid: any distance gains 0.01 dB from a library.
    reach: float = 9.0
    reach_from_library: float = 0.6
    # Bins per sum that a longer group is summarised by: twice as many gain less than 0.01 dB.
    bins_per_sum: int = 16
    # Heavy tails leave the middle few bins where one group spans them all, which costs up to 0.2 dB per tensor.
    bins_in_all: int = 1 << 17
    fewest_bins: int = 256
    most_bins: int = 8192
    # Values of a group that are looked at in the search; a longer one is sampled evenly. All of 2^22 gain nothing.
    most_values: int = 1 << 18
    # Values of all sample groups together.
    sample_values: int = 1 << 18

    def for_groups(self, groups: int, n: int, sums: int, *, few_bits: bool = False) -> Effort:
        """What is enough for that many groups of `n` values that have so many sums.

        Where sums outnumber values, most codebooks serve: two parts of INT4 affine in groups of 128 get 42.97 dB in
        place of 43.00, in two thirds of the time. With a fourth of the starts they get 42.56 dB in a fourth of it, as
        good as any where scales keep `few_bits` and are rounded in the end. That is for large tensors.
        """
        if sums < n or groups < self.many:
            return self
        priced = self.priced_sums >> (4 if few_bits else 2)
        return replace(self, priced_sums=priced, from_library=(), then=(), again_one_in=64)


EFFORT = Effort()


@dataclass(frozen=True)
class Rules:
    """The shapes of a grid as arrays, in units of the scale.

    `codes` [shapes, c]; `reach` [shapes, 6]: how far values may go below and above 0, the lowest and highest end,
    and how far each is off its level; `spans` [2, shapes, c]: what rounds to each code; `pins` [shapes, p, 2]: value
    and level of each end that has to occur, NaN where there are fewer; `either`: one of them will do;
    `power_of_two`: scales are powers of two; `scale_bits`: they have so many significant bits, where not 0.
    """

    codes: Array
    reach: Array
    spans: Array
    pins: Array
    either: bool
    power_of_two: bool = False
    scale_bits: int = 0

    @property
    def width(self) -> int:
        """Codes per part."""
        return int(self.codes.shape[1])


def rules_of(found: Sequence[Shape]) -> Rules:
    """Tabulate shapes; those with fewer codes repeat their last."""
    width = max(len(shape.codes) for shape in found)
    codes = np.array([shape.codes + (shape.codes[-1],) * (width - len(shape.codes)) for shape in found])
    ends = np.array([(shape.low, shape.high) for shape in found])
    pins = np.full((len(found), max(1, *(len(shape.pins) for shape in found)), 2), np.nan)
    reach = np.zeros((len(found), 6))
    for i, shape in enumerate(found):
        low, high = shape.interval()
        bottom, top = (min(shape.pins), max(shape.pins)) if shape.pins else ((0.0, 0.0), (0.0, 0.0))
        reach[i] = (-low, high, bottom[0], top[0], abs(bottom[0] - bottom[1]), abs(top[0] - top[1]))
        pins[i, : len(shape.pins)] = shape.pins
    spans = np.stack([np.maximum(codes - 0.5 + MARGIN, ends[:, :1]), np.minimum(codes + 0.5 - MARGIN, ends[:, 1:])])
    return Rules(codes, reach, spans, pins, found[0].either, found[0].power_of_two)


def rules_for(tensor: Tensor, grid: Grid, found: Sequence[Shape]) -> Rules:
    """The rules of the parts of a tensor."""
    return replace(rules_of(found), scale_bits=scale_bits(grid, tensor))


@dataclass(frozen=True)
class Codebooks:
    """Per group: every part's shape, an index [groups, k], and scale [groups, k], widest first; the error [groups].

    Scales are in the weights' unit, 0 for a group of zeros. The error is the squared error of the nearest sums, and
    an estimate: see `price`.
    """

    shape: Array
    scale: Array
    error: Array

    def rows(self, index: slice) -> Codebooks:
        """The codebooks of some groups."""
        return Codebooks(self.shape[index], self.scale[index], self.error[index])


def search(groups: Tensor, rules: Rules, k: int, *, cover: bool = True, effort: Effort = EFFORT) -> Codebooks:
    """The best codebook found for each of 2-D `groups`, the same for any number of threads.

    `cover` demands that the parts' ranges cover the group's range, as parts that sum to the weights need.
    """
    number, n = groups.shape
    sums = rules.width**k
    effort = effort.for_groups(number, n, sums, few_bits=rules.scale_bits > 0)
    flags = np.array([rules.either, cover])
    books = Codebooks(np.zeros((number, k), np.int64), np.zeros((number, k)), np.zeros(number))
    live = (groups.amax(dim=1) - groups.amin(dim=1) + groups[:, 0].abs() > 0).nonzero().flatten()
    if not len(live):
        return books
    wanted = max(effort.fewest_bins, effort.bins_per_sum * sums, effort.bins_in_all // len(live))
    bins = 0 if n <= SHORT * rules.width else min(effort.most_bins, wanted)
    general = starts = _shortlist(
        _sample(groups, live, effort.ranking_groups, effort), rules, flags, bins, k, len(live), effort
    )
    if len(live) <= max(effort.alone_at_least, min(effort.alone, effort.alone_sums // sums)):
        most = min(effort.most_descents, min(effort.descent_sums, effort.descent_sums_in_all // len(live)) // sums)
        descents = max(effort.descents, min(effort.descents_in_all // len(live), most))
        steps = effort.coarse_alone, effort.fine, effort.reach
    else:
        wanted = min(effort.library_groups, max(len(live) // effort.one_in, 4), max(effort.library_sums // sums, 16))
        sample = _sample(groups, live, wanted, effort)
        starts = _library(sample, rules, flags, bins, starts, effort)
        descents, steps = 1, (effort.from_library, effort.then, effort.reach_from_library)

    def work(rows: slice) -> None:
        values = _values(_thinned(groups[rows], effort.most_values))
        found, _ = _descended(values, rules, flags, bins, starts, descents, *steps)
        _round_scales(found, rules, flags, values, bins)
        books.shape[rows], books.scale[rows], books.error[rows] = found.shape, found.scale, found.error
        if n > values.shape[1]:
            books.error[rows] *= n / values.shape[1]

    in_threads(work, _batches(number, n))
    if descents == 1:
        _search_again(groups, rules, flags, bins, (starts, general), books, effort)
    return books


def _search_again(
    groups: Tensor,
    rules: Rules,
    flags: Array,
    bins: int,
    starts: Sequence[tuple[Array, Array]],
    books: Codebooks,
    effort: Effort,
) -> None:
    """Search the groups of the largest errors from more starts, in place: a library does not know rare ones."""
    order = np.argsort(-books.error, kind="stable")
    worst = np.sort(order[: -(-len(order) // effort.again_one_in)])
    both = np.concatenate([one[0] for one in starts]), np.concatenate([one[1] for one in starts])
    steps = effort.coarse, effort.fine, effort.reach

    def work(rows: slice) -> None:
        index = worst[rows]
        values = _values(_thinned(groups[torch.from_numpy(index).to(groups.device)], effort.most_values))
        found, _ = _descended(values, rules, flags, bins, both, effort.descents, *steps)
        _round_scales(found, rules, flags, values, bins)
        found.error[:] *= groups.shape[1] / values.shape[1] if groups.shape[1] > values.shape[1] else 1.0
        better = found.error < books.error[index]
        books.shape[index[better]], books.scale[index[better]] = found.shape[better], found.scale[better]
        books.error[index[better]] = found.error[better]

    in_threads(work, _batches(len(worst), groups.shape[1]))


def _descended(
    values: Array,
    rules: Rules,
    flags: Array,
    bins: int,
    starts: tuple[Array, Array],
    descents: int,
    coarse: Sequence[float],
    fine: Sequence[float],
    reach: float,
) -> tuple[Codebooks, Array]:
    """The best codebooks, and by how much their ranges exceed the groups'."""
    number, k = len(values), starts[0].shape[1]
    found, slack = Codebooks(np.empty((number, k), np.int64), np.empty((number, k)), np.empty(number)), np.empty(number)
    search_groups(
        *(rules.codes, rules.reach, flags, values, bins, *starts, descents, reach, np.array(coarse), np.array(fine)),
        *(found.shape, found.scale, found.error, slack),
    )
    return found, slack


def _round_scales(found: Codebooks, rules: Rules, flags: Array, values: Array, bins: int) -> None:
    """Where the grid has some scales only, the best of these, in place."""
    books = found.shape, found.scale, found.error
    if rules.power_of_two:
        round_scales(rules.codes, rules.reach, flags, values, bins, *books)
    elif rules.scale_bits:
        scales_of_few_bits(rules.codes, rules.reach, flags, values, bins, rules.scale_bits, *books)


def _library(
    values: Array, rules: Rules, flags: Array, bins: int, starts: tuple[Array, Array], effort: Effort
) -> tuple[Array, Array]:
    """Starts [m, k] that suit most groups: out of the codebooks of sample groups, those that together do best on them.

    Groups look alike in units of their largest magnitude, so that one of a few codebooks is nearly right for each.
    """
    steps = effort.coarse, effort.fine, effort.reach
    found = in_threads(
        lambda rows: _descended(values[rows], rules, flags, bins, starts, effort.descents, *steps),
        [slice(at, min(at + 8, len(values))) for at in range(0, len(values), 8)],
    )
    shapes = np.concatenate([*(one.shape for one, _ in found), starts[0]])
    ratios = [one.scale / one.scale.sum(axis=1, keepdims=True) * slack[:, None] for one, slack in found]
    scales = np.concatenate([*ratios, starts[1]])
    costs = _ranked(values, rules, flags, bins, shapes, scales)
    best = np.concatenate([one.error for one, _ in found]) / np.abs(values).max(axis=1).astype(np.float64) ** 2
    relative = _relative(costs, best)
    covered = np.full(len(values), 10.0)
    chosen: list[int] = []
    sums = rules.width ** starts[0].shape[1]
    for _ in range(min(effort.library, max(effort.priced_sums // sums, 4), len(shapes))):
        chosen.append(int(np.argmin(np.minimum(relative, covered).sum(axis=1))))
        covered = np.minimum(covered, relative[chosen[-1]])
    order = np.unique(chosen)
    return shapes[order], scales[order]


def _ranked(values: Array, rules: Rules, flags: Array, bins: int, shapes: Array, scales: Array) -> Array:
    """Costs [starts, groups] of starts on sample groups."""
    costs = np.empty((len(shapes), len(values)))
    step = max(64, -(-len(shapes) // 8))

    def work(rows: slice) -> None:
        rank_starts(rules.codes, rules.reach, flags, values, bins, shapes[rows], scales[rows], costs[rows])

    in_threads(work, [slice(at, at + step) for at in range(0, len(shapes), step)])
    return costs


def _relative(costs: Array, best: Array) -> Array:
    """Costs [starts, groups] in units of each group's best, 10 at most, so that no group outweighs all others."""
    unit = np.where(np.isfinite(best), np.maximum(best, np.finfo(np.float64).tiny), 1.0)
    limited: Array = np.minimum(np.minimum(costs, 10 * unit) / unit, 10.0)
    return limited


def _sample(groups: Tensor, live: Tensor, number: int, effort: Effort) -> Array:
    """Up to `number` of the groups that are not all zero, evenly, and not too many values of them."""
    chosen = live[torch.linspace(0, len(live) - 1, min(len(live), number)).round().long()]
    return _values(_thinned(groups[chosen], max(effort.sample_values // len(chosen), effort.fewest_bins)))


def realise(groups: Tensor, rules: Rules, books: Codebooks, choice: Tensor | None = None) -> list[Tensor]:
    """Parts of 2-D `groups`, in their dtype, whose codes are those of the nearest sums, or of the sums `choice`."""
    number, n = groups.shape
    k = books.scale.shape[1]
    out = [torch.empty(groups.shape, dtype=groups.dtype) for _ in range(k)]
    nothing = np.empty((0, 0), np.int64)
    room = _Room(k)
    if n > CHUNK:
        for group in range(number):
            row = [part[group] for part in out]
            _realise_long(groups[group], rules, books.rows(slice(group, group + 1)), choice, row)
    else:

        def work(rows: slice) -> None:
            values = _values(groups[rows])
            made = room.like(values)
            chosen = nothing if choice is None else choice[rows].numpy()
            realise_groups(
                *(rules.codes, rules.spans, rules.pins, rules.either, _KINDS[groups.dtype]),
                *(values, chosen, books.shape[rows], books.scale[rows], made),
            )
            _copy(made, [part[rows] for part in out])

        in_threads(work, _batches(number, n))
    return [part.to(groups.device) for part in out]


def _realise_long(group: Tensor, rules: Rules, book: Codebooks, choice: Tensor | None, out: list[Tensor]) -> None:
    """As `realise` for one group [n], in pieces on all threads; a weight of the first piece that can holds a pin."""
    shape, scale = book.shape[0], book.scale[0]
    if scale[0] == 0:
        for part in out:
            part.zero_()
        return
    sums, middles, digits, table = tabulate(rules.codes, rules.spans, shape, scale)
    pins = pins_of(rules.pins, shape, scale)
    kind, k = _KINDS[group.dtype], len(scale)
    nothing, nobody = np.empty(0, np.int64), np.empty(0)
    room = _Room(k)

    def work(span: slice) -> Array:
        values = _values(group[span])
        made = room.like(values)
        held = np.empty(pins.shape[:2], np.int64)
        chosen = nothing if choice is None else choice.reshape(-1)[span].numpy()
        realise_span(values, chosen, middles, digits, table, pins, rules.either, kind, made, held, nobody)
        _copy(made, [part[span] for part in out])
        return np.where(held < 0, held, held + span.start)

    found = in_threads(work, [slice(at, min(at + CHUNK, len(group))) for at in range(0, len(group), CHUNK)])
    held = np.full(pins.shape[:2], -1)
    for one in found:
        held = np.where(held < 0, one, held)
    if not (((held >= 0) | np.isnan(pins[:, :, 0])).all() or (rules.either and (held >= 0).any(axis=1).all())):
        index, changed = force_pins(_values(group), sums, middles, nobody, table, pins, rules.either, kind, held)
        for part, values in zip(out, changed, strict=True):
            for place, value in zip(index.tolist(), values.tolist(), strict=True):
                part[place] = value


def levels(rules: Rules, books: Codebooks, n: int) -> Levels:
    """Every sum of codebooks, all 0 for a group of zeros, for groups [groups, n]."""
    number = (len(books.scale), rules.width ** books.scale.shape[1])
    value, low, high = np.empty(number), np.empty(number), np.empty(number)
    levels_of_groups(rules.codes, rules.spans, books.shape, books.scale, value, low, high)
    table_of = torch.arange(number[0], dtype=torch.int32)[:, None].expand(-1, n)
    return Levels(torch.from_numpy(value), table_of, low=torch.from_numpy(low), high=torch.from_numpy(high))


def joint_parts(tensor: Tensor, grid: Grid, found: Sequence[Shape], k: int) -> list[Tensor]:
    """The k parts, of the tensor's dtype, whose nearest sums make the least error.

    Their sum is off by at most eps times the last part's magnitude; see `complete_one`.
    """
    rules = rules_for(tensor, grid, found)
    pieces = [realise(groups, rules, search(groups, rules, k)) for groups in grid.groups(tensor)]
    return [grid.from_groups([parts[j] for parts in pieces], tensor.shape) for j in range(k)]


@lru_cache(maxsize=16)
def _starts(shapes: int, width: int, k: int, effort: Effort, slack: tuple[float, ...]) -> tuple[Array, Array]:
    """Shapes [starts, k] and scales [starts, k] to begin with; see `tighten` for what scales sum to."""
    most = 3 if shapes ** min(k, 3) <= 400 else 2
    tuples = [t + (t[-1],) * (k - len(t)) for t in itertools.product(range(shapes), repeat=min(k, most))]
    ratios = effort.ratios if width <= 4 else (*(r * 4 / width for r in effort.ratios), 0.85)
    dense = (*ratios, *np.geomspace(0.1 * min(1.0, 4 / width), 1.0, effort.dense).tolist())
    if len(tuples) * len(slack) * len(dense) ** min(k - 1, 2) * width**k <= effort.start_sums:
        ratios = dense
    steps = [t + (1 / width,) * (k - 1 - len(t)) for t in itertools.product(ratios, repeat=min(k - 1, 2))]
    scales = np.cumprod([(1.0, *step) for step in steps], axis=1)
    scales = np.concatenate([scales / scales.sum(axis=1, keepdims=True) * times for times in slack])
    pairs = np.arange(len(tuples) * len(scales))
    number = max(256, effort.start_sums // width**k)
    if len(pairs) > number:
        pairs = pairs[np.linspace(0, len(pairs) - 1, number).round().astype(np.int64)]
    return np.array(tuples, np.int64)[pairs // len(scales)], scales[pairs % len(scales)]


def _shortlist(
    values: Array, rules: Rules, flags: Array, bins: int, k: int, groups: int, effort: Effort
) -> tuple[Array, Array]:
    """The starts that every group tries: the best ones of the sample groups `values` together, and of each."""
    clipped = bool((rules.reach[:, 4:] > 0.4).all())
    shapes, scales = _starts(len(rules.codes), rules.width, k, effort, effort.slack if clipped else (1.0,))

    middle = len(values) // 2
    kept = np.argsort(_ranked(values[middle : middle + 1], rules, flags, bins, shapes, scales)[:, 0], kind="stable")[
        : effort.first_kept * effort.ranking_groups // len(values)
    ]
    shapes, scales = shapes[kept], scales[kept]
    each = _ranked(values, rules, flags, bins, shapes, scales)
    relative = _relative(each, each.min(axis=0))
    wanted = max(effort.shortlist, effort.descents_in_all // groups)
    best = np.argsort(relative.mean(axis=1), kind="stable")[:wanted]
    chosen = np.unique(np.concatenate([best, relative.argmin(axis=0)]))
    return shapes[chosen], scales[chosen]


def _thinned(groups: Tensor, most: int) -> Tensor:
    """At most about `most` values of every group, its smallest and largest among them."""
    if groups.shape[1] <= most:
        return groups
    ends = [groups.amin(dim=1, keepdim=True), groups.amax(dim=1, keepdim=True)]
    return torch.cat([groups[:, :: -(-groups.shape[1] // most)], *ends], dim=1)


def _values(values: Tensor) -> Array:
    """A tensor as an array for the compiled loops: float64 as it is, everything else in float32."""
    wide = values if values.dtype == torch.float64 else values.float()
    array: Array = wide.detach().cpu().contiguous().numpy()
    return array


class _Room(threading.local):
    """Memory for k parts, which each thread takes once: fresh pages cost as much as what is written to them."""

    def __init__(self, k: int) -> None:
        self._k = k
        self._flat = np.empty(0)

    def like(self, values: Array) -> Array:
        """Room for k arrays of the shape and dtype of `values`."""
        number = self._k * values.size
        if len(self._flat) < number or self._flat.dtype != values.dtype:
            self._flat = np.empty(number, values.dtype)
        return self._flat[:number].reshape(self._k, *values.shape)


def _copy(made: Array, out: Sequence[Tensor]) -> None:
    for part, values in zip(out, made, strict=True):
        part.copy_(torch.from_numpy(values))


def _batches(groups: int, n: int) -> list[slice]:
    """Cut the groups into batches that fit the cache, however many threads there are."""
    step = max(1, CHUNK // max(n, 1))
    return [slice(at, min(at + step, groups)) for at in range(0, groups, step)]
