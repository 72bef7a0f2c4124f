"""The `grid` splitter: parts sum to the tensor, and no other splitter's parts round to less error."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from splitquant_plugins.errors import InputError
from splitquant_plugins.grid import Grid, UniformGrid
from splitquant_plugins.plan import TensorPlan
from splitquant_plugins.splitters._bound import additive_bound, free_bound
from splitquant_plugins.splitters._codebook import Search
from splitquant_plugins.splitters._measure import output_error, quantized_sum, row_error, weight_error
from splitquant_plugins.splitters._realise import levels, nearest, realise
from splitquant_plugins.splitters._shapes import shapes
from splitquant_plugins.splitters._sketch import price, sketch
from splitquant_plugins.splitters.grid import GridOptions, GridSplitter, joint_parts
from splitquant_plugins.splitters.range import RangeSplitter
from splitquant_plugins.splitters.residual import ResidualOptions, ResidualSplitter

GRIDS = [
    UniformGrid(2, "affine", "tensor"),
    UniformGrid(2, "affine", "channel"),
    UniformGrid(2, "affine", "group", 24),
    UniformGrid(2, "symmetric", "tensor"),
    UniformGrid(2, "symmetric", "channel"),
    UniformGrid(2, "symmetric", "tensor", symmetric_scale="full"),
    UniformGrid(2, "symmetric", "channel", symmetric_scale="full"),
]


def plan(k: int, moment: torch.Tensor | None = None, options: object | None = None) -> TensorPlan:
    options = GridOptions() if options is None else options
    return TensorPlan("layer", "weight", k, "grid", "tensor", options, second_moment=moment)  # type: ignore[arg-type]


def heavy(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(*shape, generator=generator) * 0.05
    weight.view(-1)[:: max(1, weight.numel() // 5)] *= 8
    return weight


def assert_sums(tensor: torch.Tensor, parts: list[torch.Tensor]) -> None:
    """Bit for bit, or within an ulp of the larger of the weight and its last part."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    assert all(part.dtype == tensor.dtype and part.shape == tensor.shape for part in parts)
    off = (total.double() - tensor.double()).abs()
    size = torch.maximum(parts[-1].abs(), tensor.abs()).double()
    assert bool((off <= torch.finfo(tensor.dtype).eps * size).all())


def sqnr(tensor: torch.Tensor, error: float) -> float:
    return 10 * math.log10(float(tensor.double().square().sum()) / error)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("k", [2, 3])
def test_parts_sum_and_round_to_no_more_error_than_the_others(grid: UniformGrid, k: int) -> None:
    weight = heavy(16, 72)
    parts = list(GridSplitter().split(weight, plan(k), grid))
    assert len(parts) == k
    assert_sums(weight, parts)
    error = weight_error(weight, parts, grid)
    residual = ResidualSplitter().split(weight, plan(k, options=ResidualOptions()), grid)
    ranges = RangeSplitter().split(weight, plan(k), grid)
    for other in (residual, ranges, [weight]):
        assert error <= weight_error(weight, list(other), grid) * (1 + 1e-6)


@pytest.mark.parametrize("grid", GRIDS)
def test_three_parts_come_close_to_the_best_additive_code(grid: UniformGrid) -> None:
    weight = heavy(32, 192)
    error = weight_error(weight, list(GridSplitter().split(weight, plan(3), grid)), grid)
    # outliers have to be covered, which the bound need not do; without them it is within a decibel
    assert sqnr(weight, error) > sqnr(weight, additive_bound(weight, grid, 3)) - 5.0
    calm = heavy(32, 192).clamp(-0.1, 0.1)
    error = weight_error(calm, list(GridSplitter().split(calm, plan(3), grid)), grid)
    assert sqnr(calm, error) > sqnr(calm, additive_bound(calm, grid, 3)) - 1.0


def test_three_int2_parts_beat_plain_int6() -> None:
    weight = heavy(32, 192)
    for granularity in ("tensor", "channel"):
        parts = GridSplitter().split(weight, plan(3), UniformGrid(2, "affine", granularity))  # type: ignore[arg-type]
        error = weight_error(weight, list(parts), UniformGrid(2, "affine", granularity))  # type: ignore[arg-type]
        plain = weight_error(weight, [weight], UniformGrid(6, "affine", granularity))  # type: ignore[arg-type]
        assert error < plain


