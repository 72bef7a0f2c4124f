"""The `grid` splitter: parts sum to the tensor, and no other splitter's parts round to less error."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from splitquant_plugins.errors import InputError
from splitquant_plugins.grid import Granularity, Grid, Scheme, UniformGrid
from splitquant_plugins.parts import sum_parts
from splitquant_plugins.passes.checks import check_parts
from splitquant_plugins.plan import TensorPlan
from splitquant_plugins.solvers.rounding_error import output_error, quantized_sum, row_error, weight_error
from splitquant_plugins.splitters._bound import additive_bound, free_bound
from splitquant_plugins.splitters._joint import joint_parts, levels, realise, rules_of, search
from splitquant_plugins.splitters._shapes import shapes
from splitquant_plugins.splitters.grid import GridOptions, GridSplitter
from splitquant_plugins.splitters.kmeans import KMeansOptions, KMeansSplitter
from splitquant_plugins.splitters.range import RangeSplitter
from splitquant_plugins.splitters.residual import ResidualOptions, ResidualSplitter

GRIDS = [
    UniformGrid(2, scheme, granularity, 24 if granularity == "group" else None, rule)  # type: ignore[arg-type]
    for scheme, rule in (("affine", "restricted"), ("symmetric", "restricted"), ("symmetric", "full"))
    for granularity in ("tensor", "channel", "group")
]
TENSOR, CHANNEL, GROUP, FULL = GRIDS[0], GRIDS[1], GRIDS[2], GRIDS[7]


every_grid = pytest.mark.parametrize(
    "grid", GRIDS, ids=lambda grid: f"{grid.scheme}-{grid.symmetric_scale}-{grid.granularity}"
)


def plan(k: int, moment: torch.Tensor | None = None, options: object | None = None) -> TensorPlan:
    options = GridOptions() if options is None else options
    return TensorPlan("layer", "weight", k, "grid", "tensor", options, second_moment=moment)  # type: ignore[arg-type]


def heavy(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(*shape, generator=generator) * 0.05
    weight.view(-1)[:: max(1, weight.numel() // 5)] *= 8
    return weight


def assert_sums(tensor: torch.Tensor, parts: list[torch.Tensor], k: int) -> None:
    """The sum is within eps times the last part, and the pass's own check lets the parts through."""
    check_parts("layer.weight", tensor, parts, k)
    off = (sum_parts(parts).double() - tensor.double()).abs()
    assert bool((off <= torch.finfo(tensor.dtype).eps * parts[-1].abs().double()).all())


def others(weight: torch.Tensor, k: int, grid: Grid) -> dict[str, list[torch.Tensor]]:
    return {
        "residual": list(ResidualSplitter().split(weight, plan(k, options=ResidualOptions()), grid)),
        "range": list(RangeSplitter().split(weight, plan(k), grid)),
        "kmeans": list(KMeansSplitter().split(weight, plan(k, options=KMeansOptions()), grid)) if k > 1 else [weight],
        "plain": [weight],
    }


def sqnr(tensor: torch.Tensor, error: float) -> float:
    return 10 * math.log10(float(tensor.double().square().sum()) / error)


@every_grid
@pytest.mark.parametrize("k", [1, 2, 3])
def test_parts_sum_and_no_other_splitter_makes_less_error(grid: UniformGrid, k: int) -> None:
    weight = heavy(6, 36)
    parts = list(GridSplitter().split(weight, plan(k), grid))
    assert len(parts) == k
    assert_sums(weight, parts, k)
    error = weight_error(weight, parts, grid)
    for name, other in others(weight, k, grid).items():
        assert error <= weight_error(weight, other, grid) * (1 + 1e-6), name


@pytest.mark.parametrize("grid", [CHANNEL])
def test_four_parts_are_better_than_three(grid: UniformGrid) -> None:
    weight = heavy(6, 36)
    three, four = (list(GridSplitter().split(weight, plan(k), grid)) for k in (3, 4))
    assert_sums(weight, four, 4)
    assert weight_error(weight, four, grid) < 0.7 * weight_error(weight, three, grid)


@every_grid
def test_two_parts_come_close_to_the_best_additive_code(grid: UniformGrid) -> None:
    weight = heavy(8, 96).clamp(-0.1, 0.1)  # outliers have to be covered, which the bound need not do
    error = weight_error(weight, list(GridSplitter().split(weight, plan(2), grid)), grid)
    # a group of 24 values pays more for the values that hold the ends of its parts' ranges
    short = 3.5 if grid.granularity == "group" else 1.5
    assert sqnr(weight, error) > sqnr(weight, additive_bound(weight, grid, 2)) - short


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_three_int2_parts_beat_plain_int6(granularity: Granularity) -> None:
    weight, grid = heavy(16, 144), UniformGrid(2, "affine", granularity)
    error = weight_error(weight, list(GridSplitter().split(weight, plan(3), grid)), grid)
    assert error < weight_error(weight, [weight], UniformGrid(6, "affine", granularity))


