"""Putting the codes that a backend takes its range from into every group, where they cost least."""

from __future__ import annotations

import torch
from torch import Tensor

from splitquant_plugins.decoupleq.parts import Parts, State

_ROUNDS = 3


def with_range_ends(parts: Parts, state: State) -> State:
    """The best state found whose groups hold the range ends that the grid asks for.

    Missing ends are put where they raise the error least; then the other codes, scales and zeros adapt. Groups
    too small for their ends go without.
    """
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
    pins = _Pins(parts, state)
    points = _zero_points(parts, state)
    count = points.shape[1] // parts.k
    for group in range(count):
        columns = (parts.group_of_column == group).nonzero().flatten()
        for part in range(parts.k):
            point = points[:, part * count + group].expand(len(pins.frozen))
            codes = pins.codes[part][:, columns]
            # A group of nothing but zeros is a group of zeros to the backend too.
            zeros = (codes == point[:, None]).all(dim=1)
            for end in parts.grid.range_ends:
                needed = parts.grid.needs_end(end, point) & ~zeros
                if parts.grid.per_tensor:
                    needed = needed.any().expand_as(needed) if bool((~zeros).any()) else torch.zeros_like(needed)
                pins.place(part, columns, end, needed)
    return parts.state(pins.codes, state.affine), pins.frozen


class _Pins:
    """Codes [k, out, d] that are being changed, with the gradient of the error kept up to date."""

    def __init__(self, parts: Parts, state: State) -> None:
        self.parts = parts
        self.affine = state.affine
        self.codes = state.codes.clone()
        self.frozen = torch.zeros(self.codes.shape[1:], dtype=torch.bool, device=self.codes.device)
        self.values = self._values(self.codes)
        error = self.values - parts.weight
        chunks = torch.split(error, [len(rows.weight) for rows in parts.problem])
        self.gradient = torch.cat([part @ rows.moment for part, rows in zip(chunks, parts.problem, strict=True)])
        self.diagonal = torch.cat(
            [rows.moment.diagonal().expand(len(rows.weight), -1) for rows in parts.problem]
        )  # [out, d]

    def place(self, part: int, columns: Tensor, end: tuple[int, ...], needed: Tensor) -> None:
        """Freeze one code out of `end` in these columns of each row (of the tensor) where it is needed."""
        allowed = torch.tensor(end, dtype=self.codes.dtype, device=self.codes.device)
        present = torch.isin(self.codes[part][:, columns], allowed) & needed[:, None]
        if self.parts.grid.per_tensor:
            if bool(present.any()):
                row, first = divmod(int(present.flatten().byte().argmax()), len(columns))
                self.frozen[row, columns[first]] = True
            elif bool(needed.any()):
                rows = torch.arange(len(needed), device=needed.device)
                costs, combos = self._costs(part, rows, columns, allowed)
                row, best = divmod(int(costs.argmin()), len(columns))
                if bool(torch.isfinite(costs[row, best])):
                    self._set(rows[row : row + 1], columns[best : best + 1], combos[row : row + 1, best])
            return
        has = present.any(dim=1)
        rows = has.nonzero().flatten()
        self.frozen[rows, columns[present[rows].byte().argmax(dim=1)]] = True
        rows = (needed & ~has).nonzero().flatten()
        if len(rows):
            costs, combos = self._costs(part, rows, columns, allowed)
            cheapest, place = costs.min(dim=1)
            fits = torch.isfinite(cheapest)
            chosen = combos.gather(1, place[:, None])[:, 0]
            self._set(rows[fits], columns[place[fits]], chosen[fits])

    def _costs(self, part: int, rows: Tensor, columns: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
        """What it costs [rows, columns] to have an allowed code there, and with which combination of all codes."""
        combinations = self.parts.combinations
        usable = torch.isin(combinations[:, part], allowed).nonzero().flatten()
        group = int(self.parts.group_of_column[columns[0]])
        scale, zero = self._of_group(group, rows)
        sums, order = (scale @ combinations[usable].T + zero.sum(dim=1, keepdim=True)).sort(dim=1)
        place = (rows[:, None], columns[None, :])
        diagonal, gradient, now = self.diagonal[place], self.gradient[place], self.values[place]
        middles = ((sums[:, 1:] + sums[:, :-1]) / 2).contiguous()
        found = torch.searchsorted(middles, (now - gradient / diagonal).contiguous())
        step = sums.gather(1, found) - now
        costs = 2 * step * gradient + step.square() * diagonal
        return costs.masked_fill(self.frozen[place], torch.inf), usable[order.gather(1, found)]

    def _of_group(self, group: int, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Scales and zeros of the parts in a group, each [rows, k]."""
        index = torch.zeros_like(rows) if len(self.affine.scale) == 1 else rows
        shape = (len(rows), self.parts.k, -1)
        return tuple(each[index].reshape(shape)[:, :, group] for each in (self.affine.scale, self.affine.zero))  # type: ignore[return-value]

    def _set(self, rows: Tensor, columns: Tensor, combos: Tensor) -> None:
        """Set one place of each of these rows to a combination of codes, and freeze it."""
        self.codes[:, rows, columns] = self.parts.combinations[combos].T
        self.frozen[rows, columns] = True
        after = self._values(self.codes[:, rows], rows)[torch.arange(len(rows), device=rows.device), columns]
        step = after - self.values[rows, columns]
        self.values[rows, columns] = after
        start = 0
        for chunk in self.parts.problem:
            inside = (rows >= start) & (rows < start + len(chunk.weight))
            self.gradient[rows[inside]] += step[inside, None] * chunk.moment[columns[inside]]
            start += len(chunk.weight)

    def _values(self, codes: Tensor, rows: Tensor | None = None) -> Tensor:
        total = torch.zeros_like(codes[0])
        for part in range(self.parts.k):
            affine = self.parts.affine_of(self.affine, part)
            if rows is not None and len(affine.scale) > 1:
                affine = type(affine)(affine.scale[rows], affine.zero[rows])
            total += affine.values(codes[part], self.parts.group_of_column)
        return total
