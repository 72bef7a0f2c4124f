"""A float model with what it is measured on, and its own outputs there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from splitquant_plugins.backends import run_of
from splitquant_plugins.errors import InputError, first_line
from splitquant_plugins.evaluation.kept import Kept
from splitquant_plugins.evaluation.tasks.base import Examples, Kind, Task

if TYPE_CHECKING:
    from splitquant_plugins.backends import Batch

Figures = dict[str, "float | int | None"]
# Called with the part of the batches that is done, 0 to 1.
Told = Callable[[float], object]


@dataclass(frozen=True)
class Subject:
    """A float model of a kind, its examples, and its logits on each batch of them.

    `figures` are the float model's own measures. `ignore` names the layers that are to stay float, None where that is
    the backend's choice.
    """

    name: str
    kind: Kind
    model: nn.Module
    examples: Examples
    logits: Sequence[Tensor]
    figures: Figures
    ignore: tuple[str, ...] | None = None

    def measure(self, run: Callable[[Batch], Tensor], told: Told = lambda part: None) -> Figures:
        """Run a quantized model over the examples, and measure its outputs beside the float model's."""
        return _measured(self.kind, self.examples, self.logits, run, told)


def make_subject(
    name: str,
    kind: Kind,
    model: nn.Module,
    examples: Examples,
    ignore: tuple[str, ...] | None = None,
    told: Told = lambda part: None,
) -> Subject:
    """Run a float model over examples; InputError where it does not take them, or they do not fit its outputs."""
    run = run_of(model)

    def logits_of(number: int) -> Tensor:
        try:
            return run(examples.batches[number])
        except InputError:
            raise
        except Exception as error:  # whatever a model, which may be the user's own, makes of its inputs
            raise InputError(f"{name} cannot be run on {examples.name}: {first_line(error)}") from None

    logits: Kept[Tensor] = Kept(len(examples.batches), logits_of)
    figures = _measured(kind, examples, logits, None, told)
    return Subject(name, kind, model, examples, logits, figures, ignore)


def load_task_subject(task: Task, data: str, limit: int | None = None, told: Told = lambda part: None) -> Subject:
    """Read the data of a task, load its model, and run the one over the other."""
    examples = task.examples(data, limit)
    model = task.load_model()
    return make_subject(task.model, task.kind, model, examples, task.stays_float(model), told)


def _measured(
    kind: Kind, examples: Examples, logits: Sequence[Tensor], run: Callable[[Batch], Tensor] | None, told: Told
) -> Figures:
    score = kind.score()
    told(0.0)
    for number in range(len(examples.batches)):
        reference = logits[number]
        found = reference if run is None else run(examples.batches[number])
        score.add(reference, found, None if examples.targets is None else examples.targets[number])
        told((number + 1) / len(examples.batches))
    return score.figures()
