"""Calibration batches cut into the examples of training, some of them held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from splitquant_plugins.decoupleq.capture import detached
from splitquant_plugins.errors import InputError
from splitquant_plugins.passes.calibration import Batches, evaluating, iter_calls, naming_batch
from splitquant_plugins.passes.outputs import predictions

# Rows beyond this would make evaluations slower, hardly better.
_MOST_HELD_OUT = 64
# By how much the outputs of a row may differ in another batch, relative to the largest.
_SAME = 1e-3


@dataclass(frozen=True)
class Example:
    """The arguments of a call of the model, with the number of rows (sequences, images) in it."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    rows: int

    @property
    def batch(self) -> dict[str, Any] | tuple[Any, ...]:
        """As a batch of calibration data."""
        return self.kwargs if not self.args else self.args


def examples_of(model: nn.Module, batches: Batches, rows: int) -> list[Example]:
    """Cut batches into, and join them to, examples of at most `rows` rows, where the model treats rows alone.

    That is tried with the first batch of several rows; where outputs depend on the other rows, or a batch has no rows,
    batches stay whole. Batches of one shape are joined. Raises InputError for no batches, or ones that do not fit.
    """
    whole = [Example(args, kwargs, _rows(args, kwargs)) for args, kwargs in iter_calls(model, batches)]
    if not whole:
        raise InputError("no calibration batches: the iterable is empty (or a one-shot iterator was used up)")
    if not _rows_are_alone(model, whole):
        return whole
    open_examples: dict[str, Example] = {}
    found: list[Example] = []
    for example in whole:
        for start in range(0, example.rows, rows):
            piece = _rows_of(example, start, min(start + rows, example.rows))
            shape = _signature(piece)
            joined = _joined(open_examples.pop(shape), piece) if shape in open_examples else piece
            if joined.rows > rows:
                found.append(_rows_of(joined, 0, rows))
                joined = _rows_of(joined, rows, joined.rows)
            if joined.rows == rows:
                found.append(joined)
            else:
                open_examples[shape] = joined
    return found + list(open_examples.values())


def held_out_of(examples: Sequence[Example], part: float, seed: int) -> tuple[list[int], list[int]]:
    """Places of the examples to train on, and of those held out: about this part of the rows, at least one example.

    A single example serves as both.
    """
    if len(examples) == 1:
        return [0], [0]
    wanted = min(part * sum(example.rows for example in examples), _MOST_HELD_OUT)
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    count, rows = 0, 0
    while count < len(order) - 1 and (rows < wanted or not count):
        rows += examples[order[count]].rows
        count += 1
    return sorted(order[count:]), sorted(order[:count])


def _rows(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    first = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.ndim), None)
    return 1 if first is None else len(first)


def _rows_of(example: Example, start: int, stop: int) -> Example:
    def cut(value: Any) -> Any:
        return value[start:stop] if isinstance(value, Tensor) and value.ndim and len(value) == example.rows else value

    kwargs = {name: cut(value) for name, value in example.kwargs.items()}
    return Example(tuple(cut(value) for value in example.args), kwargs, stop - start)


def _signature(example: Example) -> str:
    """What two examples must have in common to be joined."""

    def said(value: Any) -> str:
        if isinstance(value, Tensor) and value.ndim and len(value) == example.rows:
            return f"{value.dtype}{tuple(value.shape[1:])}"
        # Other values must be the same object.
        return f"{type(value).__name__} {value if isinstance(value, (int, float, str)) else id(value)}"

    given = [*enumerate(example.args), *example.kwargs.items()]
    return "; ".join(f"{name}: {said(value)}" for name, value in given)


def _joined(first: Example, second: Example) -> Example:
    def cat(one: Any, other: Any) -> Any:
        is_rows = isinstance(one, Tensor) and one.ndim and len(one) == first.rows and len(other) == second.rows
        return torch.cat([one, other]) if is_rows else one

    kwargs = {name: cat(value, second.kwargs[name]) for name, value in first.kwargs.items()}
    args = tuple(cat(*pair) for pair in zip(first.args, second.args, strict=True))
    return Example(args, kwargs, first.rows + second.rows)


def _rows_are_alone(model: nn.Module, examples: Sequence[Example]) -> bool:
    """Whether the first row of a batch has the same output by itself, and the outputs have the inputs' rows."""
    number = next((place for place, example in enumerate(examples) if example.rows > 1), None)
    if number is None:
        return all(_has_rows(model, example) for example in examples[:1])
    example = examples[number]
    with evaluating(model), torch.no_grad(), naming_batch(number + 1, model):
        together = predictions(_called(model, example))[0]
        if not together.ndim or len(together) != example.rows:
            return False
        first = _rows_of(example, 0, 1)
        try:
            alone = predictions(_called(model, first))[0]
        except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError):
            return False
    same = alone.shape == together[:1].shape
    return same and bool((alone - together[:1]).abs().max() <= _SAME * together.abs().max())


def _called(model: nn.Module, example: Example) -> Any:
    return model(*detached(example.args), **detached(example.kwargs))


def _has_rows(model: nn.Module, example: Example) -> bool:
    """Whether a single row comes back as a single row: only then may such batches be joined."""
    with evaluating(model), torch.no_grad(), naming_batch(1, model):
        output = predictions(_called(model, example))[0]
    return output.ndim > 1 and len(output) == 1
