"""The order in which a model's layers are solved: block after block, each on inputs that the solved ones make."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from splitquant_plugins.calibration import (
    Batches,
    SecondMoment,
    evaluating,
    iter_calls,
    iter_second_moments,
    naming_batch,
)
from splitquant_plugins.decoupleq.blocks import Call, capture_inputs, find_blocks
from splitquant_plugins.errors import InputError


@dataclass(frozen=True)
class Stage:
    """Layers (by name, in the order in which they are called) that are solved on the same inputs.

    `block`: the block that they make up, where the model calls it once per batch.
    """

    name: str
    layers: tuple[str, ...]
    block: nn.Module | None = field(default=None, repr=False)


def stages_of(model: nn.Module, batches: Batches, layers: Mapping[str, nn.Module], *, sequential: bool) -> list[Stage]:
    """Group layers by block, in the order in which the model calls them on the first batch.

    Layers outside of blocks that are called one after the other make a stage, too; without `sequential` all layers
    make one. Layers that are never called are in none.
    """
    order, calls = _called(model, batches, layers)
    if not sequential:
        return [Stage("", tuple(order))] if order else []
    blocks = find_blocks(model)
    stages: list[Stage] = []
    for layer in order:
        name, block = next(((n, b) for n, b in blocks if not n or layer == n or layer.startswith(f"{n}.")), ("", None))
        if block is not None and calls.get(name, 1) != 1:
            block = None
        if stages and stages[-1].name == name:
            stages[-1] = Stage(name, (*stages[-1].layers, layer), block)
        else:
            stages.append(Stage(name, (layer,), block))
    return stages


def _called(model: nn.Module, batches: Batches, layers: Mapping[str, nn.Module]) -> tuple[list[str], dict[str, int]]:
    """The layers in the order of their first call, and how often each block was called."""
    order: dict[str, None] = {}
    counts: dict[str, int] = {}

    def note(name: str) -> Any:
        return lambda *_: order.setdefault(name)

    def count(name: str) -> Any:
        return lambda *_: counts.update({name: counts.get(name, 0) + 1})

    with evaluating(model), torch.no_grad(), ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.callback(layer.register_forward_pre_hook(note(name)).remove)
        for name, block in find_blocks(model):
            hooks.callback(block.register_forward_pre_hook(count(name)).remove)
        for args, kwargs in iter_calls(model, batches):
            with naming_batch(1, model):
                model(*args, **kwargs)
            return list(order), counts
    raise InputError("no calibration batches: the iterable is empty")


class BlockInputs(nn.Module):
    """A block with the calls that the model makes of it, to be replayed; `batches` are the inputs of the replay.

    Only this block's inputs are held, not those of the model's other blocks.
    """

    def __init__(self, model: nn.Module, block: nn.Module, batches: Batches) -> None:
        super().__init__()
        self.block = block
        self.calls: list[Call] = capture_inputs(model, block, batches)
        self.masks = list(_masks(model, batches))
        self.batches = [
            {"index": index, "attention_mask": mask} if mask is not None else {"index": index}
            for index, mask in enumerate(self.masks)
        ]

    def forward(self, index: int, attention_mask: Tensor | None = None) -> Any:
        """Replay a call; the mask is only for those who collect statistics."""
        args, kwargs = self.calls[index]
        return self.block(*args, **kwargs)


def moments_of(
    model: nn.Module, batches: Batches, layers: Mapping[str, nn.Module], inputs: BlockInputs | None, max_bytes: int
) -> Iterator[tuple[str, SecondMoment]]:
    """Yield the second moments of a stage's layers, from the block's inputs where there are any."""
    if inputs is None:
        return iter_second_moments(model, batches, layers, max_bytes=max_bytes)
    return iter_second_moments(inputs, inputs.batches, layers, max_bytes=max_bytes)


def _masks(model: nn.Module, batches: Batches) -> Iterator[Tensor | None]:
    for _, kwargs in iter_calls(model, batches):
        mask = kwargs.get("attention_mask")
        yield mask if isinstance(mask, Tensor) and mask.ndim == 2 else None


def names_within(stage: Stage, names: Sequence[str]) -> list[str]:
    """Names of layers relative to the stage's block."""
    prefix = f"{stage.name}." if stage.name else ""
    return [name.removeprefix(prefix) for name in names]
