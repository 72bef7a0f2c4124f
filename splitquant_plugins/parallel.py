"""Threads for what torch does in one: large tensors in chunks that stay in the cache, and several things in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import torch

Item = TypeVar("Item")
Answer = TypeVar("Answer")

# Values in a chunk: torch works on fewer than 32,768 without waking its own threads, which is slow where cores are
# busy.
CHUNK = 24_576
_SPANS_PER_THREAD = 4


def in_threads(work: Callable[[Item], Answer], items: Sequence[Item]) -> list[Answer]:
    """Apply `work`, which should release the interpreter lock, to the items; answers come in their order.

    As many threads as torch uses. Not joblib's: a call of it takes about 13 ms here, and one of this 0.3 to 1 ms
    (2 and 8 chunks of 24,576 values, 2 threads, joblib 1.6), and a layer makes several.
    """
    return list(iter_in_threads(work, items))


def iter_in_threads(work: Callable[[Item], Answer], items: Sequence[Item]) -> Iterator[Answer]:
    """As `in_threads`, with each answer as soon as those before it are there: for answers that need not be kept."""
    threads = min(torch.get_num_threads(), len(items))
    yield from in_order(work, items, threads=threads) if threads > 1 else map(work, items)


def in_order(
    work: Callable[[Item], Answer],
    items: Sequence[Item],
    *,
    threads: int,
    cost: Callable[[Item], int] = lambda _: 0,
    budget: int = 0,
    torch_alone: bool = False,
) -> Generator[Answer, None, None]:
    """Yield `work(item)` for each item, in order, with `threads` of them at work ahead of the consumer.

    The costs of the items that are being worked on or wait to be consumed stay within `budget`; an item that
    costs more is worked on alone. An item counts until the consumer asks for the next. (joblib bounds what is under way
    by number only. Tasks that waited for room would keep it from taking in the results that make room.)

    With `torch_alone`, torch uses a single thread within each of these: its own, waiting for each other at every small
    operation, are many times slower than that on a busy machine.
    """
    torch_threads = torch.get_num_threads()
    waiting: deque[tuple[int, Future[Answer]]] = deque()
    taken = following = 0
    start = partial(torch.set_num_threads, 1) if torch_alone else None
    with ThreadPoolExecutor(threads, initializer=start) as pool:
        try:
            while waiting or following < len(items):
                while following < len(items):
                    price = cost(items[following])
                    if waiting and taken + price > budget:
                        break
                    waiting.append((price, pool.submit(work, items[following])))
                    taken += price
                    following += 1
                price, future = waiting[0]
                yield future.result()
                del future
                waiting.popleft()
                taken -= price
        finally:
            for _, future in waiting:
                future.cancel()
            if torch_alone:  # what a thread sets is also what threads that start later begin with
                torch.set_num_threads(torch_threads)


def spans(n: int, at_least: int = 1 << 20) -> list[slice]:
    """Cut range(n) into even spans for the threads, none much shorter than `at_least`."""
    number = max(1, min(_SPANS_PER_THREAD * torch.get_num_threads(), n // at_least))
    return [slice(n * i // number, n * (i + 1) // number) for i in range(number)]


def chunks(span: slice, size: int = CHUNK) -> Iterator[slice]:
    """Cut a span into chunks of `size`."""
    for start in range(span.start, span.stop, size):
        yield slice(start, min(start + size, span.stop))
