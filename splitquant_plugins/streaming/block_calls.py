"""The calls of a model's blocks, each of which takes what the one before returns, without running any of them.

The model is run with blocks that return what they are given. What it calls each block with besides, as masks and
positions, is the same as in a real run, as long as it does not depend on what blocks return; that is tried.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from splitquant_plugins.decoupleq.capture import BlockReached, Call, keeping_no_cache, without_cache
from splitquant_plugins.errors import InputError
from splitquant_plugins.passes.calibration import evaluating, naming_batch
from splitquant_plugins.streaming.parameters import IN_MEMORY
from splitquant_plugins.streaming.spilled import Kept, Spill, loaded

# Kinds of values that nothing can be written into.
_PLAIN = (bool, int, float, complex, str, torch.dtype, torch.device, slice, Enum)

Blocks = Sequence[tuple[str, nn.Module]]


@dataclass
class BlockCalls:
    """For each batch what the first block gets, and for each block and batch the other arguments, kept in a `Spill`."""

    first: list[Kept] = field(default_factory=list)
    others: list[list[Any]] = field(default_factory=list)

    def of(self, block: int, hidden: Sequence[Kept]) -> Sequence[Call]:
        """The calls of a block with these inputs, each read when it is asked for."""
        return _Calls(hidden, self.others[block])


class _Calls(Sequence[Call]):
    """Calls by their number."""

    def __init__(self, hidden: Sequence[Kept], others: Sequence[Any]) -> None:
        self._hidden, self._others = hidden, others

    def __len__(self) -> int:
        return len(self._hidden)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[each] for each in range(*place.indices(len(self)))]
        args, kwargs = loaded(self._others[place])
        return (self._hidden[place].get(), *args), kwargs


def block_calls(
    model: nn.Module, blocks: Blocks, calls: Iterable[Call], spill: Spill, run_first: Callable[[Call], Any]
) -> BlockCalls:
    """Find the calls of all blocks; `run_first` runs the first block, whose kind of output all are to have.

    The model needs the values of what comes before its blocks only. Raises InputError where a block is not given what
    the one before returns, as its first argument, or depends on it in another way.
    """
    found = BlockCalls(others=[[] for _ in blocks])
    as_output: Callable[[Tensor], Any] | None = None
    with evaluating(model), keeping_no_cache(model), torch.no_grad():
        for number, (args, kwargs) in enumerate(calls, start=1):
            with naming_batch(number, model):
                if as_output is None:
                    (hidden, rest, named), *_ = _observed(model, blocks[:1], (args, kwargs), lambda values: values)
                    as_output = _kind_of(run_first(((hidden, *rest), named)), blocks[0][0])
                    _refuse_other_ties(model, blocks, (args, kwargs), as_output)
                seen = _observed(model, blocks, (args, kwargs), as_output)
            found.first.append(spill.keep(seen[0][0]))
            for others, kept in zip(found.others, _kept_once([each[1:] for each in seen], spill), strict=True):
                others.append(kept)
    if not found.first:
        raise InputError("no calibration batches: the iterable is empty (or a one-shot iterator was used up)")
    return found


Seen = tuple[Tensor, tuple[Any, ...], dict[str, Any]]


def _observed(model: nn.Module, blocks: Blocks, call: Call, as_output: Callable[[Tensor], Any]) -> list[Seen]:
    """Hidden states and other arguments of each block in one call of the model, which ends behind the last."""
    seen: list[Seen] = []
    last: Tensor | None = None

    def stand_in(number: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal last
            name = blocks[number][0]
            hidden = args[0] if args else None
            if not isinstance(hidden, Tensor) or len(seen) != number or (number and hidden is not last):
                raise InputError(
                    f"{name} is not called once, with what the block before returns as its first argument, and only "
                    f"such blocks are solved one at a time; {IN_MEMORY}"
                )
            seen.append((hidden.detach().clone(), args[1:], without_cache(kwargs)))
            if len(seen) == len(blocks):
                raise BlockReached
            last = hidden.clone()
            return as_output(last)

        return forward

    with ExitStack() as put_back:
        for number, (_, block) in enumerate(blocks):
            put_back.enter_context(_with_forward(block, stand_in(number)))
        args, kwargs = call
        try:
            model(*args, **kwargs)
        except BlockReached:
            return seen
    raise InputError(f"the model calls {len(seen)} of its {len(blocks)} blocks; {IN_MEMORY}")


@contextmanager
def _with_forward(block: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """A block that computes something else for a while."""
    before = block.__dict__.get("forward")
    block.__dict__["forward"] = forward
    try:
        yield
    finally:
        del block.__dict__["forward"]
        if before is not None:
            block.__dict__["forward"] = before


def _kind_of(output: Any, name: str) -> Callable[[Tensor], Any]:
    """What makes an output like this of hidden states."""
    if isinstance(output, Tensor):
        return lambda values: values
    if isinstance(output, tuple) and output and isinstance(output[0], Tensor) and not any(map(_is_set, output[1:])):
        return lambda values: (values, *output[1:])
    raise InputError(f"{name} returns more than hidden states ({type(output).__name__}); {IN_MEMORY}")


def _is_set(value: Any) -> bool:
    return value is not None


def _refuse_other_ties(model: nn.Module, blocks: Blocks, call: Call, as_output: Callable[[Tensor], Any]) -> None:
    """Raise where other arguments than the first change with what blocks return."""
    plain = _observed(model, blocks, call, as_output)
    changed = _observed(model, blocks, call, lambda values: as_output(_changed(values)))
    for (name, _), one, other in zip(blocks, plain, changed, strict=True):
        for value in (*one[1], *one[2].values()):
            _refuse_shared_objects(name, value)
        for before, again in zip(tree_leaves(one[1:]), tree_leaves(other[1:]), strict=True):
            if isinstance(before, Tensor) and not torch.equal(before, again):
                raise InputError(f"other arguments of {name} depend on what blocks before it return; {IN_MEMORY}")


def _refuse_shared_objects(name: str, value: Any) -> None:
    """Raise for an argument that one block may write into, and another read."""
    if type(value) in (tuple, list, dict) and value:
        for item in value.values() if isinstance(value, dict) else value:
            _refuse_shared_objects(name, item)
    elif value is not None and not isinstance(value, (Tensor, *_PLAIN)) and type(value) is not tuple:
        raise InputError(f"{name} is given a {type(value).__name__}, which blocks may share values by; {IN_MEMORY}")


def _changed(values: Tensor) -> Tensor:
    """Other values in the same tensor: it has to be the one that the next block is given."""
    return values.add_(1)


def _kept_once(arguments: Sequence[Any], spill: Spill) -> list[Any]:
    """Arguments of several blocks with their tensors kept, those that blocks share once."""
    kept: dict[int, Kept] = {}

    def keep(value: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in kept:
                kept[id(value)] = spill.keep(value.detach())
            return kept[id(value)]
        if isinstance(value, dict):
            return {key: keep(item) for key, item in value.items()}
        if type(value) in (tuple, list):
            return type(value)(keep(item) for item in value)
        return value

    return [keep(each) for each in arguments]
