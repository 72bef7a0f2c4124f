from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitquant_plugins.errors import ConfigError
from splitquant_plugins.passes.budget import Candidate, allocate, tradeoff

LAYERS = st.lists(
    st.lists(st.floats(0, 100), min_size=1, max_size=4).map(
        lambda errors: [Candidate(k, 10 * k, error) for k, error in enumerate(errors, start=1)]
    ),
    min_size=1,
    max_size=4,
)


def spent(chosen: dict[str, Candidate]) -> tuple[int, float]:
    return sum(c.bits for c in chosen.values()), sum(c.error for c in chosen.values())


@settings(max_examples=60, deadline=None)
@given(LAYERS, st.integers(0, 120))
def test_the_budget_is_kept_and_no_step_of_the_curve_beats_the_choice(layers: list, extra: int) -> None:
    options = {f"layer{number}": candidates for number, candidates in enumerate(layers)}
    budget = 10 * len(layers) + extra
    bits, error = spent(allocate(options, budget))
    assert bits <= budget
    for step in tradeoff(options):
        if step.bits <= budget:
            assert error <= step.error + 1e-6 * (1 + abs(step.error))


@settings(max_examples=60, deadline=None)
@given(LAYERS)
def test_every_point_of_the_curve_is_optimal(layers: list) -> None:
    options = {f"layer{number}": candidates for number, candidates in enumerate(layers)}
    everything = [
        (sum(c.bits for c in combination), sum(c.error for c in combination)) for combination in product(*layers)
    ]
    for step in tradeoff(options):
        best = min(error for bits, error in everything if bits <= step.bits)
        assert step.error <= best + 1e-6 * (1 + best)


def test_a_layer_that_gains_nothing_is_left_alone() -> None:
    options = {
        "useless": [Candidate(1, 10, 5.0), Candidate(2, 20, 5.0), Candidate(3, 30, 6.0)],
        "useful": [Candidate(1, 10, 5.0), Candidate(2, 20, 1.0), Candidate(3, 30, 0.5)],
    }
    chosen = allocate(options, 1000)
    assert (chosen["useless"].k, chosen["useful"].k) == (1, 3)


def test_a_step_that_just_does_not_fit_is_made_up_for() -> None:
    # two parts everywhere are a little too much; the small layer gives way, not the large one
    options = {
        "small": [Candidate(k, 101 * k, error) for k, error in ((1, 8.0), (2, 0.5), (3, 0.1), (4, 0.0))],
        "large": [Candidate(k, 1001 * k, error) for k, error in ((1, 60.0), (2, 3.0), (3, 1.0), (4, 0.5))],
    }
    chosen = allocate(options, 2 * 1100)
    assert (chosen["small"].k, chosen["large"].k) == (1, 2)


@settings(max_examples=60, deadline=None)
@given(LAYERS, st.integers(0, 120))
def test_no_combination_within_the_budget_is_better(layers: list, extra: int) -> None:
    options = {f"layer{number}": candidates for number, candidates in enumerate(layers)}
    budget = 10 * len(layers) + extra
    _, error = spent(allocate(options, budget))
    fits = [each for each in product(*layers) if sum(c.bits for c in each) <= budget]
    assert error <= min(sum(c.error for c in each) for each in fits) + 1e-6


def test_many_layers_are_thinned_and_still_better_than_the_curve() -> None:
    options = {
        f"layer{n}": [Candidate(k, k * (1000 + 37 * n % 101), (1 + n % 7) * 4.0**-k) for k in (1, 2, 3, 4)]
        for n in range(40)
    }
    curve = tradeoff(options)
    for budget in (60_000, 90_000, 130_000):
        bits, error = spent(allocate(options, budget))
        assert bits <= budget
        assert error <= min(step.error for step in curve if step.bits <= budget) * 1.001


def test_a_late_gain_is_seen_behind_an_early_loss() -> None:
    options = {"a": [Candidate(1, 10, 10.0), Candidate(2, 20, 11.0), Candidate(3, 30, 1.0)]}
    assert allocate(options, 30)["a"].k == 3
    assert allocate(options, 29)["a"].k == 1


def test_too_small_a_budget_names_the_least() -> None:
    with pytest.raises(ConfigError, match="20 bits"):
        allocate({"a": [Candidate(1, 10, 1.0)], "b": [Candidate(1, 10, 1.0)]}, 19)
