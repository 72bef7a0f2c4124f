"""The `ocs` splitter: the input channels with the largest weights are shared by parts."""

from __future__ import annotations

import pytest
import torch

from splitquant_plugins.grid import UniformGrid
from splitquant_plugins.parts import sum_parts
from splitquant_plugins.plan import TensorPlan
from splitquant_plugins.splitters.ocs import OcsOptions, OcsSplitter, share_counts


def plan(k: int, ratio: float) -> TensorPlan:
    return TensorPlan("layer", "weight", k, "ocs", "tensor", OcsOptions(ratio=ratio))


@pytest.mark.parametrize("k", [2, 3, 4])
@pytest.mark.parametrize("grid", [None, UniformGrid(4, "affine", "tensor")])
@pytest.mark.parametrize("shape", [(6, 20), (4, 20, 3, 3)])
def test_parts_sum_to_the_tensor(k: int, grid: UniformGrid | None, shape: tuple[int, ...]) -> None:
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    parts = list(OcsSplitter().split(weight, plan(k, 0.5), grid))
    assert 2 <= len(parts) <= k
    torch.testing.assert_close(sum_parts(parts), weight, rtol=0, atol=1e-7)


def test_the_channel_of_the_largest_magnitude_is_halved() -> None:
    weight = torch.tensor([[0.1, -4.0, 0.3, 1.0], [0.2, 1.0, 3.0, 0.5]])
    second, first = OcsSplitter().split(weight, plan(2, 0.25), None)
    assert torch.equal(second, torch.tensor([[0, -2.0, 0, 0], [0, 0.5, 0, 0]]))
    assert torch.equal(first + second, weight)


def test_with_a_grid_the_halves_round_to_what_the_weight_rounds_to() -> None:
    # section 3.3 of the paper: floor-like rounding of (w - step/2)/2 and (w + step/2)/2 adds up
    weight = torch.linspace(-3, 3, 61).unsqueeze(1).repeat(1, 2)
    weight[:, 1] = 0.0
    grid = UniformGrid(4, "affine", "tensor")
    second, first = OcsSplitter().split(weight, plan(2, 0.5), grid)
    step = grid.qparams(weight.reshape(1, -1) / 2)[0]
    torch.testing.assert_close((second - first)[:, 0], (step / 2).expand(61, 1)[:, 0], rtol=1e-4, atol=1e-6)
    halves = (torch.round(second / step) + torch.round(first / step))[:, 0] * step
    assert float((halves - weight[:, 0]).abs().max()) <= 0.5001 * float(step)


def test_a_channel_can_be_shared_by_more_than_two() -> None:
    weight = torch.tensor([[9.0, 1.0, 1.0, 1.0]])
    assert share_counts(weight, 3, 4).tolist() == [4, 1, 1, 1]
    assert share_counts(weight, 3, 2).tolist() == [2, 2, 2, 1]
    assert len(OcsSplitter().split(weight, plan(4, 0.75), None)) == 4


def test_vectors_and_single_parts_stay_whole() -> None:
    assert len(OcsSplitter().split(torch.ones(5), plan(3, 0.5), None)) == 1
    assert len(OcsSplitter().split(torch.ones(5, 5), plan(1, 0.5), None)) == 1
