"""Passes over large tensors in chunks that stay in the cache, on as many threads as torch uses."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

Item = TypeVar("Item")
Answer = TypeVar("Answer")

# Values in a chunk: torch works on fewer than 32,768 without waking its own threads, which is slow where cores are
# busy.
CHUNK = 24_576
_SPANS_PER_THREAD = 4


def in_threads(work: Callable[[Item], Answer], items: Sequence[Item]) -> list[Answer]:
    """Apply `work`, which should release the interpreter lock, to the items; answers come in their order."""
    return list(iter_in_threads(work, items))


def iter_in_threads(work: Callable[[Item], Answer], items: Sequence[Item]) -> Iterator[Answer]:
    """As `in_threads`, with each answer as soon as those before it are there: for answers that need not be kept."""
    threads = min(torch.get_num_threads(), len(items))
    if threads < 2:
        yield from map(work, items)
        return
    with ThreadPoolExecutor(threads) as pool:
        yield from pool.map(work, items)


def spans(n: int, at_least: int = 1 << 20) -> list[slice]:
    """Cut range(n) into even spans for the threads, none much shorter than `at_least`."""
    number = max(1, min(_SPANS_PER_THREAD * torch.get_num_threads(), n // at_least))
    return [slice(n * i // number, n * (i + 1) // number) for i in range(number)]


def chunks(span: slice, size: int = CHUNK) -> Iterator[slice]:
    """Cut a span into chunks of `size`."""
    for start in range(span.start, span.stop, size):
        yield slice(start, min(start + size, span.stop))
