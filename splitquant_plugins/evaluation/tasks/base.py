"""What the commands ask of a kind of model; one flow measures and quantizes them all."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from splitquant_plugins.errors import ConfigError
from splitquant_plugins.evaluation.scores import Score

if TYPE_CHECKING:
    from splitquant_plugins.backends import Batch

CALIBRATION_INPUTS = 256


@dataclass(frozen=True)
class Kind:
    """A kind of model. `name` is the field `task` of rows, `quality` the measure that a user knows the model by.

    `measures` are those that it has of all that rows have.
    """

    name: str
    quality: str
    measures: tuple[str, ...]
    score: Callable[[], Score]


@dataclass(frozen=True)
class Examples:
    """What a model is measured on: `count` inputs in batches, and for each batch what would be right, if known."""

    name: str
    count: int
    batches: Sequence[Batch]
    targets: Sequence[Tensor] | None


class Task(ABC):
    """A model by its name, with the data that it takes."""

    kind: Kind
    has_tokenizer = False
    example_is_data = False
    """Whether only calibration data show what the model takes."""
    given_context: int | None = None
    """Tokens that a language model was asked to see at once."""

    def __init__(self, model: str) -> None:
        self.model = model

    @abstractmethod
    def load_model(self) -> nn.Module:
        """Load the float model, in evaluation mode."""

    @abstractmethod
    def examples(self, data: str, limit: int | None = None) -> Examples:
        """Read and check the data to measure on, `limit` inputs at most."""

    @abstractmethod
    def calibration(self, source: str, limit: int = CALIBRATION_INPUTS) -> Sequence[Batch]:
        """Read inputs to calibrate with; labels, if any, are not read."""

    @abstractmethod
    def example_batch(self, model: nn.Module) -> Batch | None:
        """Make inputs that the model takes, for backends that trace it; None where that takes data."""

    def stays_float(self, model: nn.Module) -> tuple[str, ...] | None:
        """Names of layers that are not to be quantized; None leaves the choice to the backend."""
        return None

    def check_options(self, **options: object) -> None:
        """Raise ConfigError for options that are given (not None and not False), and mean nothing here."""
        for name, value in options.items():
            if value is not None and value is not False:
                option = "--" + name.replace("_", "-")
                raise ConfigError(f"{option} is for language models, and {self.model} is of kind {self.kind.name}")
