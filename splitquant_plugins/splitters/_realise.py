"""Parts that a backend rounds to chosen codes, and that sum to the weights.

Codes c1..ck of a weight w leave an error e = w - sum(cj * sj). The parts have to sum to w all the same, and can:
part j may hold anything between its rounding thresholds (cj - 1/2) sj and (cj + 1/2) sj without changing its code,
as long as it stays inside the part's range. Starting from the part with the finest scale, each takes what it can
of e. For the nearest sum there is always room: were |e| more than half a step of any part whose code can still
move, moving it would give a nearer sum; and where no code can move, the ranges cover w.

The backend has to derive exactly the chosen scale and zero point, so each part's ends are *pinned*: some weight
holds the end of the range itself, with the other parts making up for it. The cheapest weight is taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from splitquant_plugins.splitters._codebook import Codebook, sumset
from splitquant_plugins.splitters._shapes import MARGIN, Shape, table

if TYPE_CHECKING:
    from collections.abc import Sequence

_CHUNK = 1 << 20  # weights handled at once
_CANDIDATES = 128  # weights per group that may hold a pin


@dataclass(frozen=True)
class Levels:
    """Every sum of one level per part, for some groups, ascending.

    `value`, `low`, `high` [groups, L]: the sum and the weights it can stand for; `digits` [L_sorted.., ] as
    `order` [groups, L]: the index of the sum among all combinations, the last part's code running fastest.
    `level`, `least`, `most` [groups, k, c]: each code's level and the values of the part that round to it.
    """

    value: Tensor
    low: Tensor
    high: Tensor
    order: Tensor
    level: Tensor
    least: Tensor
    most: Tensor

    @property
    def width(self) -> int:
        """Codes per part."""
        return self.level.shape[2]

    def rows(self, index: slice) -> Levels:
        """The levels of some groups."""
        return Levels(*(getattr(self, name)[index] for name in self.__dataclass_fields__))


def levels(found: Sequence[Shape], book: Codebook) -> Levels:
    """Tabulate the sums of a codebook whose scales are in the weights' own unit."""
    codes = table(list(found)).to(book.scale)
    ends = torch.tensor([(shape.low, shape.high) for shape in found]).to(book.scale)
    least = torch.maximum(codes - 0.5 + MARGIN, ends[:, :1])
    most = torch.minimum(codes + 0.5 - MARGIN, ends[:, 1:])
    value = sumset(codes[book.shape], book.scale)
    value, order = value.sort(dim=1)
    scale = book.scale.unsqueeze(2)
    return Levels(
        value,
        sumset(least[book.shape], book.scale).gather(1, order),
        sumset(most[book.shape], book.scale).gather(1, order),
        order,
        codes[book.shape] * scale,
        least[book.shape] * scale,
        most[book.shape] * scale,
    )


def nearest(weights: Tensor, sums: Levels) -> Tensor:
    """Index of the nearest sum of each weight, [groups, n]."""
    middle = ((sums.value[:, 1:] + sums.value[:, :-1]) / 2).to(weights.dtype)
    return torch.searchsorted(middle.contiguous(), weights.contiguous())


def spread(weights: Tensor, choice: Tensor, sums: Levels) -> list[Tensor]:
    """Values of the k parts, each [groups, n], that round to the sums `choice` and add up to the weights."""
    digit = sums.order.gather(1, choice)
    k, width = sums.level.shape[1:]
    parts: list[Tensor] = []
    least: list[Tensor] = []
    most: list[Tensor] = []
    for part in range(k - 1, -1, -1):
        here = digit % width
        digit = digit // width
        for out, source in ((parts, sums.level), (least, sums.least), (most, sums.most)):
            out.append(source[:, part].to(weights.dtype).gather(1, here))
    return _absorb(weights, parts, least, most)[::-1]


def _absorb(weights: Tensor, parts: list[Tensor], least: list[Tensor], most: list[Tensor]) -> list[Tensor]:
    """Let the parts take, one after the other, what they lack to the weights."""
    error = weights - sum(parts[1:], parts[0])
    out = []
    for part, low, high in zip(parts, least, most, strict=True):
        moved = (part + error).clamp(low, high)
        error = error - (moved - part)
        out.append(moved)
    out[0] = out[0] + error  # rounding of the subtractions above, and nothing else
    return out


