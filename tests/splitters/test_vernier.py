"""Two parts with almost equal scales, where a grid clips the value that sets its scale."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from splitquant_plugins.grid import UniformGrid
from splitquant_plugins.passes.checks import check_parts
from splitquant_plugins.plan import TensorPlan
from splitquant_plugins.solvers.rounding_error import weight_error
from splitquant_plugins.splitters._exact import complete
from splitquant_plugins.splitters._pieces import by_group
from splitquant_plugins.splitters._residual_search import rule_of
from splitquant_plugins.splitters._vernier import suits_vernier, vernier_parts
from splitquant_plugins.splitters.grid import GridSplitter
from splitquant_plugins.splitters.residual import ResidualSplitter


def heavy(rows: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(5, rows, columns, generator=generator)
    return normal[0] / normal[1:].square().mean(dim=0).sqrt()  # Student-t with 4 degrees of freedom


def grid_of(bits: int, granularity: str) -> UniformGrid:
    size = 64 if granularity == "group" else None
    return UniformGrid(bits, "symmetric", granularity, size, symmetric_scale="full")  # type: ignore[arg-type]


def parts_by(splitter: type, weight: Tensor, grid: UniformGrid, k: int = 2) -> list[Tensor]:
    return list(splitter().split(weight, TensorPlan("layer", "weight", k, "", "channel", splitter.Options()), grid))


@pytest.mark.parametrize("bits", [7, 8])
@pytest.mark.parametrize(("granularity", "gained"), [("channel", 16), ("group", 18)])
def test_what_a_part_clips_the_other_gives_back(bits: int, granularity: str, gained: float) -> None:
    weight, grid = heavy(32, 512), grid_of(bits, granularity)
    ours, residual = (parts_by(each, weight, grid) for each in (GridSplitter, ResidualSplitter))
    check_parts("layer.weight", weight, ours, 2)
    assert weight_error(weight, ours, grid) < 10 ** (-gained / 10) * weight_error(weight, residual, grid)


@pytest.mark.parametrize("seed", range(3))
def test_near_the_steps_of_both_scales_together(seed: int) -> None:
    """Steps are 1 / 160 of 1 / 127 of the largest weight; the pins and the thin ends cost a fifth of that at most."""
    weight, grid = heavy(16, 2048, seed), grid_of(8, "channel")
    rule = rule_of(grid)
    assert rule is not None
    parts = complete(weight, by_group(weight, grid, lambda groups: vernier_parts(groups, rule))[:-1])
    step = weight.abs().amax(dim=1) / 127 / 160
    assert weight_error(weight, parts, grid) < 1.2 * 2048 * float(step.double().square().sum()) / 12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
def test_never_worse_than_one_after_the_other(dtype: torch.dtype, granularity: str) -> None:
    weight, grid = heavy(12, 160).to(dtype), grid_of(8, granularity)
    for k in (2, 3):
        ours, residual = (parts_by(each, weight, grid, k) for each in (GridSplitter, ResidualSplitter))
        check_parts("layer.weight", weight, ours, k)
        assert weight_error(weight, ours, grid) <= weight_error(weight, residual, grid)


@pytest.mark.parametrize(
    "weight", [torch.ones(2, 1), -torch.ones(2, 3), torch.tensor([[0.0, 3.0, 0.0], [0.0, 0.0, -1e-30]])]
)
def test_few_values_and_one_sign(weight: Tensor) -> None:
    grid = grid_of(8, "channel")
    parts = parts_by(GridSplitter, weight, grid)
    check_parts("layer.weight", weight, parts, 2)
    assert weight_error(weight, parts, grid) <= weight_error(weight, [weight], grid)


def test_only_where_the_largest_value_is_clipped() -> None:
    rules = [rule_of(UniformGrid(8, *rest)) for rest in (("affine", "channel"), ("symmetric", "channel"))]
    assert [rule is not None and suits_vernier(rule) for rule in rules] == [False, False]
