"""The `range` splitter: disjoint ranges, with boundaries that suit the grid."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from splitquant_plugins.errors import InputError
from splitquant_plugins.grid import UniformGrid
from splitquant_plugins.plan import TensorPlan
from splitquant_plugins.solvers.rounding_error import weight_error
from splitquant_plugins.splitters.base import SplitterOptions
from splitquant_plugins.splitters.range import RangeSplitter, range_parts

GRIDS = [
    UniformGrid(2, "affine", "tensor"),
    UniformGrid(2, "affine", "channel"),
    UniformGrid(2, "affine", "group", 7),
    UniformGrid(2, "symmetric", "channel", symmetric_scale="full"),
    UniformGrid(8, "affine", "channel"),
]


def plan(k: int) -> TensorPlan:
    return TensorPlan("layer", "weight", k, "range", "tensor", SplitterOptions())


@settings(deadline=None, max_examples=25)
@given(
    values=st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=20),
    k=st.integers(1, 4),
    grid=st.sampled_from(GRIDS),
)
def test_supports_are_disjoint_and_the_sum_is_exact(values: list[float], k: int, grid: UniformGrid) -> None:
    weight = torch.stack([torch.tensor(values), -2 * torch.tensor(values)])
    parts = list(RangeSplitter().split(weight, plan(k), grid))
    assert 1 <= len(parts) <= k
    stacked = torch.stack(parts)
    assert torch.equal(stacked.sum(dim=0), weight)
    assert int((stacked != 0).sum(dim=0).max()) <= 1


@pytest.mark.parametrize("grid", [GRIDS[0], UniformGrid(2, "symmetric", "tensor")])
@pytest.mark.parametrize("k", [2, 3])
def test_boundaries_are_the_best_there_are(grid: UniformGrid, k: int) -> None:
    weight = torch.randn(1, 18, generator=torch.Generator().manual_seed(0))
    weight[0, 3] = 6.0
    error = weight_error(weight, list(RangeSplitter().split(weight, plan(k), grid)), grid)
    middle = weight[0].sort().values.unfold(0, 2, 1).mean(dim=1)
    every = [
        weight_error(weight, range_parts(weight, torch.tensor([cuts], dtype=torch.float64)), grid)
        for cuts in itertools.combinations(middle.tolist(), k - 1)
    ]
    assert error <= min(every) * (1 + 1e-5)


@pytest.mark.parametrize("grid", GRIDS)
def test_error_falls_with_the_number_of_parts(grid: UniformGrid) -> None:
    weight = torch.randn(8, 70, generator=torch.Generator().manual_seed(1))
    errors = [weight_error(weight, list(RangeSplitter().split(weight, plan(k), grid)), grid) for k in (1, 2, 3)]
    assert errors[0] > errors[1] > errors[2]


def test_a_grid_is_needed() -> None:
    with pytest.raises(InputError, match="layer"):
        RangeSplitter().split(torch.ones(4, 4), plan(2), None)
