"""Putting the codes that a backend takes its range from into every group, where they cost least."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from splitquant_plugins.compiled import compiled
from splitquant_plugins.decoupleq.parts import Parts, State
from splitquant_plugins.decoupleq.single_scales import with_ends
from splitquant_plugins.parallel import in_threads
from splitquant_plugins.solvers.sums import cheapest_with, digits_of_others, sums_of_others

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

_ROUNDS = 3
_THREADS_FROM = 64  # rows


def with_range_ends(parts: Parts, state: State) -> State:
    """The best state found whose groups hold the range ends that the grid asks for.

    Missing ends are put where they raise the error least; then the other codes, scales and zeros adapt. Groups
    too small for their ends go without.
    """
    if parts.single_scales:
        codes, affine = with_ends(parts.problem, parts.grid, parts.options.sweeps, state.codes[0], state.affine)
        return parts.state(codes[None], affine)
    best: State | None = None
    for _ in range(_ROUNDS):
        pinned, frozen = _pinned(parts, state)
        pinned = parts.descended(pinned, frozen)
        best = pinned if best is None else best.or_better(pinned, parts.grid.per_tensor)
        state = parts.refitted(pinned)
        if torch.equal(_zero_points(parts, state), _zero_points(parts, pinned)):
            best = best.or_better(state, parts.grid.per_tensor)
    assert best is not None
    return best


def _zero_points(parts: Parts, state: State) -> Tensor:
    return torch.round(-state.affine.zero / state.affine.scale)


def _pinned(parts: Parts, state: State) -> tuple[State, Tensor]:
    """The state with all ends in place, and the mask [out, d] of one place for each."""
    grid, device = parts.grid, state.codes.device
    chunks = torch.split(torch.stack(parts.values(state.codes, state.affine)).sum(dim=0), len(parts.problem[0].weight))
    error = torch.cat([now - rows.weight for now, rows in zip(chunks, parts.problem, strict=True)])
    each = zip(torch.split(error, len(parts.problem[0].weight)), parts.problem, strict=True)
    gradient = torch.cat([off @ rows.moment for off, rows in each]).cpu().contiguous().numpy()
    moments = torch.stack([rows.moment for rows in parts.problem]).cpu().contiguous().numpy()
    values = torch.cat(chunks).cpu().contiguous().numpy()
    codes = state.codes.cpu().clone().contiguous().numpy()
    frozen = np.zeros(values.shape, np.bool_)
    affine = [each.cpu().contiguous().numpy() for each in (state.affine.scale, state.affine.zero)]
    points = _zero_points(parts, state)
    # [ends, shared rows, k * groups]: an end that stands for 0 is in every range.
    needed = torch.stack([grid.needs_end(end, points) for end in grid.range_ends]).cpu().contiguous().numpy()
    width = max(map(len, grid.range_ends))
    ends = np.array([end + end[-1:] * (width - len(end)) for end in grid.range_ends], np.float64)
    every = np.arange(grid.quant_min, grid.quant_max + 1.0)
    columns = parts.group_of_column.cpu().numpy()
    known = moments, columns, every, *affine, points.cpu().contiguous().numpy(), ends, needed
    number = len(values)
    step = number if grid.per_tensor else max(1, number // _THREADS_FROM)
    runs = [slice(at, min(at + step, number)) for at in range(0, number, step)]
    in_threads(
        lambda rows: _force_ends(rows.start, rows.stop, grid.per_tensor, *known, codes, values, gradient, frozen), runs
    )
    return parts.state(torch.from_numpy(codes).to(device), state.affine), torch.from_numpy(frozen).to(device)


@compiled
def _force_ends(
    first: int,
    last: int,
    shared: bool,
    moments: Array,
    group_of_column: Array,
    every: Array,
    scale: Array,
    zero: Array,
    points: Array,
    ends: Array,
    needed: Array,
    codes: Array,
    values: Array,
    gradient: Array,
    frozen: Array,
) -> None:
    """Let each group of the rows hold its ends, in place: groups of a row, or with `shared` of all rows together.

    `moments` [n, d, d] belong to even runs of rows; `every` [c] are the codes; `ends` [ends, m], of which one code has
    to occur where `needed` [ends, rows, k * groups]; `gradient` [rows, d] is the error times H.
    """
    k, number = len(codes), scale.shape[1] // len(codes)
    rows_per_moment = len(values) // len(moments)
    table = np.empty((3, k, len(every)))
    table[1], table[2] = -np.inf, np.inf  # any sum may stand for a weight
    digits = np.empty(k, np.int64)
    for top in range(first, last, last - first if shared else 1):
        bottom = last if shared else top + 1
        line = 0 if shared else top
        for group in range(number):
            columns = np.nonzero(group_of_column == group)[0]
            for j in range(k):
                for c in range(len(every)):
                    table[0, j, c] = scale[line, j * number + group] * every[c] + zero[line, j * number + group]
            for part in range(k):
                at = part * number + group
                zeros = True  # a group of nothing but zeros is a group of zeros to the backend too
                for row in range(top, bottom):
                    for column in columns:
                        zeros &= codes[part, row, column] == points[line, at]
                if zeros:
                    continue
                others = sums_of_others(table, part)
                for e in range(len(ends)):
                    if not needed[e, line, at]:
                        continue
                    held = False
                    for row in range(top, bottom):
                        for column in columns:
                            if not held and (ends[e] == codes[part, row, column]).any():
                                frozen[row, column] = held = True
                    if held:
                        continue
                    best, where_row, where_column, which, code = np.inf, -1, -1, -1, 0.0
                    for row in range(top, bottom):
                        moment = moments[row // rows_per_moment]
                        for column in columns:
                            if frozen[row, column]:
                                continue
                            slope, curve = gradient[row, column], moment[column, column]
                            for end in ends[e]:
                                level = scale[line, at] * end + zero[line, at]
                                now = values[row, column]
                                cost, combination = cheapest_with(0.0, level, others, 0.0, now, slope, curve)
                                if cost < best:
                                    best, where_row, where_column = cost, row, int(column)
                                    which, code = combination, end
                    if where_row < 0:
                        continue
                    digits_of_others(which, part, len(every), digits)
                    for j in range(k):
                        codes[j, where_row, where_column] = every[digits[j]] if j != part else code
                    after = scale[line, at] * code + zero[line, at] + others[0, which]
                    change = after - values[where_row, where_column]
                    values[where_row, where_column] = after
                    frozen[where_row, where_column] = True
                    moment = moments[where_row // rows_per_moment]
                    for i in range(values.shape[1]):
                        gradient[where_row, i] += change * moment[where_column, i]
