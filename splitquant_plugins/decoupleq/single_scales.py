"""Rows of one part that have a scale of their own each: the alternation, and range ends, in compiled loops.

With the error e = s q + z - w of codes q, and its gradient e H, all that scales and zeros are fitted from follows in d
steps: q H = (e H + w H - z 1H) / s. So between two roundings of the codes nothing is multiplied with H again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from splitquant_plugins.compiled import compiled
from splitquant_plugins.decoupleq.solver_grid import Affine
from splitquant_plugins.solvers.gptq import Levels, descend_row, descent, feedback, over_rows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from splitquant_plugins.decoupleq.alternation import SolveOptions
    from splitquant_plugins.decoupleq.objective import Rows
    from splitquant_plugins.decoupleq.solver_grid import SolverGrid

    Array = NDArray[Any]

# Weights that are worked on at once, all first ranges or starts counted; bounds the memory.
_AT_ONCE = 1 << 21
# Relative to a diagonal of ones; only matters where the codes of a row are all the same.
_RIDGE = 1e-11
# How often ends are put into a row.
_ROUNDS = 3


def alternated(
    problem: Sequence[Rows], grid: SolverGrid, options: SolveOptions, ranges: Sequence[Affine]
) -> tuple[Tensor, Affine, list[float]]:
    """The best codes [rows, d], scales and zeros found, and their error after every step, which never rises.

    Begins with the best of the `ranges`, the first of which gives the first error.
    """
    scale, zero = (torch.cat([getattr(one, name) for one in ranges], dim=1).T for name in ("scale", "zero"))
    found, traces, at = [], [], 0
    for rows in problem:
        number, width = rows.weight.shape
        step = max(1, _AT_ONCE // (width * max(len(ranges), len(options.starts))))
        for start in range(0, number, step):
            some = rows.some(slice(start, start + step))
            here = slice(at, at + len(some.weight))
            first = (each[:, here].cpu().contiguous().numpy() for each in (scale, zero))
            one, trace = _alternated(some, grid, options, *first)
            found.append(one)
            traces.append(trace)
            at = here.stop
    steps = max(map(len, traces))
    totals = zip(*(trace + trace[-1:] * (steps - len(trace)) for trace in traces), strict=True)
    return *_joined(found, grid, scale), [sum(each) for each in totals]


def with_ends(
    problem: Sequence[Rows], grid: SolverGrid, sweeps: int, codes: Tensor, affine: Affine
) -> tuple[Tensor, Affine]:
    """The best codes [rows, d], scales and zeros found in which every row holds the range ends that the grid asks for.

    Missing ends are put where they raise the error least; then codes, scales and zeros adapt, a few times over.
    """
    longest = max(map(len, grid.range_ends))
    ends = np.array([end + end[-1:] * (longest - len(end)) for end in grid.range_ends])
    found, at = [], 0
    for rows in problem:
        here = slice(at, at + len(rows.weight))
        at = here.stop
        error = (codes[here] * affine.scale[here] + affine.zero[here] - rows.weight).contiguous()
        gradient = (error @ rows.moment).cpu().numpy()
        places = (codes[here] - grid.quant_min).to(torch.int32).cpu().contiguous().numpy()
        scale, zero = (each[here, 0].cpu().numpy().copy() for each in (affine.scale, affine.zero))
        arrays = places, error.cpu().numpy(), gradient, *_known(rows), scale, zero
        given = rows.moment.cpu().contiguous().numpy(), *_fixed(rows, grid), grid.number_of_codes, ends
        over_rows(_hold_ends, arrays, (*given, grid.zero == "integer", sweeps))
        found.append((places, scale, zero))
    return _joined(found, grid, codes)


def _joined(found: Sequence[tuple[Array, Array, Array]], grid: SolverGrid, like: Tensor) -> tuple[Tensor, Affine]:
    """Codes, scales and zeros of places, scales and zeros of one run of rows after the other."""
    places, scale, zero = (torch.from_numpy(np.concatenate(each)).to(like) for each in zip(*found, strict=True))
    return places + grid.quant_min, Affine(scale[:, None], zero[:, None])


def _alternated(
    rows: Rows, grid: SolverGrid, options: SolveOptions, scale: Array, zero: Array
) -> tuple[tuple[Array, Array, Array], list[float]]:
    number = len(rows.weight)
    places, errors = _nearest(rows, grid, scale, zero)
    chosen = errors.argmin(axis=0), np.arange(number)
    scale, zero, places, least = (each[chosen] for each in (scale, zero, places, errors))
    trace = [float(errors[0].sum()), float(least.sum())]
    # The starts are further rows; one that did not improve comes to the same answer again.
    factors = np.repeat(np.array(options.starts), number)
    source = np.tile(np.arange(number), len(options.starts))
    tried = scale[source] * factors, zero[source] * factors, np.full(len(source), np.inf)
    found, active = places[source], np.arange(len(source))
    for _ in range(options.rounds):
        index = source[active]
        own = rows.some(torch.from_numpy(index).to(rows.weight.device))
        here = [each[active] for each in tried]
        new, moved = _step(own, grid, options, *here)
        for all_of, each in zip(tried, here, strict=True):
            all_of[active] = each
        active, new = active[moved], new[moved]
        found[active] = new
        trace.append(float(np.minimum(least, tried[2].reshape(-1, number).min(axis=0)).sum()))
        if len(active) <= options.tolerance * len(source):
            break
    pairs = zip((scale, zero, least), tried, strict=True)
    scale, zero, least = (np.concatenate(pair).reshape(-1, number) for pair in pairs)
    best = least.argmin(axis=0), np.arange(number)
    places = np.concatenate([places, found]).reshape(-1, *places.shape)[best]
    return (places, scale[best], zero[best]), trace


def _levels(grid: SolverGrid, scale: Array, zero: Array, width: int) -> Levels:
    table = torch.from_numpy(np.stack([zero + grid.quant_min * scale, scale], axis=1))
    own = torch.arange(len(scale), dtype=torch.int32)[:, None].expand(-1, width).contiguous()
    return Levels(table, own, grid.number_of_codes)


def _nearest(rows: Rows, grid: SolverGrid, scale: Array, zero: Array) -> tuple[Array, Array]:
    """Places [ranges, rows, d] of the nearest levels for each range [ranges, rows], and the error of each row."""
    target = rows.weight.cpu().contiguous().numpy()
    places = np.empty((len(scale), *target.shape), np.int32)
    error = np.empty(places.shape)
    arrays = target, *(np.ascontiguousarray(each.swapaxes(0, 1)) for each in (scale, zero))
    over_rows(_round_rows, arrays, (grid.quant_min, grid.number_of_codes, places, error))
    each = torch.from_numpy(error).to(rows.moment)
    return places, (each @ rows.moment).mul_(each).sum(dim=2).clamp_(min=0).cpu().numpy()


def _step(
    rows: Rows, grid: SolverGrid, options: SolveOptions, scale: Array, zero: Array, least: Array
) -> tuple[Array, Array]:
    """New codes for the rows, then new scales and zeros; these and the errors are changed, in place, where they help.

    Returns the places [rows, d] and the mask [rows] of what has improved.
    """
    levels = _levels(grid, scale, zero, rows.weight.shape[1])
    places = feedback(rows.weight, rows.factor, levels)
    found = descent(rows.weight, rows.moment, places, levels, options.sweeps)
    moved = np.zeros(len(scale), np.bool_)
    arrays = found.places, found.error, found.gradient, *_known(rows), scale, zero, least, moved
    over_rows(_accept, arrays, _fixed(rows, grid))
    return found.places, moved


def _known(rows: Rows) -> tuple[Array, Array]:
    """The weights, and these times H."""
    return rows.weight.cpu().contiguous().numpy(), rows.weighted.cpu().contiguous().numpy()


def _fixed(rows: Rows, grid: SolverGrid) -> tuple[Array, Array, int]:
    """Column sums of H [d], the zero points to choose from (none where the zero is free), and the lowest code."""
    return rows.column_sums.cpu().numpy(), np.array(grid.zero_points, np.float64), grid.quant_min


@compiled
def _round_rows(
    first: int, target: Array, scale: Array, zero: Array, lowest: int, even: int, places: Array, error: Array
) -> None:
    """Places and errors [ranges, rows, d] of rounding to nearest, with scales and zeros [rows, ranges]."""
    for r in range(len(target)):
        for n in range(scale.shape[1]):
            step, low = scale[r, n], zero[r, n] + lowest * scale[r, n]
            for i in range(target.shape[1]):
                place = min(max(np.rint((target[r, i] - low) / step), 0.0), even - 1.0)
                places[n, first + r, i] = np.int32(place)
                error[n, first + r, i] = low + place * step - target[r, i]


@compiled
def _fitted(
    places: Array,
    gradient: Array,
    weighted: Array,
    scale: float,
    zero: float,
    ones: Array,
    points: Array,
    lowest: int,
) -> tuple[float, float]:
    """The scale and the zero that are best for the codes of a row; those it has where no positive scale is best."""
    qq = qe = ee = wq = we = 0.0
    for i in range(len(places)):
        q = float(places[i] + lowest)
        qq += q * ((gradient[i] + weighted[i] - zero * ones[i]) / scale)
        qe += q * ones[i]
        ee += ones[i]
        wq += q * weighted[i]
        we += weighted[i]
    if len(points) > 0:
        gain, best, point = 0.0, scale, 0.0
        for candidate in points:
            norm = qq - 2 * candidate * qe + candidate**2 * ee
            along = wq - candidate * we
            if norm > 0 and along > 0 and along / norm * along > gain:
                gain, best, point = along / norm * along, along / norm, candidate
        return (best, -best * point) if gain > 0 else (scale, zero)
    # Steps from where it is, which leave alone what the codes do not determine.
    one = np.sqrt(qq) if qq > 0 else 1.0
    two = np.sqrt(ee) if ee > 0 else 1.0
    a, b, c = qq / one / one + _RIDGE, ee / two / two + _RIDGE, qe / one / two
    x, y = (wq - qq * scale - qe * zero) / one, (we - qe * scale - ee * zero) / two
    determinant = a * b - c * c
    fitted = scale + (b * x - c * y) / determinant / one
    return (fitted, zero + (a * y - c * x) / determinant / two) if fitted > 0 else (scale, zero)


@compiled
def _move(
    places: Array,
    error: Array,
    gradient: Array,
    target: Array,
    weighted: Array,
    before: tuple[float, float],
    after: tuple[float, float],
    ones: Array,
    lowest: int,
) -> None:
    """Change the scale and the zero of a row, and with them its error and gradient."""
    scale, zero = after
    for i in range(len(places)):
        q = float(places[i] + lowest)
        gradient[i] = (
            scale * ((gradient[i] + weighted[i] - before[1] * ones[i]) / before[0]) + zero * ones[i] - weighted[i]
        )
        error[i] = scale * q + zero - target[i]


@compiled
def _product(error: Array, gradient: Array) -> float:
    """The error e H eᵀ of a row."""
    total = 0.0
    for i in range(len(error)):
        total += error[i] * gradient[i]
    return max(total, 0.0)


@compiled
def _accept(
    first: int,
    places: Array,
    error: Array,
    gradient: Array,
    target: Array,
    weighted: Array,
    scale: Array,
    zero: Array,
    least: Array,
    moved: Array,
    ones: Array,
    points: Array,
    lowest: int,
) -> None:
    """Take new codes where they lower the least error of a row, with the scale and the zero it has or with new ones."""
    for r in range(len(places)):
        now = _product(error[r], gradient[r])
        moved[r] = now < least[r]
        least[r] = min(now, least[r])
        before = scale[r], zero[r]
        after = _fitted(places[r], gradient[r], weighted[r], scale[r], zero[r], ones, points, lowest)
        _move(places[r], error[r], gradient[r], target[r], weighted[r], before, after, ones, lowest)
        now = _product(error[r], gradient[r])
        if now < least[r]:
            moved[r] = True
            least[r] = now
            scale[r], zero[r] = after


@compiled
def _hold_ends(
    first: int,
    places: Array,
    error: Array,
    gradient: Array,
    target: Array,
    weighted: Array,
    scale: Array,
    zero: Array,
    moment: Array,
    ones: Array,
    points: Array,
    lowest: int,
    even: int,
    ends: Array,
    integer: bool,
    sweeps: int,
) -> None:
    """Put missing `ends` [ends, codes] where they cost least; then codes, scales and zeros adapt, a few times over."""
    width = places.shape[1]
    frozen, diagonal = np.empty(width, np.bool_), np.diag(moment).copy()
    table, none, line = np.empty((1, 2)), np.empty((0, 0)), np.zeros(width, np.int32)
    best = np.empty(width, np.int32)
    for r in range(len(places)):
        least, found = np.inf, (scale[r], zero[r])
        for _ in range(_ROUNDS):
            _pin(places[r], error[r], gradient[r], frozen, scale[r], zero[r], moment, lowest, ends, integer)
            table[0, 0], table[0, 1] = zero[r] + lowest * scale[r], scale[r]
            descend_row(
                *(gradient[r], error[r], frozen, target[r], places[r], moment, diagonal),
                *(table, line, none, none, even, sweeps),
            )
            now = _product(error[r], gradient[r])
            if now < least:
                least, found = now, (scale[r], zero[r])
                best[:] = places[r]
            before = scale[r], zero[r]
            after = _fitted(places[r], gradient[r], weighted[r], scale[r], zero[r], ones, points, lowest)
            _move(places[r], error[r], gradient[r], target[r], weighted[r], before, after, ones, lowest)
            scale[r], zero[r] = after
            # Another zero point asks for other ends.
            if np.rint(-after[1] / after[0]) == np.rint(-before[1] / before[0]):
                now = _product(error[r], gradient[r])
                if now < least:
                    least, found = now, after
                    best[:] = places[r]
        places[r] = best
        scale[r], zero[r] = found


@compiled
def _pin(
    places: Array,
    error: Array,
    gradient: Array,
    frozen: Array,
    scale: float,
    zero: float,
    moment: Array,
    lowest: int,
    ends: Array,
    integer: bool,
) -> None:
    """Let a row hold its ends, and freeze one place for each."""
    frozen[:] = False
    point = np.rint(-zero / scale)
    zeros = True  # a row of nothing but zeros is one to the backend too
    for i in range(len(places)):
        zeros &= places[i] + lowest == point
    if zeros:
        return
    for e in range(len(ends)):
        if integer and ends[e, 0] == point:
            continue  # an end that stands for 0 is in every range
        cheapest, column, code, held = np.inf, -1, 0, False
        for i in range(len(places)):
            for end in ends[e]:
                if places[i] + lowest == end and not held:
                    frozen[i] = held = True
            if held:
                break
            if frozen[i]:
                continue
            for end in ends[e]:
                step = (end - lowest - places[i]) * scale
                cost = step * (2.0 * gradient[i] + moment[i, i] * step)
                if cost < cheapest:
                    cheapest, column, code = cost, i, end
        if held or column < 0:
            continue
        step = (code - lowest - places[column]) * scale
        places[column] = code - lowest
        error[column] += step
        frozen[column] = True
        for j in range(len(gradient)):
            gradient[j] += step * moment[column, j]