@every_grid
def test_backend_derives_the_scales_that_were_chosen(grid: UniformGrid) -> None:
    weight = heavy(4, 72)
    rules = rules_of(shapes(grid))
    for groups in grid.groups(weight):
        books = search(groups, rules, 2)
        parts = realise(groups, rules, books)
        for part in range(2):
            scale, _ = grid.qparams(parts[part])
            torch.testing.assert_close(scale.double(), torch.tensor(books.scale[:, part : part + 1]), rtol=1e-5, atol=0)
        sums = levels(rules, books, groups.shape[1])
        wanted = sums.values(sums.nearest(groups))
        error = (groups - wanted).square().sum(dim=1)
        # the price of the search adds what ends off their levels cost, and is right but for what bins blur
        assert bool((error <= torch.tensor(books.error) * 1.05 + 1e-9).all())
        torch.testing.assert_close(sum(parts[1:], parts[0]), groups, rtol=0, atol=1e-6)
        # all but the few weights that hold the ends of a range are rounded to their nearest sum
        rounded = torch.zeros_like(groups)
        for part in parts:
            scale, zero_point = grid.qparams(part)
            low, high = grid.quant_min, grid.quant_max
            rounded += ((torch.round(part / scale) + zero_point).clamp(low, high) - zero_point) * scale
        moved = ((rounded - wanted).abs() > 1e-3 * books.scale.min()).sum(dim=1)
        assert int(moved.max()) <= 6


@settings(deadline=None, max_examples=12)
@given(
    values=st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=8),
    rows=st.integers(1, 3),
    k=st.integers(1, 2),
    grid=st.sampled_from(GRIDS),
)
def test_any_tensor(values: list[float], rows: int, k: int, grid: UniformGrid) -> None:
    row = torch.tensor(values)
    weight = torch.stack([row * (i - 1) + i for i in range(rows)])
    parts = list(GridSplitter().split(weight, plan(k), grid))
    assert 1 <= len(parts) <= k
    assert_sums(weight, parts, k)
    assert weight_error(weight, parts, grid) <= weight_error(weight, [weight], grid) * (1 + 1e-6) + 1e-12


@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(4, 8),
        torch.full((4, 8), 0.3),
        torch.full((1, 1), -2.0),
        torch.tensor([[0.1, -0.7]]),
        torch.arange(16.0).reshape(2, 8),
        -torch.arange(16.0).reshape(2, 8),
        torch.tensor([[0.0] * 31 + [5.0], [1.0] * 32]),
        heavy(4, 3, 3, 3),
        heavy(8, 30),
        heavy(40),
    ],
    ids=["zero", "constant", "single", "two", "positive", "negative", "spike", "conv", "short-group", "vector"],
)
@pytest.mark.parametrize("grid", [TENSOR, CHANNEL, GROUP, FULL])
def test_odd_tensors(weight: torch.Tensor, grid: UniformGrid) -> None:
    parts = list(GridSplitter().split(weight, plan(2), grid))
    assert_sums(weight, parts, 2)
    rounded = quantized_sum(parts, grid)
    assert torch.isfinite(rounded).all()
    assert bool((rounded[(weight == 0)].abs() <= 0.51 * weight.abs().max()).all())
    assert weight_error(weight, parts, grid) <= weight_error(weight, [weight], grid) * (1 + 1e-6)


def test_a_zero_channel_stays_zero() -> None:
    weight = heavy(6, 48)
    weight[2] = 0
    for grid in (CHANNEL, GROUP):
        parts = GridSplitter().split(weight, plan(2), grid)
        assert all(bool((part[2] == 0).all()) for part in parts)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("scheme", ["affine", "symmetric"])
