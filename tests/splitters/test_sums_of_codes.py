"""The compiled loops of `grid` beside plain specifications: pricing, look-up, parts, and their odd inputs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from splitquant_plugins.grid import UniformGrid
from splitquant_plugins.passes.checks import check_parts
from splitquant_plugins.plan import TensorPlan
from splitquant_plugins.solvers.rounding_error import weight_error
from splitquant_plugins.splitters._joint import joint_parts, levels, realise, rules_of, search
from splitquant_plugins.splitters._pricing import bin_group, frame_group, price, price_values, sorted_sums
from splitquant_plugins.splitters._shapes import shapes
from splitquant_plugins.splitters._sum_parts import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    complete_one,
    digits_in_order,
    force_pins,
    halving,
    nearest_sums,
    nearest_unsorted,
    pins_of,
    rounded,
    tabulate,
)
from splitquant_plugins.splitters.residual import ResidualOptions, ResidualSplitter

KINDS = {FLOAT32: torch.float32, FLOAT16: torch.float16, BFLOAT16: torch.bfloat16}
GRIDS = [
    UniformGrid(2, "affine", "channel"),
    UniformGrid(2, "symmetric", "channel"),
    UniformGrid(2, "symmetric", "channel", symmetric_scale="full"),
    UniformGrid(3, "affine", "channel"),
]
scales = st.lists(st.floats(1e-3, 1.0), min_size=1, max_size=3)
numbers = st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=40)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def heavy(*shape: int, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    return torch.distributions.StudentT(torch.tensor(4.0)).sample(shape) * 0.05


@settings(deadline=None)
@given(scale=scales, width=st.integers(1, 5))
def test_sums_are_all_there_and_in_order(scale: list[float], width: int) -> None:
    codes, k = np.arange(-1.0, width - 1).reshape(1, -1), len(scale)
    room = np.empty((2, width**k))
    found = sorted_sums(codes, np.zeros(k, np.int64), np.array(scale), room[0], room[1])
    wanted = sorted(sum(one) for one in itertools.product(*(codes[0] * s for s in scale)))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-12)


@settings(deadline=None)
@given(values=numbers, places=st.lists(st.floats(-1.2, 1.2), min_size=1, max_size=9))
def test_a_price_is_the_error_of_the_nearest_levels(values: list[float], places: list[float]) -> None:
    given_values, lines = np.array([*values, 1.0], np.float32), np.sort(places)
    frame, table = np.empty(8), np.empty((1 << 14, 2))
    bin_group(given_values, frame, table)
    scaled = given_values.astype(np.float64) / np.abs(given_values).max()
    wanted = (np.abs(scaled[:, None] - lines).min(axis=1) ** 2).sum()
    # values within a bin of a middle may go to the other level
    assert wanted - 1e-9 <= price(lines, frame, table) <= wanted + 2e-3 * len(given_values)


@settings(deadline=None)
@given(values=numbers, scale=scales, width=st.integers(1, 5), lowest=st.integers(-4, 0))
def test_a_short_group_is_priced_value_by_value(
    values: list[float], scale: list[float], width: int, lowest: int
) -> None:
    given_values, k = np.array([*values, 1.0], np.float32), len(scale)
    codes = np.arange(float(lowest), lowest + width).reshape(1, -1)
    frame, short, room = np.empty(8), np.empty((2, len(given_values)), np.float32), np.empty((2, width**k))
    frame_group(given_values, frame, short)
    peak = np.abs(given_values).max()
    assert frame[0] == peak
    scaled = given_values.astype(np.float64) / peak
    assert (frame[1], frame[2], frame[6]) == (scaled.min(), scaled.max(), min(scaled.min(), 0.0))
    lines = np.array([sum(one) for one in itertools.product(*(codes[0] * s for s in scale))])
    wanted = (np.abs(scaled[:, None] - lines).min(axis=1) ** 2).sum()
    found = price_values(codes, np.zeros(k, np.int64), np.array(scale), short, room)
    assert found == pytest.approx(wanted, rel=1e-3, abs=1e-6 * len(values))


@settings(deadline=None)
@given(weight=st.floats(-3, 3), sums=st.lists(st.floats(-1, 1), min_size=1, max_size=70))
def test_the_nearest_sum_is_looked_up(weight: float, sums: list[float]) -> None:
    lines = np.sort(sums)
    middles = np.append((lines[1:] + lines[:-1]) / 2, np.inf)
    places = np.full(2, 5, np.uint64)
    nearest_sums(np.array([weight, np.nan]), halving(middles), places)
    found = int(places[0])
    assert places[1] == 0
    assert abs(weight - lines[found]) <= np.abs(weight - lines).min() * (1 + 1e-12) + 1e-300


@settings(deadline=None)
@given(weights=numbers, scale=scales, width=st.integers(1, 5), repeated=st.booleans())
def test_the_nearest_sum_is_found_unsorted(
    weights: list[float], scale: list[float], width: int, repeated: bool
) -> None:
    codes = np.arange(-1.0, width - 1)
    codes[-1] -= repeated and width > 2  # as shapes of fewer codes have them
    table, weight = np.outer(scale, codes), np.array(weights)
    places = np.empty(len(weight), np.uint64)
    nearest_unsorted(weight, table, places, *np.empty((2, len(weight))))
    taken = table[np.arange(len(scale)), digits_in_order(width, len(scale))[places.astype(int)]].sum(axis=1)
    lines = np.array([sum(one) for one in itertools.product(*table)])
    least = np.abs(weight[:, None] - lines).min(axis=1)
    np.testing.assert_allclose(np.abs(weight - taken), least, rtol=1e-9, atol=1e-12)


@settings(deadline=None)
@given(value=st.floats(-1e38, 1e38) | st.floats(-1, 1) | st.floats(-1e-6, 1e-6) | st.floats(-1e-38, 1e-38))
@pytest.mark.parametrize("kind", KINDS)
def test_rounding_to_a_dtype_is_nearest(kind: int, value: float) -> None:
    dtype = KINDS[kind]
    wanted = torch.tensor(value, dtype=torch.float64).to(dtype).double()
    if torch.isinf(wanted):
        return
    got = torch.tensor(rounded(value, kind), dtype=torch.float64)
    assert got == got.to(dtype).double()
    assert abs(got - value) == abs(wanted - value)  # ties may go either way


@settings(deadline=None)
@given(
    weight=st.floats(-1e4, 1e4, width=16) | st.floats(-1, 1, width=16),
    parts=st.lists(st.floats(-1e5, 1e5) | st.floats(-2, 2), min_size=2, max_size=4),
)
@pytest.mark.parametrize("kind", [FLOAT32, FLOAT16])
def test_completed_parts_pass_the_check(kind: int, weight: float, parts: list[float]) -> None:
    part = np.array(parts)
    complete_one(weight, part, kind)
    tensors = [torch.tensor([one], dtype=KINDS[kind]) for one in part]
    assert [one.double().item() for one in tensors] == part.tolist()
    check_parts("layer.weight", torch.tensor([weight], dtype=KINDS[kind]), tensors, len(parts))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("k", [2, 3])
def test_any_number_of_threads_gives_the_same_parts(grid: UniformGrid, k: int, threads: None) -> None:
    weight = heavy(100, 160)
    tensors = [weight, weight.reshape(1, -1)]  # many groups, and one that is cut into pieces
    found = []
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        found.append([joint_parts(tensor, grid, shapes(grid), k) for tensor in tensors])
    for others in found[1:]:
        for one, other in zip(found[0], others, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("length", [400, 30_000])
def test_every_end_is_held_by_a_weight_of_its_own(grid: UniformGrid, length: int) -> None:
    """Also where the extremes are few values that occur often, of which each may hold one end only."""
    weight = heavy(1, length)
    weight[0, ::7] = weight.max()
    weight[0, 1::7] = weight.min()
    rules = rules_of(shapes(grid))
    books = search(weight, rules, 3)
    for part, scale in zip(realise(weight, rules, books), books.scale[0], strict=True):
        assert float(grid.qparams(part)[0]) == pytest.approx(scale, rel=1e-5)


def test_forced_pins_take_different_weights() -> None:
    grid = GRIDS[0]
    rules = rules_of(shapes(grid))
    weight = heavy(1, 64)
    books = search(weight, rules, 3)
    sums, middles, _, table = tabulate(rules.codes, rules.spans, books.shape[0], books.scale[0])
    pins = pins_of(rules.pins, books.shape[0], books.scale[0])
    held = np.full(pins.shape[:2], -1)
    looked_up = np.empty(0)
    index, changed = force_pins(weight[0].numpy(), sums, middles, looked_up, table, pins, rules.either, FLOAT32, held)
    wanted = ~np.isnan(pins[:, :, 0])
    assert len(set(held[wanted])) == wanted.sum() > 3
    for j, p in np.argwhere(wanted):
        at = int(np.flatnonzero(index == held[j, p])[-1])
        assert changed[j, at] == pytest.approx(pins[j, p, 0], rel=1e-5)
        assert changed[:, at].sum() == pytest.approx(float(weight[0, held[j, p]]), abs=1e-6)


ODD = {
    "zero": torch.zeros(3, 16),
    "constant": torch.full((3, 16), 0.3),
    "one value among zeros": torch.eye(3, 16),
    "huge": torch.linspace(-1, 1, 48).reshape(3, 16) * 3e38,
    "tiny": torch.linspace(-1, 1, 48).reshape(3, 16) * 1e-37,
    "denormal": torch.linspace(-1, 1, 48).reshape(3, 16) * 1e-43,
    "two values": torch.tensor([[0.5, -2.0] * 8] * 3),
    "one": torch.tensor([[0.7]]),
}


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_odd_groups(grid: UniformGrid, name: str, dtype: torch.dtype) -> None:
    weight = ODD[name].to(dtype)
    if not bool(torch.isfinite(weight).all()):
        weight = ODD[name].clamp(-65504, 65504).to(dtype)
    for k in (2, 3):
        parts = joint_parts(weight, grid, shapes(grid), k)
        assert all(bool(torch.isfinite(part).all()) for part in parts)
        check_parts("layer.weight", weight, parts, k)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parts_of_16_bits_are_numbers_of_16_bits(dtype: torch.dtype) -> None:
    weight = heavy(8, 300).to(dtype)
    parts = joint_parts(weight, GRIDS[0], shapes(GRIDS[0]), 3)
    assert {part.dtype for part in parts} == {dtype}
    check_parts("layer.weight", weight, parts, 3)


def test_levels_are_sums_and_nearest_is_the_nearest() -> None:
    weight, rules = heavy(5, 90), rules_of(shapes(GRIDS[0]))
    sums = levels(rules, search(weight, rules, 2), 90)
    wanted = (weight.double().unsqueeze(2) - sums.table.unsqueeze(1)).abs().amin(dim=2)
    got = (weight.double() - sums.values(sums.nearest(weight))).abs()
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-9)
    assert sums.low is not None
    assert sums.high is not None
    assert bool((sums.low <= sums.table).all())
    assert bool((sums.table <= sums.high).all())


def test_many_groups_are_as_good_as_each_by_itself() -> None:
    """A library of starts costs little: groups searched by themselves are hardly better."""
    weight, rules = heavy(384, 64), rules_of(shapes(GRIDS[0]))
    together = search(weight, rules, 2).error.sum()
    alone = sum(search(weight[at : at + 16], rules, 2).error.sum() for at in range(0, 384, 16))
    assert together < 1.05 * alone


@pytest.mark.parametrize("scheme", ["affine", "symmetric"])
def test_two_parts_of_8_bits_one_after_the_other_are_a_plain_grid_of_16(scheme: str) -> None:
    """More sums than are searched: steps below those of any 16 even bits would need a range that is not covered."""
    weight = heavy(16, 2048)
    grid = UniformGrid(8, scheme, "channel")  # type: ignore[arg-type]
    plain = UniformGrid(8, scheme, "channel")  # type: ignore[arg-type]
    object.__setattr__(plain, "bits", 16)
    plan = TensorPlan("layer", "weight", 2, "residual", "tensor", ResidualOptions())
    parts = list(ResidualSplitter().split(weight, plan, grid))
    assert weight_error(weight, parts, grid) < 1.12 * weight_error(weight, [weight], plain)


def test_three_parts_of_4_bits_beat_a_plain_grid_of_12() -> None:
    weight = heavy(4, 2048)
    for scheme, rule in (("affine", "restricted"), ("symmetric", "restricted"), ("symmetric", "full")):
        grid = UniformGrid(4, scheme, "channel", symmetric_scale=rule)  # type: ignore[arg-type]
        plain = UniformGrid(4, scheme, "channel", symmetric_scale=rule)  # type: ignore[arg-type]
        object.__setattr__(plain, "bits", 12)
        parts = joint_parts(weight, grid, shapes(grid), 3)
        assert weight_error(weight, parts, grid) < weight_error(weight, [weight], plain)