@pytest.mark.parametrize("grid", GRIDS)
def test_backend_derives_the_scales_that_were_chosen(grid: UniformGrid) -> None:
    weight = heavy(8, 96)
    found = shapes(grid)
    for cells in grid.cells(weight):
        peak = cells.abs().amax(dim=1, keepdim=True).double()
        search = Search(found, 3, sketch(cells, 1024))
        book = search.best()
        predicted = search.cost(book.shape, book.scale) * peak.squeeze(1).square()
        book = type(book)(book.shape, book.scale * peak)
        parts = realise(cells, found, book)
        for part in range(3):
            scale, _ = grid.qparams(parts[part])
            torch.testing.assert_close(scale.double(), book.scale[:, part : part + 1], rtol=1e-5, atol=0)
        sums = levels(found, book)
        wanted = sums.value.gather(1, nearest(cells, sums))
        error = (cells - wanted).square().sum(dim=1)
        torch.testing.assert_close(error, predicted, rtol=1e-4, atol=1e-9)  # few enough values: sketch is exact
        torch.testing.assert_close(sum(parts[1:], parts[0]), cells, rtol=0, atol=1e-6)
        # all but the few weights that hold the ends of a range are rounded to their nearest sum
        rounded = torch.zeros_like(cells)
        for part in parts:
            scale, zero_point = grid.qparams(part)
            low, high = grid.code_range
            rounded += ((torch.round(part / scale) + zero_point).clamp(low, high) - zero_point) * scale
        moved = ((rounded - wanted).abs() > 1e-3 * book.scale.amin()).sum(dim=1)
        assert int(moved.max()) <= 6


@settings(deadline=None, max_examples=6)
@given(
    values=st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=12),
    rows=st.integers(1, 3),
    k=st.integers(1, 3),
    grid=st.sampled_from(GRIDS),
)
def test_any_tensor(values: list[float], rows: int, k: int, grid: UniformGrid) -> None:
    row = torch.tensor(values)
    weight = torch.stack([row * (i - 1) + i for i in range(rows)])
    parts = list(GridSplitter().split(weight, plan(k), grid))
    assert 1 <= len(parts) <= k
    assert_sums(weight, parts)
    assert weight_error(weight, parts, grid) <= weight_error(weight, [weight], grid) * (1 + 1e-6) + 1e-12


@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(4, 8),
        torch.full((4, 8), 0.3),
        torch.full((1, 1), -2.0),
        torch.arange(16.0).reshape(2, 8),
        -torch.arange(16.0).reshape(2, 8),
        torch.tensor([[0.0] * 31 + [5.0], [1.0] * 32]),
        heavy(8, 3, 3, 3),
        heavy(8, 30),
        heavy(40),
    ],
    ids=["zero", "constant", "single", "positive", "negative", "spike", "conv", "short-group", "vector"],
)
@pytest.mark.parametrize("grid", [GRIDS[0], GRIDS[1], GRIDS[2], GRIDS[6]])
def test_odd_tensors(weight: torch.Tensor, grid: UniformGrid) -> None:
    parts = list(GridSplitter().split(weight, plan(3), grid))
    assert_sums(weight, parts)
    rounded = quantized_sum(parts, grid)
    assert torch.isfinite(rounded).all()
    assert bool((rounded[(weight == 0)].abs() <= 0.51 * weight.abs().max()).all())
    assert weight_error(weight, parts, grid) <= weight_error(weight, [weight], grid) * (1 + 1e-6)


def test_a_zero_channel_stays_zero() -> None:
    weight = heavy(6, 48)
    weight[2] = 0
    for grid in GRIDS[1:3]:
        parts = GridSplitter().split(weight, plan(3), grid)
        assert all(bool((part[2] == 0).all()) for part in parts)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("scheme", ["affine", "symmetric"])
