"""The layer stage: close to the true optimum where that can be known, monotone, robust everywhere."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from splitquant_plugins.decoupleq import SolveOptions, ValueGrid, solve_layer
from splitquant_plugins.errors import ConfigError, InputError

GRIDS = [
    ValueGrid(2),
    ValueGrid(3, zero="integer"),
    ValueGrid(2, zero="none"),
    ValueGrid(2, zero="none", full_range=True),
    ValueGrid(2, "group", 4),
    ValueGrid(2, "group", 5, zero="integer"),
    ValueGrid(3, "group", 5, zero="none"),
    ValueGrid(2, "tensor"),
    ValueGrid(2, "tensor", zero="integer"),
    ValueGrid(2, "tensor", zero="none"),
]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    # The tensors are tiny: threads would only wait for each other.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def problem(seed: int, rows: int, columns: int, samples: int) -> tuple[Tensor, Tensor]:
    """A random weight and the second moment of correlated Gaussian inputs."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    inputs = torch.randn(samples, columns, generator=generator, dtype=torch.float64) @ mixing
    return torch.randn(rows, columns, generator=generator), inputs.T @ inputs / samples


def error(difference: Tensor, moment: Tensor, damping: float = 0.01) -> float:
    damped = moment + damping * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype)
    return float(torch.einsum("ri,ij,rj->", difference.double(), damped, difference.double()))


def true_optimum(weight: Tensor, moment: Tensor, grid: ValueGrid, damping: float) -> float:
    """Error of the best codes with their best scale and zero, by trying all codes of a single row."""
    low, high = grid.code_range
    damped = moment + damping * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype)
    # With R from H = RᵀR, the error is a plain least-squares one in the columns R q and R 1.
    root = torch.linalg.cholesky(damped).T
    target = root @ weight.double()[0]
    codes = torch.tensor(list(itertools.product(range(low, high + 1), repeat=len(moment))))
    best = float(target @ target)
    if grid.zero == "float":
        ones = root.sum(dim=1)
        ones = ones / ones.norm()
        directions = codes.double() @ root.T
        directions = directions - torch.outer(directions @ ones, ones)
        target = target - (target @ ones) * ones
        shifted = [directions]
    else:
        shifted = [(codes - point).double() @ root.T for point in grid.zero_points]
    for directions in shifted:
        norms = directions.square().sum(dim=1)
        along = (directions @ target).clamp(min=0)
        errors = target @ target - torch.where(norms > 1e-12, along.square() / norms, 0.0)
        best = min(best, float(errors.min()))
    return best


