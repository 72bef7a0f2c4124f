"""Clipped weights: no group loses, ranges are those of least error, values inside a range stay as they are."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from splitquant_plugins import UniformGrid
from splitquant_plugins.solvers.clipping import SHRINKS, clip_to_grid

GRIDS = st.builds(
    lambda bits, scheme, shared: UniformGrid(bits, scheme, shared, 5 if shared == "group" else None),
    st.integers(2, 5),
    st.sampled_from(["affine", "symmetric"]),
    st.sampled_from(["tensor", "channel", "group"]),
)


def weights(seed: int, shape: tuple[int, ...] = (6, 12), tail: int = 3) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return values * values.abs() ** (tail - 1)


def errors(weight: Tensor, of: Tensor, grid: UniformGrid) -> Tensor:
    wrong = grid.quantize_dequantize(of) - weight
    return torch.cat([each.square().sum(dim=1, dtype=torch.float64) for each in grid.groups(wrong)])


@given(GRIDS, st.integers(0, 10**6), st.sampled_from([(6, 12), (4, 3, 2, 2), (1, 7)]), st.integers(1, 4))
def test_no_group_loses_and_the_errors_are_those_of_the_grid(grid, seed, shape, tail):
    weight = weights(seed, shape, tail)
    found = clip_to_grid(weight, grid)
    assert found.weight.shape == weight.shape
    assert torch.allclose(found.error_before, errors(weight, weight, grid))
    assert torch.allclose(found.error_after, errors(weight, found.weight, grid))
    assert (found.error_after <= found.error_before).all()
    same = torch.cat([(a == b).all(dim=1) for a, b in zip(grid.groups(found.weight), grid.groups(weight), strict=True)])
    assert torch.equal(same, found.error_after == found.error_before)


@given(GRIDS, st.integers(0, 10**6))
def test_a_clipped_weight_lies_between_the_ends_and_is_the_weight_there(grid, seed):
    weight = weights(seed)
    clipped = clip_to_grid(weight, grid).weight
    for new, old in zip(grid.groups(clipped), grid.groups(weight), strict=True):
        low, high = new.amin(dim=1, keepdim=True), new.amax(dim=1, keepdim=True)
        assert torch.equal(new, torch.clamp(old, low, high))
        assert (low >= old.amin(dim=1, keepdim=True)).all()
        assert (high <= old.amax(dim=1, keepdim=True)).all()


@given(GRIDS, st.integers(0, 10**6))
def test_nothing_is_lost_on_the_shrinks_of_both_ends(grid, seed):
    weight = weights(seed)
    found = clip_to_grid(weight, grid)
    for shrink in SHRINKS:
        tried = []
        for groups in grid.groups(weight):
            low = groups.amin(dim=1, keepdim=True).clamp(max=0)
            high = groups.amax(dim=1, keepdim=True).clamp(min=0)
            if grid.scheme == "symmetric":
                high = torch.maximum(high, -low)
                low = -high
            tried.append(torch.clamp(groups, low * shrink, high * shrink))
        error = errors(weight, grid.from_groups(tried, weight.shape), grid)
        assert (found.error_after <= error * (1 + 1e-5) + 1e-12).all()


@given(GRIDS, st.integers(0, 10**6))
def test_the_same_is_found_again_and_for_the_negative_weight(grid, seed):
    weight = weights(seed)
    one, again, negative = (clip_to_grid(each, grid) for each in (weight, weight.clone(), -weight))
    assert torch.equal(one.weight, again.weight)
    if grid.scheme == "symmetric":
        assert torch.equal(negative.weight, -one.weight)


def test_a_large_weight_is_cut_off_at_either_end():
    weight = torch.cat([torch.linspace(-1, 1, 256), torch.tensor([4.0])])[None]
    for sign, scheme in itertools.product((1, -1), ("affine", "symmetric")):
        found = clip_to_grid(sign * weight, UniformGrid(2, scheme))
        assert found.weight.abs().max() < 2
        assert float(found.error_after.sum()) < 0.4 * float(found.error_before.sum())


@pytest.mark.parametrize("sign", [1, -1])
def test_either_end_is_searched_by_itself(sign):
    weight = torch.cat([torch.linspace(-4, 0.9, 150), torch.full((200,), -4.0), torch.tensor([8.0])])[None]
    clipped = sign * clip_to_grid(sign * weight, UniformGrid(2)).weight
    assert float(clipped.min()) < -3.4  # where most weights are
    assert float(clipped.max()) < 4


@pytest.mark.parametrize("scheme", ["affine", "symmetric"])
def test_ranges_are_near_the_best_of_a_fine_search(scheme):
    weight = weights(3, (16, 256), 2)
    grid = UniformGrid(2, scheme)
    found = clip_to_grid(weight, grid).error_after
    fine = torch.linspace(0.05, 1, 39)
    best = errors(weight, weight, grid)
    low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    if scheme == "symmetric":
        high = torch.maximum(high, -low)
        low = -high
    for one in fine:
        for other in fine if scheme == "affine" else [one]:
            best = torch.minimum(best, errors(weight, torch.clamp(weight, low * one, high * other), grid))
    assert float(found.sum()) < 1.02 * float(best.sum())


@pytest.mark.parametrize("weight", [torch.zeros(3, 4), torch.ones(2, 4), torch.full((2, 1), -3.0)])
def test_weights_without_a_better_range_stay(weight):
    found = clip_to_grid(weight, UniformGrid(2))
    assert torch.equal(found.weight, weight)
    assert torch.equal(found.error_after, found.error_before)


def test_narrow_types_keep_their_type():
    weight = weights(0).bfloat16()
    found = clip_to_grid(weight, UniformGrid(2))
    assert found.weight.dtype == torch.bfloat16
    assert found.error_after.sum() < found.error_before.sum()