def test_wider_grids(bits: int, scheme: str) -> None:
    weight = heavy(4, 48)
    for k in (2, 3):
        grid = UniformGrid(bits, scheme, "channel")  # type: ignore[arg-type]
        parts = list(GridSplitter().split(weight, plan(k), grid))
        assert_sums(weight, parts)
        gain = sqnr(weight, weight_error(weight, parts, grid)) - sqnr(weight, weight_error(weight, [weight], grid))
        assert gain > 2.0 * bits * (k - 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    weight = heavy(8, 64).to(dtype)
    grid = GRIDS[1]
    parts = list(GridSplitter().split(weight, plan(3), grid))
    assert_sums(weight, parts)
    assert sqnr(weight, weight_error(weight, parts, grid)) > 20


def test_same_tensor_same_parts() -> None:
    weight = heavy(8, 64)
    first, second = (GridSplitter().split(weight, plan(3), GRIDS[1]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("grid", [GRIDS[0], GRIDS[1], GRIDS[2], GRIDS[6]])
@pytest.mark.parametrize("groups", [1, 2])
def test_second_moment_lowers_the_output_error(grid: UniformGrid, groups: int) -> None:
    weight = heavy(16, 60)
    weight[3] = 0
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(groups, 60, 60, generator=generator)
    x = torch.randn(groups, 256, 60, generator=generator) @ mixing
    moment = x.transpose(1, 2) @ x / 256
    blind = list(GridSplitter().split(weight, plan(2), grid))
    aware = list(GridSplitter().split(weight, plan(2, moment), grid))
    assert_sums(weight, aware)
    assert output_error(weight, aware, grid, moment) < 0.7 * output_error(weight, blind, grid, moment)


def test_second_moment_can_be_ignored() -> None:
    weight, moment = heavy(8, 40), torch.eye(40).unsqueeze(0) * torch.arange(1.0, 41.0)
    blind = GridSplitter().split(weight, plan(2), GRIDS[1])
    ignored = GridSplitter().split(weight, plan(2, moment, GridOptions(use_second_moment=False)), GRIDS[1])
    assert all(torch.equal(a, b) for a, b in zip(blind, ignored, strict=True))


class StrangeGrid(UniformGrid):
    """A grid whose rounding is not what its scale and zero point say: it flushes small values to zero."""

    def quantize_dequantize(self, tensor: torch.Tensor) -> torch.Tensor:
        rounded = super().quantize_dequantize(tensor)
        return torch.where(tensor.abs() < 0.3 * tensor.abs().max(), torch.zeros_like(rounded), rounded)


def test_what_counts_is_the_grid_s_own_rounding() -> None:
    weight = heavy(16, 72)
    grid = StrangeGrid(2, "affine", "channel")
    assert isinstance(grid, Grid)
    found = shapes(grid)
    joint = joint_parts(weight, grid, found, 3)
    parts = list(GridSplitter().split(weight, plan(3), grid))
    assert_sums(weight, parts)
    assert weight_error(weight, parts, grid) <= weight_error(weight, joint, grid)
    assert weight_error(weight, parts, grid) <= weight_error(weight, [weight], grid)


def test_a_grid_is_needed() -> None:
    with pytest.raises(InputError, match="layer"):
        GridSplitter().split(heavy(4, 4), plan(2), None)


def test_one_part_is_the_tensor() -> None:
    weight = heavy(4, 4)
    assert [part is weight for part in GridSplitter().split(weight, plan(1), GRIDS[0])] == [True]


def test_price_is_the_error_of_the_nearest_level() -> None:
    cells = heavy(3, 50)
    short = sketch(cells, 64)
    lines = torch.linspace(-1, 1, 9, dtype=torch.float64).expand(3, -1).contiguous()
    scaled = cells.double() / cells.abs().amax(dim=1, keepdim=True).double()
    expected = (scaled.unsqueeze(2) - lines.unsqueeze(1)).abs().amin(dim=2).square().sum(dim=1)
    torch.testing.assert_close(price(lines, short), expected)


def test_bounds_are_in_order() -> None:
    weight, grid = heavy(6, 256), UniformGrid(2, "affine", "channel")
    error = weight_error(weight, list(GridSplitter().split(weight, plan(2), grid)), grid)
    assert free_bound(weight, grid, 2) < additive_bound(weight, grid, 2) < error


def test_row_error_with_groups() -> None:
    weight = heavy(4, 5)
    moment = torch.stack([torch.eye(5), 3 * torch.eye(5)])
    rounded = torch.zeros_like(weight)
    expected = weight.square().sum(dim=1).double() * torch.tensor([1, 1, 3, 3])
    torch.testing.assert_close(row_error(weight, rounded, moment), expected, rtol=1e-5, atol=0)
