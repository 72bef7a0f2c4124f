"""The order in which a model's layers are solved: block after block, each on inputs that the solved ones make."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from splitquant_plugins.errors import InputError
from splitquant_plugins.passes.calibration import Batches, evaluating, iter_calls, naming_batch, only_input
from splitquant_plugins.passes.module_tree import is_transformers_conv1d


@dataclass(frozen=True)
class Stage:
    """Layers by name, in the order in which they are called, in groups of those that get the same tensor.

    `block`: the block that they make up, where the model calls it once per batch.
    """

    name: str
    groups: tuple[tuple[str, ...], ...]
    block: nn.Module | None = field(default=None, repr=False)

    @property
    def layers(self) -> tuple[str, ...]:
        """All layers."""
        return tuple(itertools.chain(*self.groups))


def stages_of(model: nn.Module, batches: Batches, layers: Mapping[str, nn.Module], *, sequential: bool) -> list[Stage]:
    """Group layers by block, in the order in which the model calls them on the first batch.

    Layers outside of blocks that are called one after the other make a stage, too; without `sequential` all layers
    make one, of one group. Layers that are never called are in none.
    """
    order, calls = _called(model, batches, layers)
    if not sequential:
        return [Stage("", (tuple(order),))] if order else []
    blocks = find_blocks(model)
    stages: list[Stage] = []
    before = None
    for layer, group in order.items():
        name, block = next(((n, b) for n, b in blocks if not n or layer == n or layer.startswith(f"{n}.")), ("", None))
        if block is not None and calls.get(name, 1) != 1:
            block = None
        if not stages or stages[-1].name != name:
            stages.append(Stage(name, ((layer,),), block))
        elif group == before:
            *earlier, last = stages[-1].groups
            stages[-1] = Stage(name, (*earlier, (*last, layer)), block)
        else:
            stages[-1] = Stage(name, (*stages[-1].groups, (layer,)), block)
        before = group
    return stages


def stage_of_block(
    name: str, block: nn.Module, replayed: nn.Module, batches: Batches, layers: Mapping[str, nn.Module]
) -> Stage:
    """The stage of a single block, which `replayed` runs; layers that the first batch does not call are left out."""
    order, _ = _called(replayed, batches, layers)
    return Stage(name, tuple(tuple(names) for _, names in itertools.groupby(order, key=order.__getitem__)), block)


def find_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The repeated blocks of a model, in order, with their names.

    These are the children of the nn.ModuleList or nn.Sequential with the most children that contain linear
    layers (at least two; the first such container of the most). A model without one is a block itself, named
    "".
    """
    best: list[tuple[str, nn.Module]] = []
    for prefix, module in model.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.Sequential)):
            continue
        blocks = [
            (f"{prefix}.{name}" if prefix else name, child)
            for name, child in module.named_children()
            if any(isinstance(inner, nn.Linear) or is_transformers_conv1d(inner) for inner in child.modules())
        ]
        if len(blocks) > max(len(best), 1):
            best = blocks
    return best or [("", model)]


def _called(
    model: nn.Module, batches: Batches, layers: Mapping[str, nn.Module]
) -> tuple[dict[str, int], dict[str, int]]:
    """The layers in the order of their first call, each with the number of its input, and how often blocks were called.

    Layers called one after the other with the same tensor have the same number.
    """
    order: dict[str, int] = {}
    counts: dict[str, int] = {}
    number = 0
    last: tuple[Tensor, int] | None = None

    def note(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal number, last
            given = only_input(name, args, kwargs)
            # A tensor that was changed in place counts as another.
            number += last is None or given is not last[0] or given._version != last[1]
            last = given, given._version
            order.setdefault(name, number)

        return hook

    def count(name: str) -> Any:
        return lambda *_: counts.update({name: counts.get(name, 0) + 1})

    with evaluating(model), torch.no_grad(), ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.callback(layer.register_forward_pre_hook(note(name), with_kwargs=True).remove)
        for name, block in find_blocks(model):
            hooks.callback(block.register_forward_pre_hook(count(name)).remove)
        for args, kwargs in iter_calls(model, batches):
            with naming_batch(1, model):
                model(*args, **kwargs)
            return order, counts
    raise InputError("no calibration batches: the iterable is empty")
