"""Any PyTorch module: functions of the user's own files return the model, and its inputs with or without labels."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from splitquant_plugins.errors import InputError
from splitquant_plugins.evaluation.kept import Kept
from splitquant_plugins.evaluation.python_functions import call_function, split_function
from splitquant_plugins.evaluation.scores import ClassScore
from splitquant_plugins.evaluation.tasks.base import CALIBRATION_INPUTS, Examples, Kind, Task
from splitquant_plugins.evaluation.tasks.text_classification import CLASS_MEASURES

if TYPE_CHECKING:
    from splitquant_plugins.backends import Batch

MODULE = Kind("module", "accuracy", CLASS_MEASURES, ClassScore)
_BATCH_ROWS, _BATCH_VALUES = 128, 1 << 24
_RETURNS = "has to return inputs, or a pair of inputs and labels; inputs are a tensor, a tuple of tensors or a dict"


class Module(Task):
    """What FILE.py:FUNCTION returns, on what another such function returns.

    Inputs are a tensor [n, ...], a tuple of such tensors that the module takes by position, or a dict of those that it
    takes by name. Labels are whole numbers [n]; where there are none there is no accuracy. Outputs are [n, classes].
    """

    kind = MODULE
    example_is_data = True

    def __init__(self, model: str) -> None:
        super().__init__(model)
        self._loaded: nn.Module | None = None
        self._example: Batch | None = None

    def load_model(self) -> nn.Module:
        """Call the function, once, and take what it returns in evaluation mode."""
        if self._loaded is None:
            made = call_function(self.model)
            if not isinstance(made, nn.Module):
                raise InputError(f"{self.model}() returns a {type(made).__name__}: it has to return a torch.nn.Module")
            self._loaded = made.eval()
        return self._loaded

    def examples(self, data: str, limit: int | None = None) -> Examples:
        """Call the data's function, and cut what it returns into batches."""
        inputs, labels = self._inputs(data)
        batches = _batches(inputs, limit)
        count = sum(_rows(batch) for batch in batches)
        targets = None if labels is None else torch.split(labels[:count], [_rows(batch) for batch in batches])
        return Examples(data, count, batches, targets)

    def calibration(self, source: str, limit: int = CALIBRATION_INPUTS) -> Sequence[Batch]:
        """Call the function, and take the first inputs that it returns."""
        batches = _batches(self._inputs(source)[0], limit)
        self._example = batches[0]
        return batches

    def example_batch(self, model: nn.Module) -> Batch | None:
        """Return inputs of the calibration data, where there are any."""
        return self._example

    def _inputs(self, source: str) -> tuple[dict[str, Tensor], Tensor | None]:
        """The inputs by the names that the module takes them by, and the labels."""
        if split_function(source) is None:
            raise InputError(
                f"{self.model} is measured on what a function returns: give FILE.py:FUNCTION, not {source}"
            )
        made = call_function(source)
        inputs, labels = made if isinstance(made, (tuple, list)) and len(made) == 2 else (made, None)
        given = (inputs,) if isinstance(inputs, Tensor) else inputs
        values = list(given.values()) if isinstance(given, Mapping) else given
        if not isinstance(values, (tuple, list)) or not values or not all(isinstance(each, Tensor) for each in values):
            raise InputError(f"{source}() {_RETURNS}")
        sizes = {len(each) if each.ndim else 0 for each in values}
        if len(sizes) > 1:
            raise InputError(f"{source}(): inputs of {', '.join(map(str, sorted(sizes)))} rows do not go together")
        (count,) = sizes
        if not count:
            raise InputError(f"{source}() returns inputs without rows")
        by_name = dict(given) if isinstance(given, Mapping) else self._named(source, values)
        return by_name, None if labels is None else _labels(source, labels, count)

    def _named(self, source: str, values: Sequence[Tensor]) -> dict[str, Tensor]:
        """Give inputs by position the names that the module's forward has for them."""
        forward = inspect.signature(self.load_model().forward)
        try:
            bound = forward.bind(*values)
        except TypeError as error:
            raise InputError(
                f"{source}() returns {len(values)} inputs, which {self.model} does not take: {error}"
            ) from None
        for name in bound.arguments:
            kind = forward.parameters[name].kind
            if kind not in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY):
                raise InputError(f"{self.model} takes its input {name!r} without a name; give its forward a named one")
        return dict(bound.arguments)


def _labels(source: str, labels: Any, count: int) -> Tensor:
    try:
        found = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError):
        raise InputError(f"{source}() {_RETURNS}; these labels are a {type(labels).__name__}") from None
    if found.is_floating_point() or found.dtype == torch.bool:
        raise InputError(f"{source}(): labels are whole numbers, and these are {found.dtype}")
    if found.ndim < 1 or len(found) != count:
        raise InputError(f"{source}() returns {count} inputs and {len(found) if found.ndim else 1} labels")
    if int(found.min()) < 0:
        raise InputError(f"{source}(): label {int(found.min())} is below 0")
    return found.long()


def _batches(inputs: Mapping[str, Tensor], limit: int | None) -> Sequence[Batch]:
    """Cut inputs into batches of nearly the same size, small enough for memory.

    Each is copied whenever it is asked for: the module may write into its inputs, and is run on them again.
    """
    cut = {name: tensor[:limit] for name, tensor in inputs.items()}
    count = _rows(cut)
    values = sum(tensor[:1].numel() for tensor in cut.values())
    number = -(-count // max(2, min(_BATCH_ROWS, _BATCH_VALUES // max(values, 1))))
    pieces = {name: tensor.tensor_split(number) for name, tensor in cut.items()}
    return Kept(number, lambda index: {name: each[index].clone() for name, each in pieces.items()}, most=0)


def _rows(batch: Batch) -> int:
    return len(next(iter(batch.values())))
