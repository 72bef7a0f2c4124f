"""Grids whose scales are powers of two: the rule is exact, and scales of parts are searched among what there is."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from splitquant_plugins.evaluation.simulated_backend import SimulatedBackend
from splitquant_plugins.grid import UniformGrid, next_power_of_two
from splitquant_plugins.plan import TensorPlan
from splitquant_plugins.solvers.rounding_error import weight_error
from splitquant_plugins.splitters.grid import GridSplitter
from splitquant_plugins.splitters.residual import ResidualSplitter


def weights(rows: int = 12, columns: int = 96) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator)
    return weight * (1 + 5 * (torch.rand(rows, columns, generator=generator) < 0.01))


def split(weight: Tensor, grid: UniformGrid, k: int, splitter=GridSplitter) -> list[Tensor]:
    plan = TensorPlan("layer", "weight", k, "grid", "channel", splitter.Options())
    return list(splitter().split(weight, plan, grid))


def test_scales_round_up_to_the_next_power_and_no_further():
    exact = 2.0 ** torch.arange(-140, 120)
    assert torch.equal(next_power_of_two(exact), exact)
    beyond = torch.nextafter(exact[20:], torch.tensor(torch.inf))
    assert torch.equal(next_power_of_two(beyond), 2 * exact[20:])
    assert next_power_of_two(torch.tensor([0.1, 0.3, 5.0])).tolist() == [0.125, 0.5, 8.0]


@pytest.mark.parametrize("scheme", ["symmetric", "affine"])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_the_grid_has_powers_of_two_and_covers_the_range(scheme, granularity):
    weight = weights()
    plain = UniformGrid(4, scheme, granularity)
    grid = UniformGrid(4, scheme, granularity, power_of_two_scale=True)
    (groups,) = grid.groups(weight)
    scale = grid.qparams(groups)[0]
    assert (torch.frexp(scale).mantissa == 0.5).all()
    ratio = scale / plain.qparams(groups)[0]
    assert (ratio >= 1).all()
    assert (ratio < 2).all()
    assert (
        (weight - grid.quantize_dequantize(weight)).abs()
        <= 0.5001 * grid.from_groups([scale.expand_as(groups)], weight.shape)
    ).all()


def cheapest_pair(group: Tensor, highest: int) -> float:
    """Least error over the pairs of powers of two that cover the group, every weight at its nearest sum."""
    codes = torch.arange(-highest, highest + 1).double()
    top = int(torch.log2(group.abs().max() / highest).ceil())
    best = float("inf")
    for first, second in itertools.product(range(top - 3, top + 2), range(top - 9, top + 2)):
        if second > first or highest * (2.0**first + 2.0**second) < group.abs().max():
            continue
        sums = (codes.unsqueeze(1) * 2.0**first + codes * 2.0**second).flatten()
        best = min(best, float((group.double().unsqueeze(1) - sums).abs().amin(dim=1).square().sum()))
    return best


@pytest.mark.parametrize("bits", [3, 4])
def test_two_parts_have_the_best_pair_of_exponents(bits):
    weight = weights()
    grid = UniformGrid(bits, "symmetric", "channel", power_of_two_scale=True)
    parts = split(weight, grid, 2)
    found = [weight_error(weight[i : i + 1], [p[i : i + 1] for p in parts], grid) for i in range(len(weight))]
    best = [cheapest_pair(row, grid.quant_max) for row in weight]
    assert sum(found) < 1.15 * sum(best)  # ends that have to occur take a weight or two off their nearest sums


def test_the_joint_search_beats_the_residual():
    weight = weights()
    grid = UniformGrid(4, "symmetric", "channel", power_of_two_scale=True)
    joint, residual = (weight_error(weight, split(weight, grid, 2, s), grid) for s in (GridSplitter, ResidualSplitter))
    assert joint < 0.5 * residual
    blind = UniformGrid(4, "symmetric", "channel")
    assert joint < 0.5 * weight_error(weight, split(weight, blind, 2), grid)


@pytest.mark.parametrize("scheme", ["symmetric", "affine"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_parts_sum_to_the_weight_and_gain(bits, scheme):
    weight = weights()
    grid = UniformGrid(bits, scheme, "tensor", power_of_two_scale=True)
    parts = split(weight, grid, 3)
    eps = torch.finfo(weight.dtype).eps
    assert ((sum(parts) - weight).abs() <= eps * parts[-1].abs().clamp(min=weight.abs().max())).all()
    assert weight_error(weight, parts, grid) < 0.7 * weight_error(weight, [weight], grid)


def test_the_simulated_backend_has_them():
    from splitquant_plugins.backends import WeightFormat

    grid = SimulatedBackend(power_of_two_scale=True).grid(WeightFormat("int4", 4, "channel", None, "symmetric"))
    assert grid == UniformGrid(4, "symmetric", "channel", power_of_two_scale=True)
