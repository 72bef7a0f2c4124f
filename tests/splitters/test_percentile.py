"""The `percentile` splitter: a clip whose excess is not lost."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from splitquant_plugins.grid import Granularity
from splitquant_plugins.plan import TensorPlan
from splitquant_plugins.splitters.percentile import PercentileOptions, PercentileSplitter


def plan(k: int = 2, percentile: float = 90, granularity: Granularity = "tensor") -> TensorPlan:
    options = PercentileOptions(percentile=percentile)
    return TensorPlan("layer", "weight", k, "percentile", granularity, options)


@settings(deadline=None, max_examples=50)
@given(values=st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=30), q=st.floats(1, 99))
def test_parts_sum_to_the_tensor(values: list[float], q: float) -> None:
    weight = torch.tensor([values])
    clipped, excess = PercentileSplitter().split(weight, plan(percentile=q))
    assert torch.equal(clipped + excess, weight)
    assert bool((clipped.abs() <= weight.abs()).all())


def test_first_part_is_clipped_at_the_percentile() -> None:
    weight = torch.arange(1.0, 101.0).reshape(10, 10)
    weight[::2] *= -1
    clipped, excess = PercentileSplitter().split(weight, plan(percentile=90))
    assert float(clipped.abs().max()) == 90
    assert int((excess != 0).sum()) == 10


def test_percentile_per_channel() -> None:
    weight = torch.stack([torch.arange(1.0, 11.0), torch.arange(10.0, 110.0, 10.0)])
    clipped, _ = PercentileSplitter().split(weight, plan(percentile=90, granularity="channel"))
    assert clipped.amax(dim=1).tolist() == [9, 90]


@pytest.mark.parametrize(("k", "parts"), [(1, 1), (2, 2), (5, 2)])
def test_number_of_parts(k: int, parts: int) -> None:
    assert len(PercentileSplitter().split(torch.randn(3, 4), plan(k))) == parts
