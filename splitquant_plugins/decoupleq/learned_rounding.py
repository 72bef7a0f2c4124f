"""A quantized weight whose codes can be trained, together with its scales and zeros.

Codes are whole numbers, so each has a latent real number beside it that is rounded in the forward pass and gets the
gradient as if it were not (straight-through estimator, arXiv 1308.3432). Training starts from codes already found, with
the latents as near to the float weight as these codes allow: weights near a border are the first to change their code.
AutoRound (arXiv 2309.05516) and TesseraQ (arXiv 2410.19103) learn the rounding within a step; here a code may go
anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from splitquant_plugins.decoupleq.solver_grid import Affine

if TYPE_CHECKING:
    from splitquant_plugins.decoupleq.solve_weight import SolvedWeight
    from splitquant_plugins.decoupleq.solver_grid import SolverGrid

# How far from a code its latent may start; half a step is the border.
_FARTHEST_START = 0.45


class LearnedRounding(nn.Module):
    """A weight scale * (code - point) with trainable codes, scales and points.

    `codes`: [out, d]; `affine`: scales and zeros [out or 1, groups] of values scale * code + zero. `wanted` [out, d]:
    the float weight, near which the latents start. On `grid`, an integer zero point stays a whole number among the
    codes, and a symmetric one 0. Every group keeps the codes that a backend takes its range from: where training drives
    the last one out, the nearest latent is rounded to it. `fixed`: rows [out] that stay what `kept` [out, d] holds.
    `transposed`: the layer stores its weight [in, out].
    """

    group_of_column: Tensor
    fixed: Tensor
    kept: Tensor

    def __init__(
        self,
        codes: Tensor,
        affine: Affine,
        wanted: Tensor,
        grid: SolverGrid,
        fixed: Tensor | None = None,
        kept: Tensor | None = None,
        *,
        transposed: bool = False,
    ) -> None:
        super().__init__()
        self.grid = grid
        self.transposed = transposed
        groups = grid.group_of_column(codes.shape[1], codes.device)
        none = torch.zeros(len(codes), dtype=torch.bool, device=codes.device)
        self.register_buffer("group_of_column", groups)
        self.register_buffer("fixed", none if fixed is None else fixed)
        self.register_buffer("kept", wanted.float() if kept is None else kept.float())
        away = (wanted.double() - affine.values(codes, groups)) / affine.scale[:, groups]
        self.latent = nn.Parameter((codes + away.clamp(-_FARTHEST_START, _FARTHEST_START)).float())
        self.log_scale = nn.Parameter(affine.scale.log().float())
        self.point = nn.Parameter((-affine.zero / affine.scale).float(), requires_grad=grid.zero != "none")

    def codes(self) -> Tensor:
        """The codes, [out, d], whole numbers with the gradient of the latents."""
        low, high = self.grid.quant_min, self.grid.quant_max
        rounded = self._with_range_ends(torch.round(self.latent.detach()).clamp(low, high))
        # Beyond the ends the gradient is that of a clamp.
        inside = (self.latent.detach() >= low - 0.5) & (self.latent.detach() <= high + 0.5)
        return rounded + torch.where(inside, self.latent - self.latent.detach(), 0.0)

    def points(self) -> Tensor:
        """The code that stands for 0, [out or 1, groups]; a whole number with a gradient unless it is free."""
        if self.grid.zero == "free":
            return self.point
        return self._whole_points() + (self.point - self.point.detach())

    def forward(self) -> Tensor:
        """The weight, [out, d], float32."""
        scale, point = self.log_scale.exp(), self.points()
        columns = self.group_of_column
        values = scale[:, columns] * (self.codes() - point[:, columns])
        return torch.where(self.fixed[:, None], self.kept, values)

    @torch.no_grad()
    def solution(self) -> tuple[Tensor, Affine]:
        """Codes, and scales and zeros of values scale * code + zero, float64."""
        scale = self.log_scale.double().exp()
        return self.codes().double(), Affine(scale, -scale * self.points().double())

    def _whole_points(self) -> Tensor:
        return torch.round(self.point.detach()).clamp(self.grid.quant_min, self.grid.quant_max)

    @torch.no_grad()
    def _with_range_ends(self, codes: Tensor) -> Tensor:
        if not self.grid.range_ends:
            return codes
        points = self._whole_points()
        moved = torch.zeros_like(codes, dtype=torch.bool)
        zeros = self._in_all(codes == points[:, self.group_of_column])
        for end in self.grid.range_ends:
            allowed = torch.tensor(end, dtype=codes.dtype, device=codes.device)
            lacks = ~self._in_any(torch.isin(codes, allowed)) & self.grid.needs_end(end, points)
            if self.grid.zero != "free":
                # 0 is in every range, and a group of zeros is one to the backend too.
                lacks &= ~zeros
            for group in lacks.any(dim=0).nonzero().flatten().tolist():
                self._place(codes, moved, allowed, group, lacks[:, group].nonzero().flatten())
        return codes

    def _place(self, codes: Tensor, moved: Tensor, allowed: Tensor, group: int, where: Tensor) -> None:
        """Round one latent of this group in each of these rows (of the tensor) to an allowed code."""
        columns = (self.group_of_column == group).nonzero().flatten()
        rows = len(self.point)
        distance, nearest = (self.latent[:, columns, None] - allowed).abs().min(dim=2)
        distance = distance.masked_fill(moved[:, columns], torch.inf).reshape(rows, -1)
        place = distance[where].argmin(dim=1)
        row, column = (place // len(columns), place % len(columns)) if rows < len(codes) else (where, place)
        codes[row, columns[column]] = allowed[nearest[row, column]]
        moved[row, columns[column]] = True

    def _in_any(self, mask: Tensor) -> Tensor:
        """Whether it holds anywhere in a group: [out or 1, groups] from [out, d]."""
        if self.point.shape[1] == 1:
            found = mask.any(dim=1, keepdim=True)
        else:
            found = torch.zeros(len(mask), self.point.shape[1], device=mask.device)
            found = found.scatter_reduce(1, self.group_of_column.expand_as(mask), mask.float(), "amax") > 0
        return found.any(dim=0, keepdim=True) if len(self.point) < len(mask) else found

    def _in_all(self, mask: Tensor) -> Tensor:
        return ~self._in_any(~mask)


def learned_parts(solution: SolvedWeight, parts: Sequence[Tensor], *, transposed: bool) -> list[LearnedRounding]:
    """Start from a solution: one learned weight for each of the float `parts` [out, ...]; plain rows are fixed."""
    solver, state = solution.solver, solution.state
    values = torch.stack(solver.values(state.codes, state.affine))
    missing = torch.stack([part.double().reshape(len(part), -1) for part in parts]).sum(dim=0) - values.sum(dim=0)
    rounded = [part.reshape(len(part), -1) for part in solution.rounded]
    return [
        LearnedRounding(
            state.codes[part],
            solver.affine_of(state.affine, part),
            values[part] + missing,
            solver.grid,
            solution.plain,
            rounded[part],
            transposed=transposed,
        )
        for part in range(solver.k)
    ]


def relearned(parts: Sequence[LearnedRounding]) -> tuple[Tensor, Affine]:
    """Codes [k, out, d], scales and zeros [rows, k * groups] of the parts of a weight."""
    codes, affines = zip(*(part.solution() for part in parts), strict=True)
    scale, zero = (torch.cat([getattr(affine, name) for affine in affines], dim=1) for name in ("scale", "zero"))
    return torch.stack(codes), Affine(scale, zero)
