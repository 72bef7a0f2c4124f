from __future__ import annotations

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from dynamic_program import least_inertia
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.torch import load_file

from splitquant_plugins.clustering import assign, kernels, masked_parts, optimal_clusters
from splitquant_plugins.compiled import compiled
from splitquant_plugins.errors import InputError


def inertia_of(values, labels, weights=None):
    """Inertia of a labelling, from its definition."""
    x = np.asarray(values, dtype=np.longdouble)
    w = np.ones_like(x) if weights is None else np.asarray(weights, dtype=np.longdouble)
    cost = np.longdouble(0)
    for label in np.unique(labels):
        chosen = labels == label
        if w[chosen].sum() > 0:
            center = (w[chosen] * x[chosen]).sum() / w[chosen].sum()
            cost += (w[chosen] * (x[chosen] - center) ** 2).sum()
    return float(cost)


def check_optimal(rows, k, weights=None, slack=1e-6):
    clusters = optimal_clusters(rows, k, weights=weights)
    labels = assign(rows, clusters.boundaries).numpy()
    for number, row in enumerate(rows.double().numpy()):
        weight = None if weights is None else weights[number].numpy()
        best, whole = least_inertia(row, k, weight)
        mine = inertia_of(row, labels[number], weight)
        assert mine <= best * (1 + slack) + whole * 1e-14
        assert clusters.inertia[number].item() == pytest.approx(mine, rel=1e-6, abs=whole * 1e-14)
        if weights is None:
            used = np.bincount(labels[number], minlength=k)
            assert clusters.counts[number].tolist() == used.tolist()
            assert clusters.sizes[number].item() == np.count_nonzero(used)
            for label in range(k):
                if used[label]:
                    center = row[labels[number] == label].mean()
                    assert clusters.centers[number, label].item() == pytest.approx(
                        center, rel=1e-6, abs=1e-9 * np.abs(row).max()
                    )
                    if label:
                        assert clusters.boundaries[number, label - 1].item() == row[labels[number] == label].min()
                else:
                    assert clusters.centers[number, label].isnan()
    return clusters


