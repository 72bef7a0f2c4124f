"""Rows of a weight that make up for each other, because a block does not tell the errors of its outputs apart.

With G [out, out] the second moment of the gradient of the block's outputs by those of the layer, the error that a
change D [out, d] of its weight makes in the block is about tr(G D H Dᵀ), H and G taken as independent (K-FAC, arXiv
1503.05671; for quantization YAQA, arXiv 2505.22988). Given all other rows, that of row i is, but for a constant,
Gᵢᵢ |Dᵢ + Σⱼ Gᵢⱼ / Gᵢᵢ Dⱼ|²_H over the others j: it is solved as a row with the weight Wᵢ - Σⱼ Gᵢⱼ / Gᵢᵢ Dⱼ.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from splitquant_plugins.decoupleq.alternation import best_state
from splitquant_plugins.decoupleq.parts import Parts, State
from splitquant_plugins.decoupleq.range_ends import with_range_ends
from splitquant_plugins.decoupleq.solver_grid import Affine

# Rows are solved anew in so many runs of at least so many rows: every eighth, as neighbours are of one attention head.
_RUNS, _ROWS = 8, 4
# Part of the mean diagonal of G that is added to its diagonal.
_DAMPING = 0.1


def can_be_coupled(solver: Parts) -> bool:
    """Whether the rows of a weight can be: they see the same inputs, and have scales of their own."""
    return len(solver.problem) == 1 and not solver.grid.per_tensor


def with_coupled_rows(solver: Parts, state: State, output_moment: Tensor) -> State:
    """The state with rows solved anew, run by run, where that lowers tr(G D H Dᵀ); G is `output_moment` [out, out]."""
    (problem,) = solver.problem
    coupling = _damped(output_moment).to(problem.weight)
    options = replace(solver.options, starts=solver.options.starts[:1])
    off = torch.stack(solver.values(state.codes, state.affine)).sum(dim=0) - problem.weight
    codes, scale, zero = state.codes.clone(), state.affine.scale.clone(), state.affine.zero.clone()
    runs = max(2, min(_RUNS, len(off) // _ROWS))
    for first in range(min(runs, len(off))):
        rows = torch.arange(first, len(off), runs, device=off.device)
        others = coupling[rows].index_fill(1, rows, 0.0)
        wanted = problem.weight[rows] - (others @ off) / coupling[rows, rows][:, None]
        part = Parts([problem.of(wanted)], solver.grid, solver.k, options)
        near = Affine(scale[rows], zero[rows])
        found = with_range_ends(part, best_state(part, options, near)[0])
        change = torch.stack(part.values(found.codes, found.affine)).sum(dim=0) - problem.weight[rows] - off[rows]
        # The error of the sum D + C is that of D, plus 2 tr(G D H Cᵀ) + tr(G C H Cᵀ).
        seen = change @ problem.moment
        gained = 2 * (coupling[rows] @ off * seen).sum() + (coupling[rows][:, rows] @ change * seen).sum()
        if gained < 0:
            off[rows] += change
            codes[:, rows], scale[rows], zero[rows] = found.codes, found.affine.scale, found.affine.zero
    return solver.state(codes, Affine(scale, zero))


def coupled_error(solver: Parts, values: Tensor, output_moment: Tensor) -> float:
    """The error tr(G D H Dᵀ) of values [out, d] that stand for the weight, with G of a mean diagonal of 1."""
    (problem,) = solver.problem
    off = values - problem.weight
    return float(((_damped(output_moment).to(off) @ off) * (off @ problem.moment)).sum())


def _damped(output_moment: Tensor) -> Tensor:
    """G damped, with a mean diagonal of 1, so that errors are in the units of the layer's outputs."""
    normal = output_moment / output_moment.diagonal().mean()
    return (normal + _DAMPING * torch.eye(len(normal)).to(normal)) / (1 + _DAMPING)
