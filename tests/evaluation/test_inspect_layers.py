from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from splitquant_plugins.evaluation.inspect_layers import (
    boundaries_of,
    count_outliers,
    grid_gain,
    histogram_of,
    inspect_weight,
    scaling_factor,
)
from splitquant_plugins.grid import UniformGrid

GRIDS = {"channel": UniformGrid(2), "tensor": UniformGrid(2, granularity="tensor")}


def weight_of(seed: int, rows: int = 6, columns: int = 10) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def parts_at(weight: torch.Tensor, *cuts: float) -> list[torch.Tensor]:
    ends = [-math.inf, *cuts, math.inf]
    return [weight * ((weight >= low) & (weight < high)) for low, high in pairwise(ends)]


@pytest.mark.parametrize(("bits", "factor"), [(2, 0.75), (4, 3.75), (8, 63.75)])
def test_scaling_factor_is_the_papers(bits: int, factor: float) -> None:
    assert scaling_factor(torch.tensor([-1.0, 0.0, 3.0]), bits) == factor


def test_scaling_factor_of_equal_values_is_none() -> None:
    assert scaling_factor(torch.full((3,), 2.0), 2) is None


def test_outliers_lie_beyond_three_interquartile_ranges() -> None:
    bulk = torch.arange(101.0)  # quartiles 25 and 75
    assert count_outliers(bulk) == 0
    assert count_outliers(torch.cat([bulk, torch.tensor([1000.0, -1000.0, 1001.0])])) == 3
    # A value that is moved alone leaves the quartiles where they are: the fences are at -125 and 225.
    for value, found in ((224.9, 0), (225.1, 1)):
        moved = bulk.clone()
        moved[-1] = value
        assert count_outliers(moved) == found
    for value, found in ((-124.9, 0), (-125.1, 1)):
        moved = bulk.clone()
        moved[0] = value
        assert count_outliers(moved) == found


def test_boundaries_lie_halfway_between_neighbours_and_ignore_injected_zeros() -> None:
    parts = [torch.tensor([-2.0, 0, 0, 0]), torch.tensor([0, -1.0, 0.5, 0]), torch.tensor([0, 0, 0, 1.5])]
    assert boundaries_of(parts) == (-1.5, 1.0)


def test_boundaries_of_overlapping_parts_are_none() -> None:
    assert boundaries_of([torch.tensor([-1.0, 1.0]), torch.tensor([0.5, 2.0])]) == ()


def test_boundaries_of_one_part_are_none() -> None:
    assert boundaries_of([torch.tensor([1.0, 2.0])]) == ()


def test_gain_of_a_hand_computed_weight() -> None:
    # Whole: levels 0 and ±1 steps of 10/3; 1 rounds to 0, 10 is exact. Split: both are exact.
    weight = torch.tensor([[1.0, 10.0]])
    gain = grid_gain(weight, [torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 10.0]])], GRIDS["tensor"])
    assert gain.plain_db == pytest.approx(10 * math.log10(101 / 1), abs=1e-3)
    assert gain.split_db > 100
    assert gain.gain_db == gain.split_db - gain.plain_db


def test_bits_count_every_part() -> None:
    weight = weight_of(0, 4, 8)
    gain = grid_gain(weight, parts_at(weight, -0.5, 0.5), GRIDS["channel"])
    assert gain.plain_bits_per_weight == 2 + 4 * (32 + 2) / 32
    assert gain.split_bits_per_weight == 3 * gain.plain_bits_per_weight


@given(st.integers(0, 10_000), st.floats(-1, 0), st.floats(0, 1))
def test_a_part_never_has_a_lesser_scaling_factor_than_a_weight_that_spans_zero(
    seed: int, low: float, high: float
) -> None:
    weight = weight_of(seed)
    parts = parts_at(weight, low, high)
    found = inspect_weight("layer", "linear", weight, dict.fromkeys(GRIDS, parts), GRIDS)
    assert found.scaling_factor is not None
    factors = [part.scaling_factor for part in found.parts if part.scaling_factor is not None]
    assert min(factors) == found.least_part_scaling_factor
    assert min(factors) >= found.scaling_factor - 1e-6
    assert (found.min, found.max) == (weight.min(), weight.max())


@given(st.integers(0, 10_000))
def test_histogram_counts_every_value_once(seed: int) -> None:
    weight = weight_of(seed)
    histogram = histogram_of(weight, parts_at(weight, -0.4, 0.4))
    assert int(histogram.whole.sum()) == weight.numel()
    assert torch.equal(torch.stack(histogram.parts).sum(0), histogram.whole)


def test_histogram_of_equal_values_has_a_range() -> None:
    histogram = histogram_of(torch.ones(4), [torch.ones(4)])
    assert int(histogram.whole.sum()) == 4
    assert bool((histogram.edges.diff() > 0).all())


def test_a_layer_that_stays_whole_gains_and_costs_nothing() -> None:
    weight = weight_of(1)
    found = inspect_weight("layer", "linear", weight, {key: [weight] for key in GRIDS}, GRIDS, "no reason")
    assert [part.name for part in found.parts] == ["whole"]
    assert found.reason == "no reason"
    for gain in found.gains.values():
        assert gain.gain_db == 0
        assert gain.split_bits_per_weight == gain.plain_bits_per_weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_measured_like_the_same_values_in_single(dtype: torch.dtype) -> None:
    weight = weight_of(2).to(dtype)
    parts = parts_at(weight, -0.5, 0.5)
    half = inspect_weight("layer", "linear", weight, dict.fromkeys(GRIDS, parts), GRIDS)
    single = inspect_weight(
        "layer", "linear", weight.float(), {key: [part.float() for part in parts] for key in GRIDS}, GRIDS
    )
    assert half.gains == single.gains
    assert half.parts == single.parts
