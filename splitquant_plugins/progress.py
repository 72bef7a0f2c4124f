"""Progress bars for long work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
