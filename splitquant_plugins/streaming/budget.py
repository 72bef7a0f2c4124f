"""How many parts a budget gives to each layer of a checkpoint, measured layer by layer within bounded memory."""

from __future__ import annotations

from contextlib import closing

import torch

from splitquant_plugins.parallel import in_order
from splitquant_plugins.passes.budget import allocate
from splitquant_plugins.passes.splitquant import SplitQuantPass
from splitquant_plugins.progress import track
from splitquant_plugins.streaming.layout import Layout, Unit
from splitquant_plugins.streaming.local import threads_of
from splitquant_plugins.streaming.shards import Shards


def parts_within_budget(shards: Shards, layout: Layout, first: SplitQuantPass, *, working_bytes: int) -> dict[str, int]:
    """Return the number of parts of every layer that may be split, by name; ConfigError where none are few enough.

    Layers are taken in the model's order, as they are in memory, so that the same parts are chosen.
    """
    by_name = {unit.names[0]: unit for unit in layout.units if unit.kind == "split"}
    units = [by_name[name] for name in layout.order]
    found = {}
    threads = threads_of(first.jobs)
    work = in_order(shards.candidates, units, threads=threads, cost=shards.cost, budget=working_bytes, torch_alone=True)
    with closing(work) as made:
        for unit in track(units, "measuring layers", enabled=first.progress):
            found[unit.names[0]] = next(made)
    assert first.config.budget is not None
    weights = sum(_numel(unit) for unit in units)
    return {name: one.k for name, one in allocate(found, first.config.budget * weights).items()}


def _numel(unit: Unit) -> int:
    assert unit.plan is not None
    return torch.Size(unit.plan.weight.shape).numel()
