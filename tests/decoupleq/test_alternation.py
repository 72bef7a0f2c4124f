"""The layer stage: close to the true optimum where that can be known, monotone, robust everywhere.

Parts are better solved together than one after the other.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from splitquant_plugins.decoupleq.alternation import SolveOptions, best_state
from splitquant_plugins.decoupleq.objective import problem_of
from splitquant_plugins.decoupleq.parts import Parts
from splitquant_plugins.decoupleq.solve_weight import solve_weight
from splitquant_plugins.decoupleq.solver_grid import Affine, SolverGrid
from splitquant_plugins.errors import ConfigError, InputError
from splitquant_plugins.grid import UniformGrid

DEFAULT = SolveOptions()
FREE = SolverGrid(0, 3)
TENSOR_SYMMETRIC = SolverGrid(-1, 1, "none", "tensor")
GRIDS = [
    FREE,
    SolverGrid(0, 7, "integer"),
    SolverGrid(-1, 1, "none"),
    SolverGrid(-2, 1, "none"),
    SolverGrid(0, 3, "free", "group", 4),
    SolverGrid(0, 3, "integer", "group", 5),
    SolverGrid(-3, 3, "none", "group", 5),
    SolverGrid(0, 3, "free", "tensor"),
    SolverGrid(0, 3, "integer", "tensor"),
    TENSOR_SYMMETRIC,
]
GRIDS_OF_PARTS = [
    FREE,
    SolverGrid(0, 3, "integer"),
    SolverGrid(-2, 1, "none"),
    SolverGrid(0, 3, "integer", "group", 5),
    SolverGrid(0, 3, "free", "group", 4),
    TENSOR_SYMMETRIC,
    SolverGrid(0, 3, "free", "tensor"),
]


@dataclass(frozen=True)
class Solution:
    """What was found: the values [out, d], and codes, scales and zeros of each part."""

    values: Tensor
    codes: Tensor
    affines: list[Affine]
    error_after: float
    trace: list[float]

    @property
    def error_before(self) -> float:
        return self.trace[0]


def solve(
    weight: Tensor, moment: Tensor, grid: SolverGrid, options: SolveOptions | None = None, k: int = 1
) -> Solution:
    options = options or SolveOptions()
    parts = Parts(problem_of(weight, moment, options.damping), grid, k, options)
    with torch.no_grad():
        state, trace = best_state(parts, options)
        values = torch.stack(parts.values(state.codes, state.affine)).sum(dim=0)
    affines = [parts.affine_of(state.affine, part) for part in range(k)]
    return Solution(values, state.codes, affines, state.total, trace)


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


def true_optimum(weight: Tensor, moment: Tensor, grid: SolverGrid, damping: float) -> float:
    """Error of the best codes with their best scale and zero, by trying all codes of a single row."""
    damped = moment + damping * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype)
    # With R from H = RᵀR, the error is a plain least-squares one in the columns R q and R 1.
    root = torch.linalg.cholesky(damped).T
    target = root @ weight.double()[0]
    codes = torch.cartesian_prod(*[torch.arange(grid.quant_min, grid.quant_max + 1)] * len(moment))
    best = float(target @ target)
    if grid.zero == "free":
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
@pytest.mark.parametrize("grid", [FREE, SolverGrid(0, 3, "integer"), SolverGrid(-1, 1, "none")], ids=str)
def test_short_rows_are_near_the_true_optimum(grid: SolverGrid, damping: float) -> None:
    near = []
    for seed in range(20):
        columns = 3 + seed % 6
        # Half of the moments are singular but for the damping.
        weight, moment = problem(seed, 1, columns, samples=max(columns // 2, 1) if seed % 2 else 3 * columns)
        solution = solve(weight, moment, grid, SolveOptions(damping=damping))
        optimum = true_optimum(weight, moment, grid, damping)
        found = error(solution.values - weight, moment, damping)
        assert found >= optimum * (1 - 1e-4) - 1e-9
        near.append(found <= optimum * 1.05 + 1e-6 * float(moment.diagonal().mean()))
    assert sum(near) >= 0.95 * len(near)


def test_nine_inputs_are_near_the_true_optimum() -> None:
    """More codes than are tried one by one: the search has to find them."""
    near = []
    for seed in range(10):
        weight, moment = problem(100 + seed, 1, 9, samples=5 + 10 * seed)
        solution = solve(weight, moment, FREE)
        near.append(solution.error_after <= 1.05 * true_optimum(weight, moment, FREE, 0.01))
    assert sum(near) >= 9


def test_rows_solved_together_are_as_good_as_alone() -> None:
    weight, moment = problem(7, 40, 8, samples=30)
    together = solve(weight, moment, FREE).values
    for row in (0, 31, 39):
        optimum = true_optimum(weight[row : row + 1], moment, FREE, 0.01)
        assert error(together[row : row + 1] - weight[row : row + 1], moment) <= optimum * (1 + 1e-4)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@settings(max_examples=4, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 6),
    columns=st.integers(1, 24),
    samples=st.integers(1, 40),
)
def test_properties_on_any_problem(grid: SolverGrid, seed: int, rows: int, columns: int, samples: int) -> None:
    weight, moment = problem(seed, rows, columns, samples)
    solution = solve(weight, moment, grid)
    (affine,) = solution.affines
    assert solution.codes.shape == (1, *weight.shape)
    assert int(solution.codes.min()) >= grid.quant_min
    assert int(solution.codes.max()) <= grid.quant_max
    assert (affine.scale > 0).all()
    assert all(a >= b for a, b in itertools.pairwise(solution.trace))
    reference = error(weight, moment)
    assert solution.error_after == pytest.approx(
        error(solution.values - weight, moment), rel=1e-3, abs=1e-6 * reference
    )
    assert solution.error_after <= solution.error_before
    groups = 1 if grid.group_size is None else -(-columns // grid.group_size)
    assert affine.scale.shape == ((1, 1) if grid.granularity == "tensor" else (rows, groups))
    if grid.zero != "free":
        assert_zero_is_exact(grid, affine)


def assert_zero_is_exact(grid: SolverGrid, affine: Affine) -> None:
    zero_point = torch.round(-affine.zero / affine.scale)
    assert (zero_point >= grid.quant_min).all()
    assert (zero_point <= grid.quant_max).all()
    assert not (affine.scale * zero_point + affine.zero).any()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_much_better_than_rounding_to_nearest(grid: SolverGrid) -> None:
    weight, moment = problem(7, 16, 60, samples=200)
    solution = solve(weight, moment, grid)
    assert solution.error_after < 0.5 * solution.error_before


def test_projected_rounding_is_better_than_nearest_with_the_same_scales() -> None:
    weight, moment = problem(3, 16, 40, samples=100)
    projected = solve(weight, moment, FREE, SolveOptions(rounding="projected", sweeps=0))
    shrunk = projected.trace[1]
    assert projected.error_after < 0.6 * shrunk


def test_more_starts_and_sweeps_never_hurt() -> None:
    weight, moment = problem(5, 12, 40, samples=30)
    one = solve(weight, moment, FREE, SolveOptions(starts=(1.0,)))
    three = solve(weight, moment, FREE, SolveOptions(starts=(1.0, 0.8, 1.2)))
    bare = solve(weight, moment, FREE, SolveOptions(starts=(1.0,), rounds=1, sweeps=0))
    swept = solve(weight, moment, FREE, SolveOptions(starts=(1.0,), rounds=1, sweeps=4))
    assert three.error_after <= one.error_after
    assert swept.trace[-1] < bare.trace[-1]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_values_on_the_grid_are_found_again(grid: SolverGrid) -> None:
    # Random codes with one scale; every row and group has the lowest and the highest.
    _, moment = problem(11, 4, 12, samples=50)
    codes = torch.randint(grid.quant_min, grid.quant_max + 1, (4, 12), generator=torch.Generator().manual_seed(0))
    codes[:, ::5], codes[:, 1::5] = grid.quant_min, grid.quant_max
    weight = 0.25 * (codes - (0 if grid.zero == "none" else 1)).float()
    solution = solve(weight, moment, grid)
    assert solution.error_after <= 1e-4 * error(weight, moment)


def test_groups_of_rows_with_inputs_of_their_own() -> None:
    weight, first = problem(0, 6, 9, samples=20)
    _, second = problem(1, 6, 9, samples=20)
    together = solve(weight, torch.stack([first, second]), FREE, SolveOptions(search_inputs=0))
    apart = [
        solve(rows, moment, FREE, SolveOptions(search_inputs=0, tolerance=0))
        for rows, moment in ((weight[:3], first), (weight[3:], second))
    ]
    assert together.error_after == pytest.approx(sum(part.error_after for part in apart), rel=0.05)
    # One scale for a tensor whose rows see different inputs.
    shared = solve(weight, torch.stack([first, second]), SolverGrid(0, 3, "free", "tensor"))
    assert shared.affines[0].scale.shape == (1, 1)
    values = shared.values - weight
    assert shared.error_after == pytest.approx(error(values[:3], first) + error(values[3:], second), rel=1e-3)


def test_zero_rows_dead_inputs_and_no_data() -> None:
    weight, moment = problem(2, 3, 30, samples=10)
    weight[1] = 0
    moment[4], moment[:, 4] = 0, 0
    for grid in GRIDS:
        solution = solve(weight, moment, grid)
        assert torch.isfinite(solution.values).all()
        if grid.granularity != "tensor":
            assert not solution.values[1].any()
        nothing = solve(weight, torch.zeros(30, 30), grid)
        assert nothing.error_after == pytest.approx(float((nothing.values - weight).double().square().sum()), rel=1e-4)
        assert not solve(torch.zeros(3, 30), moment, grid).values.any()


def test_same_input_same_answer() -> None:
    weight, moment = problem(4, 5, 12, samples=6)
    for k in (1, 2):
        first, second = (solve(weight, moment, FREE, k=k) for _ in range(2))
        assert torch.equal(first.codes, second.codes)
        assert torch.equal(first.affines[0].scale, second.affines[0].scale)
        assert first.trace == second.trace


def test_bad_input_names_the_layer() -> None:
    weight, moment = problem(0, 2, 4, samples=9)
    broken = weight.clone()
    broken[0, 0] = torch.nan
    with pytest.raises(InputError, match=r"encoder\.q: the weight contains NaN"):
        solve_weight(broken, [broken], moment, UniformGrid(2), name="encoder.q")
    with pytest.raises(InputError, match="second moment contains NaN"):
        solve_weight(weight, [weight], moment * torch.inf, UniformGrid(2))
    with pytest.raises(InputError, match="does not fit"):
        solve_weight(weight, [weight], moment[:3, :3], UniformGrid(2))
    with pytest.raises(InputError, match="does not fit"):
        solve_weight(weight, [weight], torch.stack([moment] * 3), UniformGrid(2))
    with pytest.raises(InputError, match="neither of them 0"):
        solve_weight(weight[:0], [weight[:0]], moment, UniformGrid(2))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"rounding": "best"}, "rounding"), ({"starts": ()}, "starts"), ({"damping": -1.0}, "damping=-1.0")],
)
def test_impossible_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SolveOptions(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("grid", GRIDS_OF_PARTS, ids=str)
@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 2**31), rows=st.integers(1, 4), columns=st.integers(1, 14), k=st.integers(1, 3))
def test_properties_of_parts_on_any_problem(grid: SolverGrid, seed: int, rows: int, columns: int, k: int) -> None:
    weight, moment = problem(seed, rows, columns, samples=9)
    solution = solve(weight, moment, grid, k=k)
    assert len(solution.codes) == len(solution.affines) == k
    assert int(solution.codes.min()) >= grid.quant_min
    assert int(solution.codes.max()) <= grid.quant_max
    for affine in solution.affines:
        assert (affine.scale > 0).all()
        if grid.zero != "free":
            assert_zero_is_exact(grid, affine)  # a backend keeps the exact 0 of every part
    assert all(a >= b for a, b in itertools.pairwise(solution.trace))
    reference = error(weight, moment)
    difference = solution.values - weight
    assert solution.error_after == pytest.approx(error(difference, moment), rel=1e-2, abs=1e-5 * reference)
    assert solution.error_after <= solution.error_before + 1e-5 * reference


@pytest.mark.parametrize("grid", GRIDS_OF_PARTS, ids=str)
def test_better_than_one_part_after_the_other(grid: SolverGrid) -> None:
    weight, moment = problem(5, 8, 40, samples=120)
    together = solve(weight, moment, grid, k=2)
    first = solve(weight, moment, grid)
    second = solve(weight - first.values, moment, grid)
    assert together.error_after < second.error_after
    three = solve(weight, moment, grid, k=3)
    assert three.error_after < 0.5 * together.error_after


def test_the_scales_are_solved_together() -> None:
    # Codes -1, 0, 1 twice with scales 1 and 0.4: not digits of one uniform grid, where it starts.
    _, moment = problem(3, 1, 24, samples=60)
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(-1, 2, (2, 6, 24), generator=generator).float()
    weight = codes[0] + 0.4 * codes[1]
    solution = solve(weight, moment, TENSOR_SYMMETRIC, k=2)
    assert solution.error_after < 1e-3 * error(weight, moment)
    assert sorted(affine.scale.item() for affine in solution.affines) == pytest.approx([0.4, 1.0], rel=1e-2)


def test_parts_of_groups_of_rows_with_inputs_of_their_own() -> None:
    weight, first = problem(0, 6, 9, samples=20)
    _, second = problem(1, 6, 9, samples=20)
    for grid in (FREE, TENSOR_SYMMETRIC):
        solution = solve(weight, torch.stack([first, second]), grid, k=2)
        difference = solution.values - weight
        expected = error(difference[:3], first) + error(difference[3:], second)
        assert solution.error_after == pytest.approx(expected, rel=1e-3)
        assert solution.error_after < 0.1 * error(weight[:3], first) + 0.1 * error(weight[3:], second)


def test_zero_rows_stay_zero_in_all_parts() -> None:
    weight, moment = problem(2, 3, 30, samples=10)
    weight[1] = 0
    for grid in GRIDS_OF_PARTS[:5]:
        assert not solve(weight, moment, grid, k=2).values[1].any()
