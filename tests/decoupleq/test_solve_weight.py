"""Solutions that a backend's plain rounding finds again."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from splitquant_plugins.decoupleq.alternation import SolveOptions
from splitquant_plugins.decoupleq.solve_weight import solve_weight
from splitquant_plugins.errors import ConfigError
from splitquant_plugins.grid import UniformGrid

FAST = SolveOptions(rounds=2, starts=(1.0,), sweeps=2, search_inputs=0)


def grids():
    found = [
        UniformGrid(bits, scheme, granularity, 8 if granularity == "group" else None, scale)
        for bits in (2, 3)
        for scheme, scale in (("affine", "restricted"), ("symmetric", "restricted"), ("symmetric", "full"))
        for granularity in ("tensor", "channel", "group")
    ]
    inc = pytest.importorskip("splitquant_inc.grid")
    found += [inc.IncRtnGrid(2, scheme, size) for scheme in ("affine", "symmetric") for size in (None, 8)]
    return [*found, inc.IncRtnGrid(2, "symmetric", None, True)]


def problem(rows, inputs, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, inputs, generator=generator)
    weight[:, 0] *= 3
    x = torch.randn(200, inputs, generator=generator) @ torch.randn(inputs, inputs, generator=generator)
    return weight, (x.T @ x / 200).double()


def error(weight, other, moment):
    difference = (other - weight).double()
    damped = moment + FAST.damping * moment.diagonal().mean() * torch.eye(len(moment))
    return float(((difference @ damped) * difference).sum())


@pytest.mark.parametrize("grid", grids(), ids=repr)
def test_plain_rounding_finds_the_solution_again(grid):
    weight, moment = problem(12, 20, 0)
    solution = solve_weight(weight, [weight], moment, grid, FAST)
    # Plain rounding can use one more code on these, where it happens to be right.
    lopsided = getattr(grid, "symmetric_scale", "") == "full" or getattr(grid, "full_range", False)
    assert solution.plain_rows <= (4 if lopsided else 0)
    (floats,), (rounded,) = solution.floats, solution.rounded
    assert torch.equal(grid.quantize_dequantize(floats), rounded)
    assert solution.error_before == pytest.approx(error(weight, grid.quantize_dequantize(weight), moment))
    assert solution.error_after == pytest.approx(error(weight, rounded, moment))
    assert solution.error_after < (0.8 if lopsided else 0.6) * solution.error_before
    if solution.plain_rows:
        return
    # These are the values of the solver's codes, scales and zeros.
    (values,) = solution.solver.values(solution.state.codes, solution.state.affine)
    assert (rounded - values).abs().max() < 0.01


@given(
    st.integers(0, 10_000),
    st.integers(1, 5),
    st.integers(1, 12),
    st.sampled_from(["tensor", "channel", "group"]),
    st.sampled_from(["affine", "symmetric"]),
)
def test_never_worse_than_plain_rounding_and_always_what_the_backend_does(seed, rows, inputs, granularity, scheme):
    weight, moment = problem(rows, inputs, seed)
    if seed % 3 == 0:
        weight[0] = 0
    if seed % 5 == 0:
        moment = torch.outer(moment[0], moment[0])  # singular
    grid = UniformGrid(2, scheme, granularity, 3 if granularity == "group" else None)
    solution = solve_weight(weight, [weight], moment, grid, FAST)
    assert solution.error_after <= solution.error_before * (1 + 1e-9)
    assert torch.equal(grid.quantize_dequantize(solution.floats[0]), solution.rounded[0])


@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
def test_parts_are_solved_for_their_sum(k, granularity):
    grid = UniformGrid(2, "symmetric", granularity, 10 if granularity == "group" else None)
    weight, moment = problem(8, 20, 1)
    parts = [torch.where(weight > 0, weight, 0.0), torch.where(weight > 0, 0.0, weight), torch.zeros_like(weight)][:k]
    solution = solve_weight(weight, parts, moment, grid, FAST)
    whole = solve_weight(weight, [weight], moment, grid, FAST)
    for floats, rounded in zip(solution.floats, solution.rounded, strict=True):
        assert torch.equal(grid.quantize_dequantize(floats), rounded)
    assert solution.error_after == pytest.approx(error(weight, sum(solution.rounded), moment))
    assert solution.error_after < 0.5 * whole.error_after < 0.5 * whole.error_before


def test_missing_ends_are_put_where_they_cost_least():
    """With one input that dwarfs the others, its code is never the one that is moved to an end."""
    weight = torch.full((1, 8), 0.34)
    weight[0, :4] = torch.tensor([0.3, 0.36, 0.33, 0.35])
    moment = torch.diag(torch.tensor([1e6, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1e-3], dtype=torch.float64))
    solution = solve_weight(weight, [weight], moment, UniformGrid(3, "affine", "channel"), FAST)
    assert solution.plain_rows == 0
    assert abs(float(solution.rounded[0][0, 0]) - 0.3) < 1e-3
    assert solution.error_after <= solution.error_before


def test_too_many_sums_are_refused_by_name():
    weight, moment = problem(2, 4, 0)
    with pytest.raises(ConfigError, match=r"head: 2 parts of 8 bits"):
        solve_weight(weight, [weight, weight], moment, UniformGrid(8), FAST, name="head")


def test_a_convolution_with_groups():
    torch.manual_seed(0)
    weight = torch.randn(6, 2, 3, 3)
    x = torch.randn(2, 100, 18)
    moment = (x.mT @ x / 100).double()
    grid = UniformGrid(2, "affine", "channel")
    solution = solve_weight(weight, [weight], moment, grid, FAST)
    assert solution.floats[0].shape == weight.shape
    assert solution.error_after < 0.8 * solution.error_before
    # Each half of the rows is solved for its own inputs.
    alone = solve_weight(weight[3:], [weight[3:]], moment[1], grid, FAST)
    assert torch.equal(alone.rounded[0], solution.rounded[0][3:])
