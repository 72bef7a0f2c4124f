"""The `residual` splitter: later parts carry what earlier ones could not."""

from __future__ import annotations

import pytest
import torch

from splitquant_plugins.errors import InputError
from splitquant_plugins.grid import UniformGrid
from splitquant_plugins.parts import sum_parts
from splitquant_plugins.plan import TensorPlan
from splitquant_plugins.solvers.rounding_error import weight_error
from splitquant_plugins.splitters.residual import ResidualOptions, ResidualSplitter

GRIDS = [
    UniformGrid(2, "affine", "tensor"),
    UniformGrid(2, "affine", "channel"),
    UniformGrid(2, "affine", "group", 24),
    UniformGrid(2, "symmetric", "channel"),
    UniformGrid(2, "symmetric", "channel", symmetric_scale="full"),
    UniformGrid(4, "affine", "channel"),
]


def plan(k: int, *, search: bool = True) -> TensorPlan:
    return TensorPlan("layer", "weight", k, "residual", "tensor", ResidualOptions(search=search))


def heavy(*shape: int) -> torch.Tensor:
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * 0.05
    weight.view(-1)[::97] *= 8
    return weight


@pytest.mark.parametrize("grid", GRIDS)
def test_every_stage_lowers_the_error(grid: UniformGrid) -> None:
    weight = heavy(8, 60)
    errors = []
    for k in (1, 2, 3, 4):
        parts = list(ResidualSplitter().split(weight, plan(k), grid))
        assert len(parts) == k
        torch.testing.assert_close(sum_parts(parts), weight, rtol=0, atol=1e-7)
        errors.append(weight_error(weight, parts, grid))
    assert errors[1] < 0.5 * errors[0]
    assert errors[2] < 0.5 * errors[1]
    assert errors[3] < 0.9 * errors[2]


@pytest.mark.parametrize("grid", GRIDS[:4])
def test_searched_ranges_are_no_worse(grid: UniformGrid) -> None:
    weight = heavy(8, 60)
    searched, plain = (
        weight_error(weight, list(ResidualSplitter().split(weight, plan(3, search=s), grid)), grid)
        for s in (True, False)
    )
    assert searched <= plain * (1 + 1e-4)


def test_first_part_without_search_is_the_rounded_tensor() -> None:
    weight, grid = heavy(8, 60), GRIDS[1]
    first, second = ResidualSplitter().split(weight, plan(2, search=False), grid)
    torch.testing.assert_close(first, grid.quantize_dequantize(weight))
    torch.testing.assert_close(second, weight - first)


def test_zero_and_constant_channels() -> None:
    weight = heavy(4, 30)
    weight[1], weight[2] = 0, 0.25
    parts = list(ResidualSplitter().split(weight, plan(3), GRIDS[1]))
    assert all(bool((part[1] == 0).all()) for part in parts)
    assert weight_error(weight[2:3], [part[2:3] for part in parts], GRIDS[1]) < 1e-12


def test_a_grid_is_needed() -> None:
    with pytest.raises(InputError, match="layer"):
        ResidualSplitter().split(heavy(4, 4), plan(2), None)
