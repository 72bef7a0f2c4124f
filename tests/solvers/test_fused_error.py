"""The compiled pass measures what the grid itself makes of the parts, and leaves all other grids to themselves."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from splitquant_plugins.grid import UniformGrid
from splitquant_plugins.solvers import rounding_error
from splitquant_plugins.solvers.fused_error import fused_error
from splitquant_plugins.solvers.rounding_error import quantized_sum, row_error, split_error

GRIDS = [
    UniformGrid(2, "affine", "tensor"),
    UniformGrid(2, "symmetric", "tensor", symmetric_scale="full"),
    UniformGrid(2, "affine", "channel"),
    UniformGrid(4, "symmetric", "channel", power_of_two_scale=True),
    UniformGrid(4, "affine", "group", 32),
    UniformGrid(8, "symmetric", "group", 96),
]


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def split(dtype: torch.dtype, shape: tuple[int, ...] = (37, 192)) -> tuple[Tensor, list[Tensor]]:
    """A weight, a row of zeros in it, and three parts, the last of which misses it."""
    torch.manual_seed(0)
    weight = torch.distributions.StudentT(4.0).sample(shape).to(dtype)
    weight[3] = 0
    return weight, [weight * 0.6, weight * 0.3 + 0.01, weight * 0.15]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_it_is_the_error_of_what_the_grid_makes_of_the_parts(grid: UniformGrid, k: int, dtype: torch.dtype) -> None:
    weight, parts = split(dtype)
    found = fused_error(weight, parts[:k], grid)
    assert found is not None
    torch.testing.assert_close(found, row_error(weight, quantized_sum(parts[:k], grid)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_one_wrong_value_is_seen(grid: UniformGrid) -> None:
    weight, parts = split(torch.float32)
    before = fused_error(weight, parts, grid)
    parts[1][20, 101] = -20 * parts[1].abs().max()
    after = fused_error(weight, parts, grid)
    assert before is not None
    assert after is not None
    assert bool(after[20] != before[20])
    parts[2][20, 101] = torch.nan
    broken = fused_error(weight, parts, grid)
    assert broken is None or bool(torch.isnan(broken[20]))


def test_any_number_of_threads_gives_the_same(threads: None) -> None:
    weight, parts = split(torch.float32, (2048, 192))
    for grid in GRIDS:
        found = []
        for number in (1, 3):
            torch.set_num_threads(number)
            found.append(fused_error(weight, parts, grid))
        assert found[0] is not None
        assert found[1] is not None
        assert torch.equal(found[0], found[1])


class Down(UniformGrid):
    """Rounds down, as no range of its values would tell."""

    def quantize_dequantize(self, tensor: Tensor) -> Tensor:
        return torch.cat([((g / (s := self.qparams(g)[0])).floor() * s) for g in self.groups(tensor)], 1)


class Coarse(UniformGrid):
    """Has other scales than it says."""

    def quantize_dequantize(self, tensor: Tensor) -> Tensor:
        return UniformGrid(2).quantize_dequantize(tensor)


@pytest.mark.parametrize("grid", [Down(4), Coarse(4)])
def test_a_grid_that_rounds_otherwise_is_asked(grid: UniformGrid, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, parts = split(torch.float32)
    assert fused_error(weight, parts, grid) is None
    monkeypatch.setattr(rounding_error, "_WHOLE", 0)
    wanted = row_error(weight, quantized_sum(parts, grid))
    torch.testing.assert_close(split_error(weight, parts, grid), wanted, rtol=1e-6, atol=0)


def test_what_it_cannot_measure_is_left_to_the_grid() -> None:
    weight, parts = split(torch.float32)
    assert fused_error(weight, parts, UniformGrid(4, "affine", "group", 80)) is None  # shorter last groups
    assert fused_error(weight.half(), [part.half() for part in parts], UniformGrid(4)) is None
    assert fused_error(weight[0], [part[0] for part in parts], UniformGrid(4)) is None
