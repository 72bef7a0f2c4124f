"""How many parts each layer gets: the most error removed within a budget of stored bits.

Every layer offers candidates, one for each number of parts, with the bits that it stores and the error that
remains on the grid. Errors add up over layers, bits do too, so the best choices lie on the layers' lower convex
hulls, and the curve is walked by taking the step with the largest error removed per bit, over and over. Ties go to
the layer that comes first, so that the same model gets the same parts. Between the curve's points `allocate` fills
a budget by dynamic programming.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from splitquant_plugins.errors import ConfigError

_KEPT = 1024


@dataclass(frozen=True)
class Candidate:
    """A layer with k parts: stored bits of its weight, and the error on the grid, in units that add up."""

    k: int
    bits: int
    error: float


@dataclass(frozen=True)
class Step:
    """One step of the trade-off: `layer` goes to k parts; `bits` and `error` are the model's from then on."""

    layer: str
    k: int
    bits: int
    error: float


def tradeoff(options: Mapping[str, Sequence[Candidate]]) -> list[Step]:
    """Return the whole curve, from the fewest bits (one step per layer, without a k) to the least error.

    The first step has an empty layer name and k = 0: the model with each layer's cheapest candidate.
    """
    hulls = {name: _hull(candidates) for name, candidates in options.items()}
    bits = sum(hull[0].bits for hull in hulls.values())
    error = sum(hull[0].error for hull in hulls.values())
    moves = []
    for order, (name, hull) in enumerate(hulls.items()):
        for before, after in itertools.pairwise(hull):
            moves.append((-_gain(before, after), order, after.k, name, before, after))
    # On a convex hull a layer's own gains fall, so sorting all moves keeps each layer's in order.
    steps = [Step("", 0, bits, error)]
    for *_, name, before, after in sorted(moves, key=lambda move: move[:3]):
        bits += after.bits - before.bits
        error += after.error - before.error
        steps.append(Step(name, after.k, bits, error))
    return steps


def allocate(options: Mapping[str, Sequence[Candidate]], bits: float) -> dict[str, Candidate]:
    """Choose a candidate for every layer so that together they store at most `bits`, with the least error.

    Layers are taken in order; of all combinations so far, those are kept that no other beats in both bits and
    error. That is exact up to `_KEPT` of them; of more, the best of as many equal ranges of bits are kept.
    (Walking down the hulls is not enough: where the next step, that of a large layer, just does not fit, it
    would spend the rest on small layers that need it less.) Of equal errors the fewest bits are taken.
    Raises ConfigError, with the least that is possible, where even the cheapest candidates do not fit.
    """
    least = {name: min(candidate.bits for candidate in candidates) for name, candidates in options.items()}
    needed = sum(least.values())
    if needed > bits:
        raise ConfigError(
            f"the budget of {bits:,.1f} bits for all weights is too small: unsplit, the layers store {needed:,} bits"
        )
    front: list[_Combination] = [_Combination(0, 0.0)]
    for name, candidates in options.items():
        needed -= least[name]
        front = _undominated(
            _Combination(before.bits + one.bits, before.error + one.error, one, before)
            for before in front
            for one in candidates
            if before.bits + one.bits + needed <= bits
        )
    best: _Combination | None = front[-1]
    chosen: list[Candidate] = []
    while best is not None and best.last is not None:
        chosen.append(best.last)
        best = best.before
    return dict(zip(options, reversed(chosen), strict=True))


@dataclass(frozen=True)
class _Combination:
    """Bits and error of one candidate for each of the layers so far, the last of them, and those before it."""

    bits: int
    error: float
    last: Candidate | None = None
    before: _Combination | None = None


def _undominated(combinations: Iterable[_Combination]) -> list[_Combination]:
    """Those that none beats in both bits and error, from the fewest bits to the least error, thinned to `_KEPT`."""
    front: list[_Combination] = []
    for one in sorted(combinations, key=lambda c: (c.bits, c.error)):
        if not front or one.error < front[-1].error:
            front.append(one)
    if len(front) <= _KEPT:
        return front
    low, span = front[0].bits, front[-1].bits - front[0].bits
    best = {(one.bits - low) * (_KEPT - 2) // span: one for one in front}  # later ones have less error
    return [front[0], *(one for one in best.values() if one is not front[0])]


def _gain(before: Candidate, after: Candidate) -> float:
    return (before.error - after.error) / (after.bits - before.bits)


def _hull(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The candidates on the lower convex hull, from the fewest bits to the least error."""
    hull: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda c: (c.bits, c.error)):
        if hull and (candidate.error >= hull[-1].error or candidate.bits == hull[-1].bits):
            continue
        while len(hull) > 1 and _gain(hull[-2], hull[-1]) <= _gain(hull[-1], candidate):
            hull.pop()
        hull.append(candidate)
    return hull