@pytest.mark.parametrize("damping", [0.01, 1e-6])
@pytest.mark.parametrize("zero", ["float", "integer", "none"])
def test_short_rows_are_near_the_true_optimum(zero: str, damping: float) -> None:
    grid = ValueGrid(2, zero=zero)  # type: ignore[arg-type]
    near = []
    for seed in range(20):
        columns = 3 + seed % 6
        # Half of the moments are singular but for the damping.
        weight, moment = problem(seed, 1, columns, samples=max(columns // 2, 1) if seed % 2 else 3 * columns)
        solution = solve_layer(weight, moment, grid, SolveOptions(damping=damping))
        optimum = true_optimum(weight, moment, grid, damping)
        found = error(solution.dequantize() - weight, moment, damping)
        assert found >= optimum * (1 - 1e-4) - 1e-9
        near.append(found <= optimum * 1.05 + 1e-6 * float(moment.diagonal().mean()))
    assert sum(near) >= 0.95 * len(near)


def test_nine_inputs_are_near_the_true_optimum() -> None:
    """More codes than are tried one by one: the search has to find them."""
    near = []
    for seed in range(10):
        weight, moment = problem(100 + seed, 1, 9, samples=5 + 10 * seed)
        solution = solve_layer(weight, moment, ValueGrid(2))
        near.append(solution.error_after <= 1.05 * true_optimum(weight, moment, ValueGrid(2), 0.01))
    assert sum(near) >= 9


def test_rows_solved_together_are_as_good_as_alone() -> None:
    weight, moment = problem(7, 40, 8, samples=30)
    together = solve_layer(weight, moment, ValueGrid(2)).dequantize()
    for row in (0, 31, 39):
        optimum = true_optimum(weight[row : row + 1], moment, ValueGrid(2), 0.01)
        assert error(together[row : row + 1] - weight[row : row + 1], moment) <= optimum * (1 + 1e-4)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@settings(max_examples=4, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 6),
    columns=st.integers(1, 24),
    samples=st.integers(1, 40),
)
def test_properties_on_any_problem(grid: ValueGrid, seed: int, rows: int, columns: int, samples: int) -> None:
    weight, moment = problem(seed, rows, columns, samples)
    solution = solve_layer(weight, moment, grid)
    low, high = grid.code_range
    assert solution.codes.shape == weight.shape
    assert int(solution.codes.min()) >= low
    assert int(solution.codes.max()) <= high
    assert (solution.scale > 0).all()
    assert all(a >= b for a, b in itertools.pairwise(solution.trace))
    values = solution.dequantize()
    assert values.dtype == torch.float32
    reference = error(weight, moment)
    assert solution.error_after == pytest.approx(error(values - weight, moment), rel=1e-3, abs=1e-6 * reference)
    # Storing scales as float32 may cost a last digit.
    assert solution.error_after <= solution.error_before + 1e-6 * reference
    assert solution.error_before == pytest.approx(solution.trace[0])
    cells = 1 if grid.group_size is None else -(-columns // grid.group_size)
    assert solution.scale.shape == ((1, 1) if grid.granularity == "tensor" else (rows, cells))
    if grid.zero != "float":
        assert (solution.zero_point >= low).all()
        assert (solution.zero_point <= high).all()
        at_zero = solution.scale * solution.zero_point + solution.zero
        assert not at_zero.any()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_much_better_than_rounding_to_nearest(grid: ValueGrid) -> None:
    weight, moment = problem(7, 16, 60, samples=200)
    solution = solve_layer(weight, moment, grid)
    assert solution.error_after < 0.5 * solution.error_before


def test_projected_rounding_is_better_than_nearest_with_the_same_scales() -> None:
    weight, moment = problem(3, 16, 40, samples=100)
    projected = solve_layer(weight, moment, ValueGrid(2), SolveOptions(rounding="projected", sweeps=0))
    shrunk = projected.trace[1]
    assert projected.error_after < 0.6 * shrunk


def test_more_starts_and_sweeps_never_hurt() -> None:
    weight, moment = problem(5, 12, 40, samples=30)
    one = solve_layer(weight, moment, ValueGrid(2), SolveOptions(starts=(1.0,)))
    three = solve_layer(weight, moment, ValueGrid(2), SolveOptions(starts=(1.0, 0.8, 1.2)))
    bare = solve_layer(weight, moment, ValueGrid(2), SolveOptions(starts=(1.0,), rounds=1, sweeps=0))
    swept = solve_layer(weight, moment, ValueGrid(2), SolveOptions(starts=(1.0,), rounds=1, sweeps=4))
    assert three.error_after <= one.error_after
    assert swept.trace[-1] < bare.trace[-1]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_values_on_the_grid_are_found_again(grid: ValueGrid) -> None:
    # Random codes with one scale; every row and group has the lowest and the highest.
    _, moment = problem(11, 4, 12, samples=50)
    low, high = grid.code_range
    codes = torch.randint(low, high + 1, (4, 12), generator=torch.Generator().manual_seed(0))
    codes[:, ::5], codes[:, 1::5] = low, high
    weight = 0.25 * (codes - (0 if grid.zero == "none" else 1)).float()
    solution = solve_layer(weight, moment, grid)
    assert solution.error_after <= 1e-4 * error(weight, moment)


def test_groups_of_rows_with_inputs_of_their_own() -> None:
    weight, first = problem(0, 6, 9, samples=20)
    _, second = problem(1, 6, 9, samples=20)
    together = solve_layer(weight, torch.stack([first, second]), ValueGrid(2), SolveOptions(search_inputs=0))
    apart = [
        solve_layer(rows, moment, ValueGrid(2), SolveOptions(search_inputs=0, tolerance=0))
        for rows, moment in ((weight[:3], first), (weight[3:], second))
    ]
    assert together.error_after == pytest.approx(sum(part.error_after for part in apart), rel=0.05)
    # One scale for a tensor whose rows see different inputs.
    shared = solve_layer(weight, torch.stack([first, second]), ValueGrid(2, "tensor"))
    assert shared.scale.shape == (1, 1)
    values = shared.dequantize() - weight
    assert shared.error_after == pytest.approx(error(values[:3], first) + error(values[3:], second), rel=1e-3)


def test_zero_rows_dead_inputs_and_no_data() -> None:
    weight, moment = problem(2, 3, 30, samples=10)
    weight[1] = 0
    moment[4], moment[:, 4] = 0, 0
    for grid in GRIDS:
        solution = solve_layer(weight, moment, grid)
        assert torch.isfinite(solution.dequantize()).all()
        if grid.granularity != "tensor":
            assert not solution.dequantize()[1].any()
        nothing = solve_layer(weight, torch.zeros(30, 30), grid)
        assert nothing.error_after == pytest.approx(
            float((nothing.dequantize() - weight).double().square().sum()), rel=1e-4
        )
        assert not solve_layer(torch.zeros(3, 30), moment, grid).dequantize().any()


def test_same_input_same_answer() -> None:
    weight, moment = problem(4, 5, 12, samples=6)
    first, second = (solve_layer(weight, moment, ValueGrid(2)) for _ in range(2))
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.scale, second.scale)
    assert first.trace == second.trace


def test_bad_input_names_the_layer() -> None:
    weight, moment = problem(0, 2, 4, samples=9)
    broken = weight.clone()
    broken[0, 0] = torch.nan
    with pytest.raises(InputError, match=r"encoder\.q: the weight contains NaN"):
        solve_layer(broken, moment, ValueGrid(2), name="encoder.q")
    with pytest.raises(InputError, match="second moment contains NaN"):
        solve_layer(weight, moment * torch.inf, ValueGrid(2))
    with pytest.raises(InputError, match="does not fit"):
        solve_layer(weight, moment[:3, :3], ValueGrid(2))
    with pytest.raises(InputError, match="does not fit"):
        solve_layer(weight, torch.stack([moment] * 3), ValueGrid(2))
    with pytest.raises(InputError, match="neither of them 0"):
        solve_layer(weight[:0], moment, ValueGrid(2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 1}, "bits=1"),
        ({"bits": 2, "granularity": "channel"}, "choose row, group or tensor"),
        ({"bits": 2, "granularity": "group"}, "group_size goes with"),
        ({"bits": 2, "granularity": "group", "group_size": 0}, "group_size=0"),
        ({"bits": 2, "zero": "half"}, "zero='half'"),
        ({"bits": 2, "full_range": True}, "full_range"),
    ],
)
def test_impossible_grids(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ValueGrid(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"rounding": "best"}, "rounding"), ({"starts": ()}, "starts"), ({"damping": -1.0}, "damping=-1.0")],
)
def test_impossible_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SolveOptions(**options)  # type: ignore[arg-type]


def test_a_free_zero_has_no_zero_point() -> None:
    weight, moment = problem(0, 2, 4, samples=9)
    with pytest.raises(ConfigError, match="no integer zero point"):
        _ = solve_layer(weight, moment, ValueGrid(2)).zero_point
