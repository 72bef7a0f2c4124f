"""The block stage behind the layer stage: solved layers of a block, tuned together, and put on their grids again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from splitquant_plugins.decoupleq.blocks import BlockOptions, BlockReport, Call, QuantizedAffine, tune_block
from splitquant_plugins.decoupleq.grids import Affine
from splitquant_plugins.decoupleq.on_grid import GridSolution, with_affine


@dataclass(frozen=True)
class SolvedLayer:
    """A layer of the block: names of its parts' modules within the block, their float weights, the solution.

    `transposed`: the modules store [in, out]; the tensors here have output channels first.
    """

    paths: tuple[str, ...]
    parts: Sequence[Tensor]
    solution: GridSolution
    transposed: bool = False


class _Transposed(QuantizedAffine):
    """For layers that store their weight [in, out]."""

    def forward(self) -> Tensor:
        """The weight, [in, out]."""
        return super().forward().t()


def tuned_solutions(
    block: nn.Module,
    layers: Mapping[str, SolvedLayer],
    calls: Sequence[Call],
    targets: Sequence[Tensor],
    options: BlockOptions,
    masks: Sequence[Tensor | None],
) -> tuple[dict[str, GridSolution], BlockReport | None]:
    """Train the scales and zeros of a block's layers (and norms, biases); the new solutions by layer.

    Layers with rows that keep plain rounding are left out. Norms and biases are changed in place.
    """
    trained: dict[str, list[QuantizedAffine]] = {}
    for name, layer in layers.items():
        solution = layer.solution
        if solution.plain_rows:
            continue
        k = len(layer.paths)
        grid = solution.target.values
        scales, zeros = (
            each.float().chunk(k, dim=1) for each in (solution.state.affine.scale, solution.state.affine.zero)
        )
        kind = _Transposed if layer.transposed else QuantizedAffine
        trained[name] = [
            kind(
                codes,
                scale,
                zero,
                cell_of_column=grid.cell_of_column(codes.shape[1], codes.device),
                shape=layer.parts[0].shape,
                trains_zero=grid.zero == "float",
            )
            for codes, scale, zero in zip(solution.state.codes, scales, zeros, strict=True)
        ]
    if not trained:
        return {}, None
    modules = {path: one for name, each in trained.items() for path, one in zip(layers[name].paths, each, strict=True)}
    report = tune_block(block, modules, calls, targets, options, masks=masks)
    found = {}
    for name, each in trained.items():
        found[name] = with_affine(layers[name].solution, layers[name].parts, _affine(each))
    return found, report


@torch.no_grad()
def _affine(parts: Sequence[QuantizedAffine]) -> Affine:
    scales = [part.scale.detach().double() for part in parts]
    zeros = [
        scale * part.ratio.double().round() if part.zero is None else part.zero.detach().double()
        for scale, part in zip(scales, parts, strict=True)
    ]
    return Affine(torch.cat(scales, dim=1), torch.cat(zeros, dim=1))
