"""Making shards in this process: layers of several shards at once, within a memory budget."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Sequence
from contextlib import closing

import torch

from splitquant_plugins.manifest import LayerRecord
from splitquant_plugins.parallel import in_order
from splitquant_plugins.streaming.shards import Shards, nothing_to_tell
from splitquant_plugins.streaming.workplace import ShardRecord


def make_shards(
    shards: Shards,
    numbers: Sequence[int],
    *,
    threads: int,
    working_bytes: int,
    tell: Callable[[LayerRecord | None], None] = nothing_to_tell,
) -> Generator[tuple[int, ShardRecord], None, None]:
    """Make the shards of these numbers, and yield each with its record; `tell` hears of each unit."""
    units = [unit for number in numbers for unit in shards.units[number]]
    with closing(
        in_order(shards.work, units, cost=shards.cost, budget=working_bytes, threads=threads, torch_alone=True)
    ) as made:
        for number in numbers:
            yield number, shards.write(number, made, tell)


def threads_of(jobs: int) -> int:
    """As many as `jobs` says, -1 being all cores; as torch would use on one layer, where it says no more than that."""
    return torch.get_num_threads() if jobs == 1 else jobs if jobs > 0 else os.cpu_count() or 1
