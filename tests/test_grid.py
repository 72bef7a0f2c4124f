"""Uniform quantization: equations (1) to (6) of the paper, zero-exactness, groups and storage."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from splitquant_plugins.errors import ConfigError
from splitquant_plugins.grid import Grid, UniformGrid, next_power_of_two

GRIDS = st.builds(
    lambda bits, scheme, granularity, size, scale: UniformGrid(
        bits, scheme, granularity, size if granularity == "group" else None, scale
    ),
    st.integers(2, 8),
    st.sampled_from(["affine", "symmetric"]),
    st.sampled_from(["tensor", "channel", "group"]),
    st.sampled_from([1, 3, 8, 50]),
    st.sampled_from(["restricted", "full"]),
)
SHAPES = st.sampled_from([(1, 1), (3, 8), (4, 7), (2, 3, 3, 3), (5,)])


def random(shape, seed, shift=0.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + shift


@given(GRIDS, SHAPES, st.integers(0, 99))
def test_groups_go_back_together(grid, shape, seed):
    tensor = random(shape, seed)
    groups = grid.groups(tensor)
    assert all(part.ndim == 2 for part in groups)
    assert torch.equal(grid.from_groups(groups, tensor.shape), tensor)


@given(GRIDS, SHAPES, st.integers(0, 99), st.sampled_from([-3.0, 0.0, 3.0]))
def test_rounding_stays_within_half_a_step_or_is_clipped(grid, shape, seed, shift):
    tensor = random(shape, seed, shift)
    for groups in grid.groups(tensor):
        codes, scale, zero_point = grid.quantize(groups)
        low, high = grid.quant_min, grid.quant_max
        assert bool(((codes == codes.round()) & (codes >= low) & (codes <= high)).all())
        assert bool((zero_point == zero_point.round()).all())
        error = ((codes - zero_point) * scale - groups).abs()
        clipped = (codes == low) | (codes == high)
        assert bool((error[~clipped] <= scale.expand_as(groups)[~clipped] * 0.5001).all())
        # An affine zero point is rounded, which moves the range by half a step; the full symmetric scale clips one.
        reach = 0.5001 if grid.scheme == "symmetric" and grid.symmetric_scale == "restricted" else 1.0001
        assert bool((error <= scale * reach).all())


@given(GRIDS, SHAPES, st.integers(0, 99), st.sampled_from([-3.0, 0.0, 3.0]))
def test_zeros_stay_zero(grid, shape, seed, shift):
    tensor = random(shape, seed, shift)
    tensor[random(shape, seed + 1) > 0] = 0
    assert bool((grid.quantize_dequantize(tensor)[tensor == 0] == 0).all())


@given(GRIDS, SHAPES)
def test_zeros_alone_give_no_nan(grid, shape):
    assert torch.equal(grid.quantize_dequantize(torch.zeros(shape)), torch.zeros(shape))


@given(st.integers(2, 8), SHAPES, st.integers(0, 99))
def test_the_restricted_symmetric_grid_is_idempotent(bits, shape, seed):
    grid = UniformGrid(bits, "symmetric")
    once = grid.quantize_dequantize(random(shape, seed))
    assert torch.allclose(grid.quantize_dequantize(once), once, rtol=1e-5, atol=0)


def test_the_papers_equations():
    # INT2, [beta, alpha] = [-1, 2]: S = 3 / 3, Z = -2 - round(S beta) = -1, codes -2 to 1.
    tensor = torch.tensor([[-1.0, 0.0, 0.4, 0.6, 2.0]])
    grid = UniformGrid(2)
    codes, scale, zero_point = grid.quantize(tensor)
    assert scale.item() == 1
    assert zero_point.item() == -1
    assert codes.tolist() == [[-2, -1, -1, 0, 1]]
    assert grid.quantize_dequantize(tensor).tolist() == [[-1, 0, 0, 1, 2]]


def test_symmetric_scales():
    tensor = torch.tensor([[-3.0, 1.0]])
    assert UniformGrid(2, "symmetric").qparams(tensor)[0].item() == 3
    assert UniformGrid(2, "symmetric", symmetric_scale="full").qparams(tensor)[0].item() == 2
    assert lowest_and_highest(UniformGrid(2, "symmetric")) == (-1, 1)
    assert lowest_and_highest(UniformGrid(2, "symmetric", symmetric_scale="full")) == (-2, 1)
    assert lowest_and_highest(UniformGrid(8)) == (-128, 127)


@pytest.mark.parametrize(
    ("grid", "values", "scale", "zero_point"),
    [
        (UniformGrid(4), [-0.5, 1.0], 0.1, -3),
        (UniformGrid(4), [-0.5, -0.25], 0.5 / 15, 7),
        (UniformGrid(4), [0.25, 0.75], 0.05, -8),
        (UniformGrid(8, "symmetric"), [-254.0, 1.0], 2.0, 0),
        (UniformGrid(8, "symmetric"), [0.5, 1.27], 0.01, 0),
        (UniformGrid(8, "symmetric", symmetric_scale="full"), [-0.1, 2.55], 0.02, 0),
        (UniformGrid(4, power_of_two_scale=True), [-0.5, 1.0], 0.125, -4),
        (UniformGrid(4, "symmetric", power_of_two_scale=True), [-0.5, 0.7], 0.125, 0),
        (UniformGrid(4, "symmetric", power_of_two_scale=True), [-0.5, 0.875], 0.125, 0),
    ],
)
def test_scales_and_zero_points_by_hand(grid, values, scale, zero_point):
    found = grid.qparams(torch.tensor([values]))
    assert found[0].item() == pytest.approx(scale)
    assert found[1].item() == zero_point


def test_powers_of_two_are_the_least_that_are_not_below():
    scales = torch.tensor([1.0, 1.0001, 2.0, 3.0, 0.25, 0.2500001, 1e-30, 2.0**-126])
    expected = [1.0, 2.0, 2.0, 4.0, 0.25, 0.5, 2.0**-99, 2.0**-126]
    assert next_power_of_two(scales).tolist() == expected
    assert next_power_of_two(scales.double()).dtype == torch.float64


def test_a_range_of_subnormals_stays_within_the_codes():
    """Their scale is rounded down by a third, and the zero point and the lowest value would lie beyond the codes."""
    tensor = torch.tensor([[-4 * 2.0**-149, 0.0]])
    codes, scale, zero_point = UniformGrid(2).quantize(tensor)
    assert scale.item() == 2.0**-149
    assert zero_point.item() == 1
    assert codes.tolist() == [[-2, 1]]


def test_a_range_of_one_sign_is_widened_to_zero():
    tensor = torch.tensor([[5.0, 6.0]])
    scale, zero_point = UniformGrid(2).qparams(tensor)
    assert scale.item() == 2
    assert zero_point.item() == -2


def test_every_group_has_a_scale_of_its_own():
    tensor = torch.tensor([[1.0, -1.0, 100.0, -100.0], [10.0, -10.0, 1000.0, -1000.0]])
    scales = {
        granularity: torch.cat(
            [
                UniformGrid(2, granularity=granularity, group_size=size).qparams(groups)[0]
                for groups in UniformGrid(2, granularity=granularity, group_size=size).groups(tensor)
            ]
        ).numel()
        for granularity, size in (("tensor", None), ("channel", None), ("group", 2))
    }
    assert scales == {"tensor": 1, "channel": 2, "group": 4}


@pytest.mark.parametrize(
    ("grid", "shape", "bits"),
    [
        (UniformGrid(2, granularity="tensor"), (4, 6), 24 * 2 + 34),
        (UniformGrid(2), (4, 6), 24 * 2 + 4 * 34),
        (UniformGrid(4, granularity="group", group_size=4), (4, 6), 24 * 4 + 8 * 36),
        (UniformGrid(8, "symmetric"), (4, 2, 3), 24 * 8 + 4 * 32),
        (UniformGrid(8, "symmetric", scale_bits=16), (4, 6), 24 * 8 + 4 * 16),
    ],
)
def test_stored_bits(grid, shape, bits):
    assert grid.stored_bits(torch.Size(shape)) == bits


def test_stored_bits_take_no_memory():
    assert UniformGrid(2).stored_bits(torch.Size((2**24, 2**24))) == 2**49 + 2**24 * 34


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"bits": 1}, "2 to 8 bits"),
        ({"bits": 9}, "2 to 8 bits"),
        ({"bits": 4.0}, "2 to 8 bits"),
        ({"bits": 4, "scheme": "sym"}, "choose affine or symmetric"),
        ({"bits": 4, "granularity": "row"}, "choose tensor, channel or group"),
        ({"bits": 4, "granularity": "group"}, "group_size"),
        ({"bits": 4, "group_size": 32}, "group_size"),
        ({"bits": 4, "granularity": "group", "group_size": 0}, "at least one value"),
    ],
)
def test_impossible_grids(options, problem):
    with pytest.raises(ConfigError, match=problem):
        UniformGrid(**options)


def test_it_is_a_grid():
    assert isinstance(UniformGrid(4), Grid)


def lowest_and_highest(grid: UniformGrid) -> tuple[int, int]:
    return grid.quant_min, grid.quant_max
