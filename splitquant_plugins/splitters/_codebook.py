"""Search for the scales of k parts whose levels add up to the best codebook for every group.

Each part contributes one of its levels, so a weight is rounded to the nearest of the sums: the sumset of k
small uniform grids, 64 levels for three INT2 parts. Parts have to sum to the weight, so the ranges of the parts
together must cover the range of the group; nothing else ties the levels to the weights (see `_realise`).
"""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from splitquant_plugins.splitters._shapes import Shape, table
from splitquant_plugins.splitters._sketch import Sketch, price

if TYPE_CHECKING:
    from collections.abc import Sequence

_RATIOS = (0.12, 0.2, 0.25, 0.3, 0.4, 0.6, 0.85)
_CHUNK = 1 << 22  # levels priced at once
_STARTS = 1 << 20  # levels of all starts together
_COARSE = (0.2, 0.1)  # steps of the pattern search from every start
_FINE = (0.05, 0.025, 0.012)  # and from the best one's end
_SAMPLE_CELLS = 4
_TOGETHER = 128  # groups, repeated for each start, that descend together
_KEPT = 1024  # starts that are tried on more than one group


@dataclass(frozen=True)
class Codebook:
    """Per group: the index of every part's shape [groups, k] and its scale [groups, k], widest first."""

    shape: Tensor
    scale: Tensor

    def levels(self, codes: Tensor) -> Tensor:
        """All sums [groups, codes ** k], unsorted, the last part's code running fastest."""
        return sumset(codes[self.shape], self.scale)


def sumset(codes: Tensor, scale: Tensor) -> Tensor:
    """Sums of one level per part; `codes` [groups, k, c] times `scale` [groups, k] give [groups, c ** k]."""
    values = codes * scale.unsqueeze(2)
    total = values[:, 0]
    for part in range(1, values.shape[1]):
        total = (total.unsqueeze(2) + values[:, part].unsqueeze(1)).flatten(1)
    return total


