"""What a model gives to one of its blocks, kept to be replayed, and what the block makes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from splitquant_plugins.errors import InputError
from splitquant_plugins.passes.calibration import Batches, evaluating, iter_calls, naming_batch, only_input
from splitquant_plugins.passes.outputs import output_tensor
from splitquant_plugins.passes.token_masks import MaskFinder, TokenMasks

Call = tuple[tuple[Any, ...], dict[str, Any]]


class BlockInputs(nn.Module):
    """A block with the calls that the model makes of it, to be replayed; `batches` are the inputs of the replay.

    Only this block's inputs are held, not those of the model's other blocks.
    """

    def __init__(self, block: nn.Module, calls: Sequence[Call], masks: Sequence[TokenMasks]) -> None:
        super().__init__()
        self.block = block
        self.calls = calls
        self.masks = masks
        self.batches = [{"index": index, "masks": each} for index, each in enumerate(masks)]

    @classmethod
    def captured(cls, model: nn.Module, block: nn.Module, batches: Batches) -> BlockInputs:
        """What the model as it is calls the block with on each batch."""
        return cls(block, capture_inputs(model, block, batches), masks_of(model, iter_calls(model, batches)))

    def forward(self, index: int, masks: TokenMasks | None = None) -> Any:
        """Replay a call; the masks are only for those who collect statistics."""
        args, kwargs = detached(self.calls[index])
        return self.block(*args, **kwargs)


def masks_of(model: nn.Module, calls: Iterable[Call]) -> list[TokenMasks]:
    """Which tokens count in each of the model's calls."""
    finder = MaskFinder(model)
    with evaluating(model):
        return [finder.masks(*call) for call in calls]


class BlockReached(Exception):  # noqa: N818 - control flow, not a failure
    """Ends a forward pass once all is seen that it was run for."""


def capture_inputs(model: nn.Module, block: nn.Module, batches: Batches) -> list[Call]:
    """The (args, kwargs) with which the model calls `block` on each batch, detached.

    Each forward pass is ended once the block is reached, so that only this block's inputs are held. Accepts
    batches as `calibration.iter_second_moments` does. Raises InputError if the model never calls the block.
    """
    calls: list[Call] = []

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(detached((args, without_cache(kwargs))))
        raise BlockReached

    handle = block.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with evaluating(model), keeping_no_cache(model), torch.no_grad():
            for number, (args, kwargs) in enumerate(iter_calls(model, batches), start=1):
                try:
                    with naming_batch(number, model):
                        model(*args, **kwargs)
                except BlockReached:
                    continue
                raise InputError("the model did not call the block whose inputs were to be captured")
    finally:
        handle.remove()
    if not calls:
        raise InputError("no calibration batches: the iterable is empty (or a one-shot iterator was used up)")
    return calls


class _AllSeen(Exception):  # noqa: N818 - control flow, not a failure
    pass


@torch.no_grad()
def replay(
    block: nn.Module, replayed: Call, layers: Mapping[str, nn.Module], times: Mapping[str, int] | None = None
) -> tuple[dict[str, list[Tensor]], Any]:
    """What the layers get while a call of the block is replayed, call by call, and the block's output.

    There is one copy where layers share a tensor. `times`: how often each layer is called; once all are, what comes
    behind them is not computed, and the output is None.
    """
    found: dict[str, list[Tensor]] = {name: [] for name in layers}
    last: tuple[Tensor, int, Tensor] | None = None
    missing = sum(times.values()) if times and all(times.values()) else -1

    def hook_of(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal last, missing
            given = only_input(name, args, kwargs)
            if last is None or given is not last[0] or given._version != last[1]:
                last = given, given._version, given.clone()
            found[name].append(last[2])
            missing -= times is not None and len(found[name]) <= times[name]
            if missing == 0:
                raise _AllSeen

        return hook

    with evaluating(block), ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.callback(layer.register_forward_pre_hook(hook_of(name), with_kwargs=True).remove)
        args, kwargs = detached(replayed)
        try:
            return found, block(*args, **kwargs)
        except _AllSeen:
            return found, None


@contextmanager
def added_to_outputs(layer: nn.Module, change: Tensor) -> Iterator[None]:
    """A layer's outputs, and so what comes of them, with something added, for the time of the block."""

    def hook(_: nn.Module, _inputs: Any, result: Tensor) -> Tensor:
        return result + change

    handle = layer.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def block_outputs(block: nn.Module, inputs: Sequence[Call]) -> list[Tensor]:
    """The block's output for each call, detached; from the float block these are `tune_block`'s targets."""
    with evaluating(block), torch.no_grad():
        return [output_tensor(block(*args, **kwargs)).clone() for args, kwargs in map(detached, inputs)]


def rounding_tolerance(dtype: torch.dtype) -> float:
    """How far from its exact value a block's arithmetic may leave a value, as a part of the largest."""
    return max(1e-4, 4 * torch.finfo(dtype).eps)


@contextmanager
def keeping_no_cache(model: nn.Module) -> Iterator[None]:
    """No cache by the configurations of transformers, whose blocks would add to it in every replay."""
    configs: dict[int, Any] = {id(each): each for each in (getattr(one, "config", None) for one in model.modules())}
    caching = [config for config in configs.values() if getattr(config, "use_cache", False) is True]
    for config in caching:
        config.use_cache = False
    try:
        yield
    finally:
        for config in caching:
            config.use_cache = True


def without_cache(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments without a cache of keys and values, which every replay would add to."""
    none = {key: None for key in ("past_key_value", "past_key_values") if key in kwargs}
    return {**kwargs, **none, **({"use_cache": False} if "use_cache" in kwargs else {})}


def detached(value: Any) -> Any:
    """A copy of arguments, so that what changes its inputs in place does not change what is replayed."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: detached(item) for key, item in value.items()}
    # Not named tuples and other subclasses: their constructors differ.
    if type(value) in (tuple, list):
        return type(value)(detached(item) for item in value)
    return value