SHAPES = {
    "normal": lambda g, n: g.standard_normal(n),
    "cauchy": lambda g, n: g.standard_t(1, n),
    "t4": lambda g, n: g.standard_t(4, n),
    "uniform": lambda g, n: g.random(n),
    "integers": lambda g, n: g.integers(-5, 6, n),
    "two_tight": lambda g, n: np.sign(g.standard_normal(n)) + 1e-3 * g.standard_normal(n),
    "lognormal": lambda g, n: np.exp(3 * g.standard_normal(n)),
    "five_groups": lambda g, n: g.choice([0, 1, 3, 10, 11.0], n) + 0.05 * g.standard_normal(n),
    "outliers": lambda g, n: np.concatenate([g.standard_normal(n - 2), [1e3, -3e4]]),
    "mirrored": lambda g, n: np.concatenate([a := g.standard_t(3, n // 2), -a]),
    "far_from_zero": lambda g, n: 100 + g.standard_normal(n),
    "tiny": lambda g, n: 1e-36 * g.standard_normal(n),
    "huge": lambda g, n: 1e37 * g.standard_normal(n),
    "mostly_zero": lambda g, n: g.standard_normal(n) * (g.random(n) < 0.1),
    "two_values": lambda g, n: g.choice([-1.0, 0.3], n),
    "evenly_spaced": lambda g, n: np.linspace(-1, 2, n),
    "powers": lambda g, n: 2.0 ** (np.arange(n) % 60),
    "denormal": lambda g, n: 1e-42 * g.standard_normal(n),
    "one_far_away": lambda g, n: np.concatenate([g.standard_normal(n - 1), [1e30]]),
    "constant_runs": lambda g, n: np.repeat(g.standard_normal(n // 4 + 1), 4)[:n],
}


@pytest.mark.parametrize("k", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_optimal_beside_a_dynamic_program(shape, k):
    generator = np.random.default_rng(k)
    for n in (4, 40, 250):
        rows = np.stack([SHAPES[shape](generator, n) for _ in range(2)]).astype(np.float32)
        check_optimal(torch.from_numpy(rows), k)


@pytest.mark.parametrize("shape", ["normal", "t4", "uniform", "cauchy", "five_groups"])
def test_optimal_in_long_rows(shape):
    rows = SHAPES[shape](np.random.default_rng(3), 1000)[None].astype(np.float32)
    for k in (3, 5):
        check_optimal(torch.from_numpy(rows), k)


def weights_of_bert_tiny():
    folder = os.environ.get("SPLITQUANT_ASSETS")
    if folder is None:
        pytest.skip("SPLITQUANT_ASSETS is not set")
    files = sorted(Path(folder).glob("models/**/bert-tiny*/**/model.safetensors"))
    if not files:
        pytest.skip("SPLITQUANT_ASSETS has no BERT-Tiny")
    tensors = load_file(files[0])
    return torch.cat([t.float()[:25] for name, t in tensors.items() if "dense.weight" in name and t.shape[1] == 128])


@pytest.mark.parametrize("rows", ["normal", "t4", "t2", "bert_tiny"])
@pytest.mark.parametrize("k", [2, 3])
def test_many_real_rows_beside_a_dynamic_program(rows, k):
    generator = np.random.default_rng(6)
    if rows == "bert_tiny":
        values = weights_of_bert_tiny()
    else:
        draw = {"normal": None, "t4": 4, "t2": 2}[rows]
        make = generator.standard_normal if draw is None else lambda shape: generator.standard_t(draw, shape)
        values = torch.from_numpy(make((120, 147)).astype(np.float32))
    check_optimal(values, k, slack=1e-9)


@settings(max_examples=40, deadline=None)
@given(st.data(), st.integers(2, 4))
def test_optimal_for_values_made_to_mislead(data, k):
    """Tight groups at any distance and of any size: many local optima, and outliers."""
    groups = data.draw(
        st.lists(
            st.tuples(st.integers(-40, 40), st.integers(1, 40), st.sampled_from([0, 1e-3, 0.3, 4])),
            min_size=1,
            max_size=5,
        )
    )
    generator = np.random.default_rng(data.draw(st.integers(0, 99)))
    values = [center + spread * generator.standard_t(2, size) for center, size, spread in groups]
    check_optimal(torch.from_numpy(np.concatenate(values))[None], k)


def test_a_continuum_of_optima():
    """With two clusters, every boundary in values spread as Student-t(2) gains about the same."""
    t = (np.arange(400) + 0.5) / 400
    check_optimal(torch.from_numpy((2 * t - 1) / np.sqrt(2 * t * (1 - t)))[None], 2)
    check_optimal(torch.from_numpy((2 * t - 1) / np.sqrt(2 * t * (1 - t)))[None], 3)


def items_of(values):
    """Distinct, ascending values as the kernels' items, around the mean."""
    points = values / np.abs(values).max()
    points = points - points.mean()
    prefixes = np.zeros((len(points) + 1, 2))
    prefixes[1:, 0], prefixes[1:, 1] = np.arange(1, len(points) + 1), points.cumsum()
    return prefixes, np.stack([points, points], axis=1)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 4), st.sampled_from(sorted(set(SHAPES) - {"one_far_away"})))
def test_the_bracket_holds_the_optimum(seed, k, shape):
    values = np.unique(SHAPES[shape](np.random.default_rng(seed), 60))
    if len(values) <= k:
        return
    prefixes, ends = items_of(values)
    lowest, highest = np.arange(1, k), len(values) - np.arange(1, k)[::-1]
    low, high = lowest.copy(), highest.copy()
    kernels.bracket(prefixes, ends, low, high)
    best, everything = least_inertia(values, k)
    for first, last in ((lowest, highest), (low, high)):
        cuts = kernels.best_cuts(prefixes, first, last)
        inertia = inertia_of(values, np.searchsorted(cuts, np.arange(len(values)), side="right"))
        assert inertia <= best * (1 + 1e-9) + everything * 1e-14


def test_the_bracket_is_narrow():
    """Also where items stand for many values in some range."""
    values = np.sort(np.random.default_rng(0).standard_normal(20_000))
    prefixes, ends = items_of(values)
    for step in (1, 100):
        low, high = np.zeros(2, np.int64), np.full(2, 20_000 // step)
        blurred = np.stack([ends[::step, 0], ends[step - 1 :: step, 1]], axis=1)
        kernels.bracket(np.ascontiguousarray(prefixes[::step]), blurred, low, high)
        cuts = kernels.best_cuts(prefixes, np.array([1, 2]), np.array([19_998, 19_999]))
        assert (low * step <= cuts).all()
        assert (cuts <= high * step).all()
        assert (high - low).max() < 20_000 / step / 10


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_best_cuts_of_all_in_their_ranges(data):
    values = np.unique(data.draw(st.lists(st.integers(-50, 50), min_size=6, max_size=12, unique=True))).astype(float)
    prefixes, _ = items_of(values)
    m, cuts = len(values), data.draw(st.integers(1, 3))
    low = np.array([data.draw(st.integers(c + 1, m - cuts + c)) for c in range(cuts)])
    low = np.maximum.accumulate(low)
    high = np.array([data.draw(st.integers(int(low[c]), m - cuts + c)) for c in range(cuts)])

    def gain(chosen):
        ends = [0, *chosen, m]
        steps = np.diff(prefixes[ends], axis=0)
        return (steps[:, 1] ** 2 / steps[:, 0]).sum()

    ranges = [range(first, last + 1) for first, last in zip(low, high, strict=True)]
    possible = [c for c in itertools.product(*ranges) if all(a < b for a, b in itertools.pairwise(c))]
    if possible:
        found = kernels.best_cuts(prefixes, low, high)
        assert all(first <= cut <= last for first, cut, last in zip(low, found, high, strict=True))
        assert gain(found) == pytest.approx(max(gain(chosen) for chosen in possible), rel=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("k", [1, 2, 3, 8])
def test_long_rows_beside_a_dynamic_program(shape, k, monkeypatch):
    """What long rows need, pieces and all, on rows for which the optimum is known."""
    monkeypatch.setattr("splitquant_plugins.clustering.exact_kmeans._LONG", 1)
    monkeypatch.setattr("splitquant_plugins.clustering.exact_kmeans._PIECE", 64)
    monkeypatch.setattr("splitquant_plugins.clustering.exact_kmeans._BINS", 128)
    generator = np.random.default_rng(k)
    for n in (4, 250):
        check_optimal(torch.from_numpy(SHAPES[shape](generator, n)[None].astype(np.float32)), k)


@st.composite
def weighted_values(draw):
    """Values of any size, many of them equal, or none; and how often each counts."""
    n = draw(st.integers(1, 60))
    elements = draw(
        st.sampled_from(
            [
                st.integers(-3, 3).map(float),
                st.integers(-100, 100).map(lambda number: number / 8),
                st.floats(-1e3, 1e3, width=32),
                st.sampled_from([-1e6, -1.0, 0.0, 1.0, 1.001, 1e6]),
            ]
        )
    )
    values = draw(arrays(np.float64, n, elements=elements))
    weights = draw(arrays(np.float64, n, elements=st.sampled_from([0.0, 0.125, 1.0, 3.0, 40.0])))
    weights[draw(st.integers(0, n - 1))] = 1.0
    return values, weights


def test_the_dynamic_program_is_right():
    """Beside all ways to cut a few values."""
    generator = np.random.default_rng(0)
    for n, k in itertools.product(range(1, 8), range(1, 5)):
        values, weights = generator.integers(-9, 9, n).astype(float), generator.integers(1, 4, n).astype(float)
        values.sort()
        ways = itertools.combinations_with_replacement(range(n + 1), k - 1)
        labels = [np.searchsorted(cuts, np.arange(n), side="right") for cuts in ways]
        least = min(inertia_of(values, label, weights) for label in labels)
        assert least_inertia(values, k, weights)[0] == pytest.approx(least, rel=1e-12, abs=1e-12)


@settings(max_examples=80, deadline=None)
@given(weighted_values(), st.integers(1, 6), st.sampled_from([np.float32, np.float64]), st.booleans())
def test_kernels_beside_the_dynamic_program(given, k, dtype, weighted):
    values, weights = given
    rows = torch.from_numpy(values.astype(dtype))[None]
    check_optimal(rows, k, torch.from_numpy(weights)[None] if weighted else None, slack=1e-9)


@settings(max_examples=60, deadline=None)
@given(weighted_values(), st.integers(2, 6))
def test_the_kernels_dynamic_program_beside_the_plain_one(given, k):
    """`best_cuts` alone, without what brackets its cuts."""
    values, place = np.unique(given[0], return_inverse=True)
    weights = np.bincount(place, given[1] + 0.125)
    k = min(k, len(values))
    if k == 1:
        return
    points = values - np.average(values, weights=weights)
    prefixes = np.zeros((len(values) + 1, 2))
    prefixes[1:, 0], prefixes[1:, 1] = weights.cumsum(), (weights * points).cumsum()
    cuts = kernels.best_cuts(prefixes, np.arange(1, k), len(values) - np.arange(1, k)[::-1])
    best, whole = least_inertia(values, k, weights)
    inertia = inertia_of(values, np.searchsorted(cuts, np.arange(len(values)), side="right"), weights)
    assert len(set(cuts)) == k - 1
    assert inertia <= best * (1 + 1e-9) + whole * 1e-14


@settings(max_examples=60, deadline=None)
@given(
    arrays(np.float64, st.integers(1, 24), elements=st.floats(-1e6, 1e6, width=32)),
    st.integers(1, 5),
)
def test_optimal_for_any_values(values, k):
    check_optimal(torch.from_numpy(values)[None], k)


@settings(max_examples=40, deadline=None)
@given(st.data(), st.integers(2, 16), st.integers(1, 4))
def test_optimal_with_weights(data, n, k):
    values = data.draw(arrays(np.float64, n, elements=st.integers(-20, 20).map(float)))
    weights = data.draw(arrays(np.float64, n, elements=st.sampled_from([0.0, 0.25, 1.0, 7.0])))
    weights[0] = 1.0
    check_optimal(torch.from_numpy(values)[None], k, torch.from_numpy(weights)[None])


def test_weights_that_would_be_lost_in_the_sum_are_an_error():
    with pytest.raises(InputError, match="below 1e-12 of their row's sum"):
        optimal_clusters(torch.randn(4), 2, weights=torch.tensor([1.0, 1.0, 1e-13, 0.0], dtype=torch.float64))


def test_weights_are_repetitions():
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(1, 60, generator=generator)
    weights = torch.randint(1, 5, (1, 60), generator=generator)
    repeated = values[0].repeat_interleave(weights[0])
    weighted, plain = optimal_clusters(values, 3, weights=weights), optimal_clusters(repeated, 3)
    assert torch.equal(weighted.boundaries, plain.boundaries)
    assert torch.equal(weighted.counts, plain.counts)


@pytest.mark.parametrize("shape", ["normal", "t4", "cauchy", "five_groups", "mostly_zero", "far_from_zero"])
@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_long_rows_agree_with_short_ones(shape, k, dtype, monkeypatch):
    rows = torch.from_numpy(SHAPES[shape](np.random.default_rng(5), 1 << 17)[None].astype(dtype))
    monkeypatch.setattr("splitquant_plugins.clustering.exact_kmeans._LONG", 1 << 17)
    long = optimal_clusters(rows, k)
    monkeypatch.setattr("splitquant_plugins.clustering.exact_kmeans._LONG", 1 << 40)
    short = optimal_clusters(rows, k)
    labels = assign(rows, long.boundaries)[0]
    assert inertia_of(rows[0].numpy(), labels.numpy()) == pytest.approx(short.inertia.item(), rel=1e-9)
    assert long.inertia.item() == pytest.approx(short.inertia.item(), rel=1e-9)
    assert long.counts[0].tolist() == labels.bincount(minlength=k).tolist()
    assert long.centers.numpy() == pytest.approx(short.centers.numpy(), rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [300, 1 << 18])
def test_sixteen_bit_values_are_exact(dtype, n):
    values = torch.randn(n, generator=torch.Generator().manual_seed(2)).to(dtype)
    values[:10] = -0.0
    half, single = optimal_clusters(values, 3), optimal_clusters(values.float(), 3)
    assert half.boundaries.dtype == dtype
    assert torch.equal(half.boundaries.float(), single.boundaries)
    assert torch.equal(half.counts, single.counts)
    assert torch.equal(half.inertia, single.inertia)


@pytest.mark.parametrize("exponent", [-1000, -200, 200, 900, 1020])
@pytest.mark.parametrize("way", ["short", "long", "weighted"])
def test_powers_of_two_change_no_cluster(exponent, way, monkeypatch):
    if way == "long":
        monkeypatch.setattr("splitquant_plugins.clustering.exact_kmeans._LONG", 1)
    values = torch.randn(300, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    weights = torch.ones(300) if way == "weighted" else None
    scaled = torch.from_numpy(np.ldexp(values.numpy(), exponent))
    plain, other = optimal_clusters(values, 3, weights=weights), optimal_clusters(scaled, 3, weights=weights)
    assert np.ldexp(other.boundaries.numpy(), -exponent).tolist() == plain.boundaries.tolist()
    assert torch.equal(other.counts, plain.counts)


@pytest.mark.parametrize("way", ["short", "long", "weighted"])
def test_the_inertia_of_tight_clusters_is_accurate(way, monkeypatch):
    """Where the difference of two great numbers would be noise."""
    if way == "long":
        monkeypatch.setattr("splitquant_plugins.clustering.exact_kmeans._LONG", 1)
    generator = np.random.default_rng(0)
    row = generator.integers(-1, 2, 300) + 1e-7 * generator.standard_normal(300)
    values = torch.from_numpy(row)[None]
    clusters = optimal_clusters(values, 3, weights=torch.ones(1, 300) if way == "weighted" else None)
    expected = inertia_of(row, assign(values, clusters.boundaries)[0].numpy())
    assert clusters.inertia.item() == pytest.approx(expected, rel=1e-6, abs=0)


@pytest.mark.parametrize("n", [300, 1 << 19])
def test_the_number_of_threads_changes_nothing(n, monkeypatch):
    monkeypatch.setattr("splitquant_plugins.clustering.exact_kmeans._PIECE", 1 << 16)
    rows = torch.randn(4, n, generator=torch.Generator().manual_seed(4))
    before, answers = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            answers.append(optimal_clusters(rows, 3))
    finally:
        torch.set_num_threads(before)
    for name in ("boundaries", "centers", "inertia", "counts"):
        assert torch.equal(getattr(answers[0], name), getattr(answers[1], name))


@settings(max_examples=40, deadline=None)
@given(arrays(np.float64, st.integers(1, 200), elements=st.floats(-1e3, 1e3)))
def test_values_of_one_bin_are_sorted(values):
    numbers, prefixes = np.array([0]), np.array([[0.0, 0.0], [len(values), 0.0]])
    frame, runs, slots = np.array([0.0, 0.0, 0.0]), np.array([[0, 1]]), np.empty(1, np.int64)
    ordered = np.empty_like(values)
    kernels.sort(values, frame, runs, (numbers, prefixes, prefixes), slots, ordered)
    assert ordered.tolist() == sorted(values.tolist())


def test_without_a_folder_for_the_cache_it_compiles_for_this_process(monkeypatch):
    def njit(function, *, cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return function

    monkeypatch.setattr("numba.njit", njit)
    assert compiled(len)([1, 2]) == 2


def test_rows_are_independent_and_the_answer_repeats():
    rows = torch.randn(7, 300, generator=torch.Generator().manual_seed(3))
    together, again = optimal_clusters(rows, 3), optimal_clusters(rows, 3)
    assert torch.equal(together.boundaries, again.boundaries)
    for number, row in enumerate(rows):
        assert torch.equal(optimal_clusters(row, 3).boundaries[0], together.boundaries[number])


def test_fewer_distinct_values_than_clusters():
    rows = torch.tensor([[2.0, 2.0, 2.0, 2.0], [1.0, 5.0, 1.0, 5.0], [-0.0, 0.0, 1.0, 2.0]])
    clusters = optimal_clusters(rows, 3)
    assert clusters.sizes.tolist() == [1, 2, 3]
    inf = torch.inf
    assert clusters.boundaries.tolist() == [[inf, inf], [5.0, inf], [1.0, 2.0]]
    assert clusters.inertia.tolist() == [0.0, 0.0, 0.0]
    assert clusters.counts.tolist() == [[4, 0, 0], [2, 2, 0], [2, 1, 1]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("columns", [1, 3])
@pytest.mark.parametrize("shared", [True, False])
def test_parts_hold_each_value_once(dtype, columns, shared):
    rows = torch.randn(5, 400, generator=torch.Generator().manual_seed(4)).to(dtype)
    bounds = optimal_clusters(rows.reshape(1, -1) if shared else rows, columns + 1).boundaries
    # A value on the boundary, duplicated, and both zeros.
    rows[:, 0], rows[:, 1], rows[:, 2] = bounds[0, 0], bounds[0, 0], -0.0
    parts = masked_parts(rows, bounds)
    labels = assign(rows, bounds)
    assert len(parts) == columns + 1
    for number, part in enumerate(parts):
        assert torch.equal(part, torch.where(labels == number, rows, torch.zeros_like(rows)))


def test_parts_of_a_transposed_tensor():
    rows = torch.randn(30, 20, generator=torch.Generator().manual_seed(5)).T
    parts = masked_parts(rows, torch.tensor([[-0.5, 0.5]]))
    assert torch.equal(sum(parts), rows)
    assert all(part.shape == rows.shape for part in parts)


@pytest.mark.parametrize(
    ("values", "k", "weights", "message"),
    [
        (torch.ones(3), 0, None, "k=0"),
        (torch.ones(0), 2, None, "nothing to cluster"),
        (torch.ones(3, dtype=torch.int64), 2, None, "dtype"),
        (torch.tensor([1.0, torch.nan]), 2, None, "not all finite"),
        (torch.tensor([1.0, torch.inf]), 2, None, "not all finite"),
        (torch.ones(3), 2, torch.ones(2), "weights of shape"),
        (torch.ones(3), 2, -torch.ones(3), "not negative"),
        (torch.ones(3), 2, torch.zeros(3), "all zero"),
    ],
)
def test_impossible_input_is_named(values, k, weights, message):
    with pytest.raises(InputError, match=message):
        optimal_clusters(values, k, weights=weights)
