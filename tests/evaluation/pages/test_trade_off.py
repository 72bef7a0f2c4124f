"""The Pareto front, and where points are drawn."""

from __future__ import annotations

import re

import pytest

from splitquant_plugins.evaluation.pages.trade_off import Point, Quality, draw_trade_off, pareto_front

MORE = Quality("accuracy", less_is_better=False, logarithmic=False, show="{:.2f}".format)
LESS = Quality("KL", less_is_better=True, logarithmic=True, show="{:.3g}".format)


def points(*pairs: tuple[float, float]) -> list[Point]:
    return [Point(bits, quality, str(n + 1), f"row {n + 1}", n) for n, (bits, quality) in enumerate(pairs)]


def test_the_front_holds_what_nothing_is_smaller_and_better_than() -> None:
    found = points((6, 0.9), (2, 0.3), (4, 0.9), (8, 0.95), (2, 0.2), (4, 0.5))
    assert pareto_front(found, MORE) == [1, 2, 3]
    assert pareto_front(points((2, 5.0), (6, 0.1), (4, 7.0), (8, 0.1)), LESS) == [0, 1]
    assert pareto_front([], MORE) == []


def places(svg: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', svg)]


def test_more_bits_are_right_and_better_is_up() -> None:
    (x1, y1), (x2, y2) = places(draw_trade_off(points((2, 0.3), (6, 0.9)), MORE, whole=0.95))
    assert x1 < x2
    assert y1 > y2
    assert "float model" in draw_trade_off(points((2, 0.3)), MORE, whole=0.95)
    (_, high), (_, low) = places(draw_trade_off(points((2, 5.0), (6, 0.001)), LESS))
    assert high < low  # less is better, and is drawn below


@pytest.mark.parametrize("values", [[(2.0, 0.5)], [(2.0, 0.0), (4.0, 0.0)], [(2.0, 1e300), (3.0, 1e-9)]])
@pytest.mark.parametrize("quality", [MORE, LESS])
def test_values_that_leave_no_room(values: list[tuple[float, float]], quality: Quality) -> None:
    svg = draw_trade_off(points(*values), quality)
    assert len(places(svg)) == len(values)
    assert "nan" not in svg
    assert "inf" not in svg


def test_labels_of_near_points_stand_apart() -> None:
    svg = draw_trade_off(points(*[(4, 0.5)] * 4, (2, 0.1)), MORE)
    labels = re.findall(r'<text class="point" x="([\d.]+)" y="([\d.]+)"', svg)
    assert len(set(labels)) == 5


def test_the_front_can_be_left_out() -> None:
    assert "<path" in draw_trade_off(points((2, 0.3), (6, 0.9)), MORE)
    assert "<path" not in draw_trade_off(points((2, 0.3), (6, 0.9)), MORE, front=False)
