"""A wider search over the codes of short rows.

Alternating between codes and scales gets stuck where a better pair of both is not on the way. With the scale
and zero of a row eliminated (they are the closed-form ones of its codes), the error of codes q is

    w H wᵀ - max over zero points p of (w H uᵀ)² / (u H uᵀ), u = q - p,

for a symmetric grid or an integer zero point; a free zero takes the direction of ones out of H instead. Any
change of one or two codes is judged by a few sums. Rows so short that all their codes can be tried get the
optimum. Beyond the paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from splitquant_plugins.decoupleq.objective import Rows
from splitquant_plugins.decoupleq.solver_grid import SolverGrid

_RESTARTS = 16
_RESTART_ROUNDS = 6
_CHANGED = 0.4
_MOST_MOVES = 200
# Rows searched at once; bounds the memory for the gains of all pairs.
_ROWS = 4096
# All codes of a row are tried where there are at most so many: 8 inputs at 2 bits.
_MOST_CODES = 1 << 16
# Gains looked at together in that case.
_GAINS = 1 << 21


def searched_codes(problem: Sequence[Rows], codes: Tensor, grid: SolverGrid, seed: int) -> Tensor:
    """Codes [rows, d] at least as good as the given ones, each row with a scale and zero of its own.

    The best of all codes where these are few enough to try. Otherwise first the best change of one or two
    codes is made until none helps; then the same from copies of the best codes in which a random part was
    drawn anew. Deterministic for a seed.
    """
    generator = torch.Generator().manual_seed(seed)
    found = []
    start = 0
    for rows in problem:
        best = codes[start : start + len(rows.weight)]
        start += len(rows.weight)
        search = _Search.of(rows.moment, grid)
        if (search.quant_max - search.quant_min + 1) ** codes.shape[1] <= _MOST_CODES:
            found.append(search.best_of_all(rows.weight))
            continue
        best, gain = search.climbed(rows.weight, best)
        for _ in range(_RESTART_ROUNDS):
            copies = best.repeat_interleave(_RESTARTS, dim=0)
            codes_end = search.quant_max + 1
            drawn = torch.randint(search.quant_min, codes_end, copies.shape, generator=generator).to(copies)
            keep = torch.rand(copies.shape, generator=generator) >= _CHANGED
            copies = torch.where(keep.to(copies.device), copies, drawn)
            weight = rows.weight.repeat_interleave(_RESTARTS, dim=0)
            climbed, gains = search.climbed(weight, copies)
            top = gains.reshape(-1, _RESTARTS).max(dim=1)
            chosen = climbed.reshape(len(best), _RESTARTS, -1)[torch.arange(len(best)), top.indices]
            better = top.values > gain
            best, gain = torch.where(better[:, None], chosen, best), torch.where(better, top.values, gain)
        found.append(best)
    return torch.cat(found)


@dataclass(frozen=True)
class _Search:
    """Moves on codes [n, d] for one H."""

    moment: Tensor
    points: tuple[int, ...]
    quant_min: int
    quant_max: int

    @classmethod
    def of(cls, moment: Tensor, grid: SolverGrid) -> _Search:
        points = grid.zero_points
        if grid.zero == "free":
            # Least squares over the zero: what is left is orthogonal to ones.
            ones = moment.sum(dim=0)
            moment, points = moment - torch.outer(ones, ones) / ones.sum(), (0,)
        return cls(moment, points, grid.quant_min, grid.quant_max)

    def best_of_all(self, weight: Tensor) -> Tensor:
        """The codes of greatest gain, [n, d], found by trying all."""
        every = torch.arange(self.quant_min, self.quant_max + 1, dtype=weight.dtype, device=weight.device)
        codes = torch.cartesian_prod(*[every] * weight.shape[1]).reshape(-1, weight.shape[1])
        square, line = (codes @ self.moment * codes).sum(1), codes @ self.moment.sum(dim=0)
        best = []
        for rows in torch.split(weight, max(1, _GAINS // len(codes))):
            target = rows @ self.moment
            best.append(self._gain(square, line, target @ codes.T, target).argmax(dim=1))
        return codes[torch.cat(best)]

    def climbed(self, weight: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Best single or paired changes until none helps; codes and their gain [n]."""
        pieces = [
            self._climbed(w, c) for w, c in zip(torch.split(weight, _ROWS), torch.split(codes, _ROWS), strict=True)
        ]
        return torch.cat([c for c, _ in pieces]), torch.cat([g for _, g in pieces])

    def _climbed(self, weight: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        moves = self._moves(codes)
        moved = moves @ self.moment
        norms = (moved * moves).sum(dim=1)
        ones = self.moment.sum(dim=0)
        target = weight @ self.moment
        codes = codes.clone()
        gain = self._gain((codes @ self.moment * codes).sum(1), codes @ ones, (target * codes).sum(1), target)
        for _ in range(_MOST_MOVES):
            square = (codes @ self.moment * codes).sum(1, keepdim=True) + 2 * codes @ moved.T + norms
            line = (codes @ ones)[:, None] + moves @ ones
            cross = (target * codes).sum(1, keepdim=True) + target @ moves.T
            gains = self._gain(square, line, cross, target)
            gains = gains.masked_fill(self._outside(codes, moves), -1.0)
            top = gains.max(dim=1)
            better = top.values > gain * (1 + 1e-12)
            if not bool(better.any()):
                break
            codes[better] += moves[top.indices[better]]
            gain = torch.where(better, top.values, gain)
        return codes, gain

    def _moves(self, codes: Tensor) -> Tensor:
        """All changes of one code, and all of two codes by one each: [moves, d]."""
        width = codes.shape[1]
        unit = torch.eye(width, dtype=codes.dtype, device=codes.device)
        span = self.quant_max - self.quant_min
        single = [step * unit for step in range(-span, span + 1) if step]
        first, second = torch.triu_indices(width, width, 1, device=codes.device)
        pairs = [a * unit[first] + b * unit[second] for a in (-1, 1) for b in (-1, 1)]
        return torch.cat([*single, *pairs])

    def _outside(self, codes: Tensor, moves: Tensor) -> Tensor:
        """Which moves leave the range of codes, [n, moves]."""
        outside = torch.zeros(len(codes), len(moves), dtype=torch.bool, device=codes.device)
        for column in range(codes.shape[1]):
            after = codes[:, column, None] + moves[:, column]
            outside |= (after > self.quant_max) | (after < self.quant_min)
        return outside

    def _gain(self, square: Tensor, line: Tensor, cross: Tensor, target: Tensor) -> Tensor:
        """How much of w H wᵀ the best scale and zero take away, from q H qᵀ, q H 1ᵀ and w H qᵀ."""
        ones_ones = self.moment.sum()
        ones_target = target.sum(dim=1).reshape(-1, *[1] * (cross.ndim - 1))
        best = torch.zeros_like(cross)
        for point in self.points:
            norm = square - 2 * point * line + point**2 * ones_ones
            along = cross - point * ones_target
            usable = (norm > 1e-12 * self.moment.diagonal().mean()) & (along > 0)
            gain = torch.where(usable, along.square() / norm.clamp(min=1e-300), 0.0)
            best = torch.maximum(best, gain)
        return best
