"""Quality against stored bits, with the Pareto front: what no other choice is both smaller and better than."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from splitquant_plugins.evaluation.pages.html_page import COLOURS

WIDTH, HEIGHT = 560, 340
MANY = 24  # points, of which more are drawn smaller
LEFT, RIGHT, TOP, BOTTOM = 62, 18, 16, 46


@dataclass(frozen=True)
class Point:
    """A choice: stored bits per weight and quality, with a label, what it is called, and how it is drawn."""

    bits: float
    quality: float
    label: str
    name: str
    colour: int
    filled: bool = True


@dataclass(frozen=True)
class Quality:
    """What the quality is: its name, whether less is better, on a logarithmic scale, and how values are written."""

    name: str
    less_is_better: bool
    logarithmic: bool
    show: Callable[[float], str]


def pareto_front(points: Sequence[Point], quality: Quality) -> list[int]:
    """Return the numbers of the points on the front, by bits; of equal points the first."""
    sign = -1 if quality.less_is_better else 1
    order = sorted(range(len(points)), key=lambda number: (points[number].bits, -sign * points[number].quality))
    front: list[int] = []
    for number in order:
        if not front or sign * points[number].quality > sign * points[front[-1]].quality:
            front.append(number)
    return front


def draw_trade_off(points: Sequence[Point], quality: Quality, whole: float | None = None, *, front: bool = True) -> str:
    """Return an SVG of the points, the front as steps, and the float model's quality as a dashed line."""
    values = [point.quality for point in points] + ([] if whole is None else [whole])
    across = _scale([point.bits for point in points], LEFT, WIDTH - RIGHT, logarithmic=False)
    up = _scale(values, HEIGHT - BOTTOM, TOP, logarithmic=quality.logarithmic)
    title = f"{quality.name} against stored bits per weight"
    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    for value in across.ticks:
        x = across(value)
        parts.append(f'<line class="axis" x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{value:g}</text>')
    for value in up.ticks:
        y = up(value)
        parts.append(f'<line class="axis" x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{escape(quality.show(value))}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">stored bits per weight, on disk</text>')
    if whole is not None:
        y = up(whole)
        parts.append(f'<line class="whole" x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{WIDTH - RIGHT}" y="{y + 13:.1f}" text-anchor="end">float model</text>')
    best = [points[number] for number in pareto_front(points, quality)] if front else []
    if best:
        steps = [f"M{across(best[0].bits):.1f},{up(best[0].quality):.1f}"]
        steps += [f"H{across(point.bits):.1f}V{up(point.quality):.1f}" for point in best[1:]]
        parts.append(f'<path class="front" d="{"".join(steps)}H{WIDTH - RIGHT}"/>')
    radius = 5.5 if len(points) <= MANY else 3
    for point, (dx, dy) in zip(points, _label_places([(across(p.bits), up(p.quality)) for p in points]), strict=True):
        x, y, colour = across(point.bits), up(point.quality), f"var(--c{point.colour % COLOURS})"
        fill = colour if point.filled else "var(--ground)"
        said = escape(f"{point.name}: {quality.show(point.quality)}, {point.bits:.2f} bits")
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{fill}" stroke="{colour}" stroke-width="2">'
            f"<title>{said}</title></circle>"
        )
        anchor = "start" if dx > 0 else "end"
        place = f'x="{x + dx:.1f}" y="{y + dy:.1f}" text-anchor="{anchor}"'
        parts.append(f'<text class="point" {place}>{escape(point.label)}</text>')
    return "".join(parts) + "</svg>"


class _Scale:
    """Values to places on an axis."""

    def __init__(self, low: float, high: float, start: float, end: float, ticks: list[float], *, log: bool) -> None:
        self.ticks = ticks
        self._low, self._high = (math.log10(low), math.log10(high)) if log else (low, high)
        self._start, self._end, self._log = start, end, log

    def __call__(self, value: float) -> float:
        place = math.log10(max(value, 1e-30)) if self._log else value
        part = (place - self._low) / (self._high - self._low)
        return self._start + min(1.0, max(0.0, part)) * (self._end - self._start)


def _scale(values: Sequence[float], start: float, end: float, *, logarithmic: bool) -> _Scale:
    low, high = min(values), max(values)
    if logarithmic:
        first, last = math.floor(math.log10(max(low, 1e-12))), math.ceil(math.log10(max(high, 1e-12)))
        last = max(last, first + 1)
        powers = range(first, last + 1, max(1, (last - first) // 6))
        return _Scale(10.0**first, 10.0**last, start, end, [10.0**power for power in powers], log=True)
    room = 0.06 * (high - low) or max(abs(high), 1.0) * 0.05
    low, high = low - room, high + room
    step = _round_step((high - low) / 5)
    ticks = [step * number for number in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return _Scale(low, high, start, end, [round(tick, 10) for tick in ticks], log=False)


def _round_step(step: float) -> float:
    power = 10 ** math.floor(math.log10(step))
    return float(next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= step * 0.999))


def _label_places(places: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Where labels stand beside their points, so that those of near points do not cover each other."""
    taken: list[tuple[float, float]] = []
    found = []
    for x, y in places:
        sides = [
            (9.0, -7.0),
            (-9.0, -7.0),
            (9.0, 16.0),
            (-9.0, 16.0),
            (24.0, 5.0),
            (-24.0, 5.0),
            (9.0, -21.0),
            (9.0, 30.0),
        ]
        inside = [side for side in sides if LEFT < x + 2 * side[0] < WIDTH - 4 and y + side[1] > 10] or sides
        free = (s for s in inside if all(abs(x + s[0] - a) > 15 or abs(y + s[1] - b) > 12 for a, b in taken))
        side = next(free, inside[0])
        taken.append((x + side[0], y + side[1]))
        found.append(side)
    return found