def test_wider_grids(bits: int, scheme: str) -> None:
    weight = heavy(4, 48)
    for k in (2, 3):
        grid = UniformGrid(bits, scheme, "channel")  # type: ignore[arg-type]
        parts = list(GridSplitter().split(weight, plan(k), grid))
        assert_sums(weight, parts, k)
        gain = sqnr(weight, weight_error(weight, parts, grid)) - sqnr(weight, weight_error(weight, [weight], grid))
        assert gain > 2.0 * bits * (k - 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("k", [2, 3])
def test_dtypes(dtype: torch.dtype, k: int) -> None:
    weight = heavy(4, 32).to(dtype)
    parts = list(GridSplitter().split(weight, plan(k), CHANNEL))
    assert_sums(weight, parts, k)
    assert sqnr(weight, weight_error(weight, parts, CHANNEL)) > 8 * (k - 1)


def test_weights_at_the_end_of_a_dtype_do_not_overflow() -> None:
    weight = (heavy(4, 32) * 1e5).clamp(-65504, 65504).half()
    for k in (2, 3):
        assert_sums(weight, list(GridSplitter().split(weight, plan(k), FULL)), k)


def test_same_tensor_same_parts() -> None:
    weight = heavy(8, 64)
    first, second = (GridSplitter().split(weight, plan(2), CHANNEL) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("grid", [TENSOR, CHANNEL, GROUP, FULL])
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
    assert_sums(weight, aware, 2)
    most = 0.9 if grid.granularity == "group" else 0.7  # the shorter search gains less on small groups
    assert output_error(weight, aware, grid, moment) < most * output_error(weight, blind, grid, moment)


def test_groups_wider_than_a_channel_with_a_second_moment() -> None:
    weight, moment = heavy(8, 20), torch.eye(20).unsqueeze(0)
    wide = GridSplitter().split(weight, plan(2, moment), UniformGrid(2, granularity="group", group_size=32))
    same = GridSplitter().split(weight, plan(2, moment), CHANNEL)
    assert all(torch.equal(one, other) for one, other in zip(wide, same, strict=True))


def test_second_moment_can_be_ignored() -> None:
    weight, moment = heavy(8, 40), torch.eye(40).unsqueeze(0) * torch.arange(1.0, 41.0)
    blind = GridSplitter().split(weight, plan(2), CHANNEL)
    ignored = GridSplitter().split(weight, plan(2, moment, GridOptions(use_second_moment=False)), CHANNEL)
    assert all(torch.equal(a, b) for a, b in zip(blind, ignored, strict=True))


class StrangeGrid(UniformGrid):
    """A grid whose rounding is not what its scale and zero point say: it flushes small values to zero."""

    def quantize_dequantize(self, tensor: torch.Tensor) -> torch.Tensor:
        rounded = super().quantize_dequantize(tensor)
        return torch.where(tensor.abs() < 0.3 * tensor.abs().max(), torch.zeros_like(rounded), rounded)


def test_what_counts_is_the_grid_s_own_rounding() -> None:
    weight = heavy(8, 72)
    grid = StrangeGrid(2, "affine", "channel")
    joint = joint_parts(weight, grid, shapes(grid), 2)
    parts = list(GridSplitter().split(weight, plan(2), grid))
    assert_sums(weight, parts, 2)
    error = weight_error(weight, parts, grid)
    assert error < weight_error(weight, joint, grid)
    for other in others(weight, 2, grid).values():
        assert error <= weight_error(weight, other, grid) * (1 + 1e-6)


class PowerOfTwoGrid:
    """Somebody else's grid, by the protocol alone: per-channel symmetric, scales are powers of two."""

    bits: int = 3
    scheme: Scheme = "symmetric"
    granularity: Granularity = "channel"
    group_size = None
    quant_min, quant_max = -3, 3

    def groups(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (tensor.flatten(1) if tensor.ndim > 1 else tensor.reshape(1, -1),)

    def from_groups(self, groups: Sequence[torch.Tensor], shape: torch.Size) -> torch.Tensor:
        return groups[0].reshape(shape)

    def qparams(self, groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        peak = groups.abs().amax(dim=1, keepdim=True)
        scale = torch.exp2(torch.ceil(torch.log2(torch.where(peak > 0, peak, 1.0) / 3)))
        return scale, torch.zeros_like(scale)

    def quantize_dequantize(self, tensor: torch.Tensor) -> torch.Tensor:
        (groups,) = self.groups(tensor)
        scale, _ = self.qparams(groups)
        return ((groups / scale).round().clamp(-3, 3) * scale).reshape(tensor.shape)

    def stored_bits(self, shape: torch.Size) -> int:
        return 3 * shape.numel() + 8 * shape[0]


def test_a_grid_of_a_third_party() -> None:
    weight, grid = heavy(8, 48), PowerOfTwoGrid()
    assert isinstance(grid, Grid)
    parts = list(GridSplitter().split(weight, plan(2), grid))
    assert_sums(weight, parts, 2)
    for name, other in others(weight, 2, grid).items():
        assert weight_error(weight, parts, grid) <= weight_error(weight, other, grid) * (1 + 1e-6), name


def test_a_grid_is_needed() -> None:
    with pytest.raises(InputError, match="layer"):
        GridSplitter().split(heavy(4, 4), plan(2), None)


def test_one_part_is_the_tensor() -> None:
    weight = heavy(4, 4)
    assert [part is weight for part in GridSplitter().split(weight, plan(1), TENSOR)] == [True]


def test_bounds_are_in_order() -> None:
    weight, grid = heavy(6, 256), CHANNEL
    error = weight_error(weight, list(GridSplitter().split(weight, plan(2), grid)), grid)
    assert free_bound(weight, grid, 2) < additive_bound(weight, grid, 2) < error


def test_row_error_with_groups() -> None:
    weight = heavy(4, 5)
    moment = torch.stack([torch.eye(5), 3 * torch.eye(5)])
    rounded = torch.zeros_like(weight)
    expected = weight.square().sum(dim=1).double() * torch.tensor([1, 1, 3, 3])
    torch.testing.assert_close(row_error(weight, rounded, moment), expected, rtol=1e-5, atol=0)
