"""How long work still takes, by a clock that tests turn."""

from __future__ import annotations

import pytest

from splitquant_plugins.progress import Estimate, spoken


def test_what_is_left_is_told_from_what_was_done() -> None:
    now = [100.0]
    estimate = Estimate(4, lambda: now[0])
    assert estimate.left is None
    now[0] = 200.0  # loading does not count
    estimate.begin()
    now[0] += 6
    estimate.part(0)
    assert (estimate.done, estimate.left) == (0.0, None)
    now[0] += 1
    estimate.part(0.25)  # of 4 s, after 6: 7 of 10
    assert estimate.done == pytest.approx(0.7)
    assert estimate.left == pytest.approx(7 * 3.3 / 0.7)
    now[0] += 3
    estimate.begin()
    assert estimate.done == 1.0
    assert estimate.left == pytest.approx(30)


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.2, "about 1 s"), (89, "about 89 s"), (90, "about 2 min"), (7200, "about 2.0 h")]
)
def test_times_are_said_as_one_says_them(seconds: float, said: str) -> None:
    assert spoken(seconds) == said