def realise(groups: Tensor, found: Sequence[Shape], book: Codebook, choice: Tensor | None = None) -> list[Tensor]:
    """Parts [groups, n] for 2-D `groups`, in float32 or wider; `choice` replaces the nearest sums."""
    wide = torch.promote_types(groups.dtype, torch.float32)
    k = book.scale.shape[1]
    out = [torch.empty_like(groups, dtype=wide) for _ in range(k)]
    n = groups.shape[1]
    rows = max(1, min(_CHUNK // n, (1 << 22) // (len(found[0].codes) ** k)))
    columns = min(n, _CHUNK)
    for top in range(0, len(groups), rows):
        block = slice(top, top + rows)
        sums = levels(found, Codebook(book.shape[block], book.scale[block]))
        for left in range(0, n, columns):
            here = slice(left, left + columns)
            weights = groups[block, here].to(wide)
            picked = nearest(weights, sums) if choice is None else choice[block, here]
            for part, values in zip(out, spread(weights, picked, sums), strict=True):
                part[block, here] = values
        _pin(groups[block].to(wide), [part[block] for part in out], found, book.shape[block], sums)
    return out


def _pin(weights: Tensor, parts: list[Tensor], found: Sequence[Shape], shape: Tensor, sums: Levels) -> None:
    """Put the ends of every part's range into some weight of every group, in place."""
    k = len(parts)
    index = _candidates(weights)
    sample = weights.gather(1, index).double()
    free = torch.ones_like(sample, dtype=torch.bool)
    # what the sampled weights cost as they are
    near = sums.value.gather(1, nearest(sample, sums))
    now = (sample - near).square()
    most_pins = max(len(s.pins) for s in found)
    nothing = (float("nan"), 0.0)
    pins = torch.tensor([(s.pins + (nothing,) * most_pins)[:most_pins] for s in found], dtype=torch.float64)
    pins = pins.to(weights.device)[shape]  # [groups, k, pins, 2]
    rows = torch.arange(len(weights), device=weights.device)
    ones = torch.ones_like(sums.level[:, 1:, 0])
    scale = (sums.level[:, :, 1] - sums.level[:, :, 0]).abs()
    either = found[0].either
    for part in range(k):
        done = torch.zeros(len(weights), dtype=torch.bool, device=weights.device)
        others = [other for other in range(k) if other != part]
        combos, low, high = (
            sumset(source[:, others], ones).unsqueeze(1) for source in (sums.level, sums.least, sums.most)
        )
        for number in range(most_pins):
            value = pins[:, part, number, 0] * scale[:, part]
            level = pins[:, part, number, 1] * scale[:, part]
            rest = (sample - value.unsqueeze(1)).unsqueeze(2)
            cost = (sample - level.unsqueeze(1)).unsqueeze(2).sub(combos).square()
            cost = cost.masked_fill((rest < low) | (rest > high), torch.inf)
            least, combo = cost.min(dim=2)
            gain = (least - now).masked_fill(~free, torch.inf)
            best, where = gain.min(dim=1)
            ok = torch.isfinite(best) & torch.isfinite(value) & ~done
            if not ok.any():
                continue
            if either:
                done |= ok
            row, at = rows[ok], where[ok]
            free[row, at] = False
            column = index[row, at]
            digit = combo[row, at]
            values, lows, highs = [], [], []
            for other in reversed(others):
                here = digit % sums.width
                digit = digit // sums.width
                values.append(sums.level[row, other, here])
                lows.append(sums.least[row, other, here])
                highs.append(sums.most[row, other, here])
            moved = _absorb(sample[row, at] - value[ok], values, lows, highs)
            for other, held in zip(reversed(others), moved, strict=True):
                parts[other][row, column] = held.to(weights.dtype)
            parts[part][row, column] = value[ok].to(weights.dtype)


def _candidates(weights: Tensor) -> Tensor:
    """Indices of the weights that may hold a pin: all, or the extremes and an even sample of the others."""
    groups, n = weights.shape
    if n <= _CANDIDATES:
        return torch.arange(n, device=weights.device).expand(groups, -1)
    quarter = _CANDIDATES // 4
    ends = [weights.topk(quarter, dim=1, largest=largest).indices for largest in (True, False)]
    even = torch.linspace(0, n - 1, 2 * quarter, device=weights.device).long().expand(groups, -1)
    index = torch.cat([*ends, even], dim=1).sort(dim=1).values
    # a weight that is listed twice could get two pins: send its copy to a fresh neighbour or drop it
    twice = torch.nn.functional.pad(index[:, 1:] == index[:, :-1], (1, 0))
    return torch.where(twice, index[:, :1], index)
