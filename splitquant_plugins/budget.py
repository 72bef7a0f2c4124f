"""How many parts each layer gets: the most error removed within a budget of stored bits.

Every layer offers candidates, one for each number of parts, with the bits that it stores and the error that
remains on the grid. Errors add up over layers, bits do too, so the best choice lies on the layers' lower convex
hulls, and is walked to by taking the step with the largest error removed per bit, over and over. Ties go to the
layer that comes first, so that the same model gets the same parts.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from splitquant_plugins.errors import ConfigError


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
    """Choose a candidate for every layer so that together they store at most `bits`.

    Steps that no longer fit are passed over for later, smaller ones. Raises ConfigError, with the least that is
    possible, where even the cheapest candidates do not fit.
    """
    chosen = {name: min(candidates, key=lambda c: (c.bits, c.error)) for name, candidates in options.items()}
    spent = sum(candidate.bits for candidate in chosen.values())
    if spent > bits:
        raise ConfigError(f"the budget of {bits:,.0f} bits is too small: unsplit, the layers store {spent:,} bits")
    for step in tradeoff(options)[1:]:
        after = next(c for c in options[step.layer] if c.k == step.k)
        change = after.bits - chosen[step.layer].bits
        if change > 0 and after.error < chosen[step.layer].error and spent + change <= bits:
            chosen[step.layer] = after
            spent += change
    return chosen


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
