"""Progress bars for long work, on standard error, and only where somebody looks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")


def track(items: Sequence[Item], description: str, *, enabled: bool) -> Iterator[Item]:
    """Iterate over items, with a progress bar on standard error where it is wanted."""
    if not enabled:
        yield from items
        return
    from rich.console import Console
    from rich.progress import track as rich_track

    console = Console(stderr=True)
    yield from rich_track(items, description, console=console, transient=True, disable=not console.is_terminal)


class Estimate:
    """How long `steps` steps of two halves take: one of which nothing is known while it runs, and one in parts.

    `begin` starts a step, `part` says how much of its second half is done. The first half ends with the first part.
    """

    def __init__(self, steps: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self.steps = steps
        self.begun = 0
        self._clock = clock
        self._first = self._start = self._half = clock()
        self._step_done = 0.0

    def begin(self) -> None:
        """Start the next step."""
        now = self._clock()
        self._first = now if not self.begun else self._first
        self.begun += 1
        self._start = self._half = now
        self._step_done = 0.0

    def part(self, done: float) -> None:
        """Note that this part, 0 to 1, of the second half is done."""
        now = self._clock()
        if not done:
            self._half = now
        elif now > self._start:
            self._step_done = (now - self._start) / (self._half - self._start + (now - self._half) / done)

    @property
    def done(self) -> float:
        """Steps that are done, with the part of the one that is not."""
        return max(self.begun - 1, 0) + self._step_done

    @property
    def left(self) -> float | None:
        """Seconds that are left; None while nothing is known."""
        return None if not self.done else (self._clock() - self._first) * (self.steps - self.done) / self.done


@contextmanager
def estimating(steps: int) -> Iterator[tuple[Callable[[str], None], Callable[[float], None]]]:
    """Show a bar with what is left of that many steps; yields `begin(title)` and `part(done)` of an `Estimate`."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    estimate = Estimate(steps)
    console = Console(stderr=True)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        shown = progress.add_task("loading", total=None, left="")

        def show(title: str | None = None) -> None:
            left = estimate.left
            text = "" if left is None else f"{spoken(left)} left"
            progress.update(shown, completed=estimate.done, total=steps, left=text, description=title)

        def begin(title: str) -> None:
            estimate.begin()
            show(f"{estimate.begun} of {steps}: {title}")

        def part(done: float) -> None:
            if estimate.begun:
                estimate.part(done)
                show()
            else:
                progress.update(shown, description="running the float model", completed=done, total=1.0)

        yield begin, part


def spoken(seconds: float) -> str:
    """A time as one says it."""
    if seconds < 90:
        return f"about {max(1, round(seconds))} s"
    return f"about {round(seconds / 60)} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"