class Search:
    """The search on a sketch; `cover` demands that the parts' ranges cover the groups' ranges."""

    def __init__(self, found: Sequence[Shape], k: int, groups: Sketch, *, cover: bool = True) -> None:
        self.codes = table(list(found)).to(groups.values.device)
        reach = torch.tensor([shape.interval() for shape in found], dtype=torch.float64)
        self.below, self.above = (-reach[:, 0]).to(self.codes), reach[:, 1].to(self.codes)
        ends = [(min(s.pins)[0], max(s.pins)[0]) if s.pins else (0.0, 0.0) for s in found]
        self.bottom, self.top = torch.tensor(ends, dtype=torch.float64).to(self.codes).T
        self.either = found[0].either
        self.k, self.groups, self.cover = k, groups, cover
        self.row = torch.arange(len(groups.values), device=groups.values.device)

    def best(self) -> Codebook:
        """The best codebook found for every group of the sketch, in units of the group's largest magnitude."""
        starts = self._starts()
        groups = len(self.row)
        shape, scale = self._rank(
            *starts, keep=2 if groups > 1024 or self.codes.shape[1] ** self.k > 64 else 3 if groups > 16 else 6
        )
        runs = shape.shape[1]
        step = max(1, min(runs, _TOGETHER // groups))  # starts of a group that descend together
        found = [self._descend_all(shape[:, i : i + step], scale[:, i : i + step]) for i in range(0, runs, step)]
        shape, scale, cost = (torch.cat(columns, dim=1) for columns in zip(*found, strict=True))
        best = cost.argmin(dim=1)
        shape, scale, _ = self._descend(shape[self.row, best], scale[self.row, best], _FINE)
        return Codebook(shape, scale)

    def _descend_all(self, shape: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Coarse descent from several starts per group [groups, starts, k]; costs [groups, starts]."""
        number = shape.shape[1]
        repeated = copy.copy(self)
        repeated.groups = self.groups.rows(self.row.repeat_interleave(number))
        ends = repeated._descend(shape.flatten(0, 1), scale.flatten(0, 1), _COARSE, shapes=True)
        return ends[0].reshape(shape.shape), ends[1].reshape(scale.shape), ends[2].reshape(-1, number)

    def cost(self, shape: Tensor, scale: Tensor, group: int | None = None) -> Tensor:
        """Squared error of codebook i on group i, or of every codebook on one group."""
        step = max(1, _CHUNK // self.codes.shape[1] ** self.k)
        out = []
        for at in range(0, len(shape), step):
            here = slice(at, at + step)
            values = sumset(self.codes[shape[here]], scale[here]).sort(dim=1).values
            on = self.groups.rows(here if group is None else slice(group, group + 1))
            cost = price(values, on)
            if self.cover:
                cost = cost.masked_fill(~self._can_pin(shape[here], scale[here], on), torch.inf)
            out.append(cost)
        return torch.cat(out)

    def _can_pin(self, shape: Tensor, scale: Tensor, on: Sketch) -> Tensor:
        """Whether every part's ends can occur: some weight must be that far out once the others pull back."""
        above, below = self.above[shape] * scale, self.below[shape] * scale
        bottom, top = self.bottom[shape] * scale, self.top[shape] * scale
        others_above = above.sum(dim=1, keepdim=True) - above
        others_below = below.sum(dim=1, keepdim=True) - below
        low = (bottom >= 0) | (on.values[:, :1] <= bottom + others_above)
        high = (top <= 0) | (on.values[:, -1:] >= top - others_below)
        can: Tensor = ((low | high) if self.either else (low & high)).all(dim=1)
        return can

    def fit(self, shape: Tensor, scale: Tensor, rows: slice | None = None, *, first: bool = False) -> Tensor:
        """Enlarge scales (all in proportion, or only the first part's) until the ranges cover the groups."""
        if not self.cover:
            return scale
        groups = self.groups if rows is None else self.groups.rows(rows)
        out = scale
        for reach, need in (
            (self.above[shape], groups.high),
            (self.below[shape], -groups.low),
        ):
            have = (out * reach).sum(dim=1, keepdim=True)
            if first:
                grow = ((need * (1 + 1e-9) - have) / reach[:, :1].clamp(min=1e-3)).clamp(min=0)
                out = torch.cat([out[:, :1] + grow, out[:, 1:]], dim=1)
            else:
                out = out * (need * (1 + 1e-9) / have.clamp(min=1e-12)).clamp(min=1)
        return out

    def _starts(self) -> tuple[Tensor, Tensor]:
        """Shapes [starts, k] and scale ratios [starts, k] to begin with."""
        number = len(self.codes)
        if number ** min(self.k, 3) <= 400:
            tuples = list(itertools.product(range(number), repeat=min(self.k, 3)))
        else:
            tuples = list(itertools.product(range(number), repeat=min(self.k, 2)))
        tuples = [t + (t[-1],) * (self.k - len(t)) for t in tuples]
        width = self.codes.shape[1]
        ratios = _RATIOS if width <= 4 else (*(r * 4 / width for r in _RATIOS), 0.85)
        steps = list(itertools.product(ratios, repeat=min(self.k - 1, 2)))
        steps = [t + (1 / width,) * (self.k - 1 - len(t)) for t in steps]
        scale = torch.tensor([(1.0, *t) for t in steps], dtype=torch.float64).cumprod(dim=1)
        shape = torch.tensor(tuples)
        pairs = torch.cartesian_prod(torch.arange(len(shape)), torch.arange(len(scale)))
        few = len(self.row) <= _SAMPLE_CELLS  # many groups share the starts that some of them like
        most = max(256, (_STARTS if few else _STARTS // 4) // width**self.k)
        if len(pairs) > most:
            pairs = pairs[torch.linspace(0, len(pairs) - 1, most).round().long()]
        return shape[pairs[:, 0]].to(self.codes.device), scale[pairs[:, 1]].to(self.codes)

    def _rank(self, shape: Tensor, scale: Tensor, keep: int) -> tuple[Tensor, Tensor]:
        """The best `keep` starts of every group; a sample of groups first weeds out most of the starts."""
        groups = len(self.row)
        sample = torch.linspace(0, groups - 1, min(groups, _SAMPLE_CELLS)).round().long().tolist()
        middle = sample[len(sample) // 2]
        cost = self.cost(shape, self._tight(shape, scale, slice(middle, middle + 1)), middle)
        kept = cost.topk(min(len(shape), _KEPT), largest=False).indices
        shape, scale = shape[kept], scale[kept]
        each = [self.cost(shape, self._tight(shape, scale, slice(c, c + 1)), c) for c in sample]
        relative = torch.stack([cost / cost.min() for cost in each], dim=1).clamp(max=10)
        good = relative.mean(dim=1).topk(min(12, len(shape)), largest=False).indices
        chosen = torch.unique(torch.cat([good, relative.argmin(dim=0)]))
        everywhere = [(shape[one].expand(groups, -1), scale[one].expand(groups, -1)) for one in chosen.unsqueeze(1)]
        cost = torch.stack([self.cost(sh, self._tight(sh, sc)) for sh, sc in everywhere], dim=1)
        best = chosen[cost.topk(min(keep, len(chosen)), dim=1, largest=False).indices]
        scales = [self._tight(shape[one], scale[one]) for one in best.T]
        return shape[best], torch.stack(scales, dim=1)

    def _tight(self, shape: Tensor, scale: Tensor, rows: slice | None = None) -> Tensor:
        """Scales in the ratios of `scale` that cover the groups and no more."""
        if self.cover:
            return self.fit(shape, scale * 1e-6, rows)
        both = torch.stack([(scale * self.above[shape]).sum(1), (scale * self.below[shape]).sum(1)])
        return scale / both.amax(dim=0).unsqueeze(1)

    def _descend(
        self, shape: Tensor, scale: Tensor, deltas: Sequence[float], *, shapes: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Pattern search over the logarithms of the scales, and over one part's shape at a time."""
        cost = self.cost(shape, scale)
        for delta in deltas:
            for _ in range(2):
                for part, sign, first in itertools.product(range(self.k), (1, -1), (False, True)):
                    if first and (part == 0 or not self.cover):
                        continue
                    trial = scale.clone()
                    trial[:, part] *= 1 + sign * delta
                    shape, scale, cost = self._accept(shape, scale, cost, shape, trial, first=first)
            if shapes and delta == deltas[-1]:
                for part, new in itertools.product(range(self.k), range(len(self.codes))):
                    other = shape.clone()
                    other[:, part] = new
                    shape, scale, cost = self._accept(shape, scale, cost, other, scale, first=False)
        return shape, scale, cost

    def _accept(
        self, shape: Tensor, scale: Tensor, cost: Tensor, new_shape: Tensor, new_scale: Tensor, *, first: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        new_scale = self.fit(new_shape, new_scale, first=first)
        new = self.cost(new_shape, new_scale)
        better = new < cost
        return (
            torch.where(better.unsqueeze(1), new_shape, shape),
            torch.where(better.unsqueeze(1), new_scale, scale),
            torch.where(better, new, cost),
        )
