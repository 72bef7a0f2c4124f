"""The `halve` splitter: outliers are shared equally by two parts."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from splitquant_plugins.grid import Granularity
from splitquant_plugins.plan import TensorPlan
from splitquant_plugins.splitters.halve import HalveOptions, HalveSplitter


def plan(k: int = 2, threshold: float = 0.5, granularity: Granularity = "tensor") -> TensorPlan:
    return TensorPlan("layer", "weight", k, "halve", granularity, HalveOptions(threshold=threshold))


@settings(deadline=None, max_examples=50)
@given(values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=20))
def test_parts_sum_bit_for_bit(values: list[float]) -> None:
    weight = torch.tensor([values])
    first, second = HalveSplitter().split(weight, plan())
    assert torch.equal(first + second, weight)


def test_only_outliers_are_shared() -> None:
    weight = torch.tensor([[1.0, -0.2, 0.4], [-0.8, 0.1, 0.5]])
    first, second = HalveSplitter().split(weight, plan())
    assert torch.equal(second, torch.tensor([[0.5, 0, 0], [-0.4, 0, 0]]))
    assert float(first.abs().max()) == 0.5


def test_threshold_per_channel() -> None:
    weight = torch.tensor([[4.0, 1.0], [0.2, 0.15]])
    _, second = HalveSplitter().split(weight, plan(granularity="channel"))
    assert torch.equal(second != 0, torch.tensor([[True, False], [True, True]]))


def test_one_part_is_the_tensor_and_there_are_never_three() -> None:
    weight = torch.ones(2, 2)
    assert HalveSplitter().split(weight, plan(1))[0] is weight
    assert len(HalveSplitter().split(weight, plan(4))) == 2
