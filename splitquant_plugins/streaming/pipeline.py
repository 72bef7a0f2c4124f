"""Work on several things at once and hand the results on in order, within a memory budget."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(
    work: Callable[[Item], Result], items: Sequence[Item], *, cost: Callable[[Item], int], budget: int, threads: int
) -> Generator[Result, None, None]:
    """Yield `work(item)` for each item, in order, with `threads` of them at work ahead of the consumer.

    The costs of the items that are being worked on or wait to be consumed stay within `budget`; an item that
    costs more is worked on alone. An item counts until the consumer asks for the next.

    In each thread torch works alone: its own threads, waiting for each other at every small operation, are many
    times slower than this on a busy machine.
    """
    torch_threads = torch.get_num_threads()
    waiting: deque[tuple[int, Future[Result]]] = deque()
    taken = following = 0
    with ThreadPoolExecutor(max_workers=threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
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
            # What a thread sets is also what threads that start later begin with.
            torch.set_num_threads(torch_threads)
