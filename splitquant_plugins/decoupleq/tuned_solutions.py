"""The block stage behind the layer stage: solved layers of a block, tuned together, and put on their grids again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from splitquant_plugins.decoupleq.block_tuning import BlockOptions, BlockReport, QuantizedAffine, tune_block
from splitquant_plugins.decoupleq.capture import Call
from splitquant_plugins.decoupleq.layers import LayerToSolve
from splitquant_plugins.decoupleq.solve_weight import SolvedWeight, with_affine
from splitquant_plugins.decoupleq.solver_grid import Affine


class _Transposed(QuantizedAffine):
    """For layers that store their weight [in, out]."""

    def forward(self) -> Tensor:
        """The weight, [in, out]."""
        return super().forward().t()


def tuned_solutions(
    block: nn.Module,
    prefix: str,
    layers: Mapping[str, LayerToSolve],
    solutions: Mapping[str, SolvedWeight],
    calls: Sequence[Call],
    targets: Sequence[Tensor],
    options: BlockOptions,
    masks: Sequence[Tensor | None],
) -> tuple[dict[str, SolvedWeight], BlockReport | None]:
    """Train the scales and zeros of a block's solved layers (and norms, biases); the new solutions by layer.

    `prefix` is what names of the block's modules begin with. Layers with rows that keep plain rounding are left out.
    Norms and biases are changed in place.
    """
    trained: dict[str, list[QuantizedAffine]] = {}
    for name, solution in solutions.items():
        if solution.plain_rows:
            continue
        layer, solver = layers[name], solution.solver
        affine = solution.state.affine
        scales, zeros = (each.float().chunk(solver.k, dim=1) for each in (affine.scale, affine.zero))
        kind = _Transposed if layer.transposed else QuantizedAffine
        trained[name] = [
            kind(
                codes,
                scale,
                zero,
                group_of_column=solver.group_of_column,
                shape=layer.parts()[0].shape,
                trains_zero=solver.grid.zero == "free",
            )
            for codes, scale, zero in zip(solution.state.codes, scales, zeros, strict=True)
        ]
    if not trained:
        return {}, None
    modules = {
        path.removeprefix(prefix): one
        for name, each in trained.items()
        for path, one in zip(layers[name].paths, each, strict=True)
    }
    report = tune_block(block, modules, calls, targets, options, masks=masks)
    found = {
        name: with_affine(solutions[name], layers[name].grid, layers[name].parts(), _affine(each))
        for name, each in trained.items()
    }
    return found, report


@torch.no_grad()
def _affine(parts: Sequence[QuantizedAffine]) -> Affine:
    scales = [part.scale.detach().double() for part in parts]
    zeros = [
        scale * part.ratio.double().round() if part.zero is None else part.zero.detach().double()
        for scale, part in zip(scales, parts, strict=True)
    ]
    return Affine(torch.cat(scales, dim=1), torch.cat(zeros, dim=1))
