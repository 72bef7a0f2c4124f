"""What the tasks on transformers models have in common, whatever the models take."""

from __future__ import annotations

from typing import Any

from torch import nn

from splitquant_plugins.checkpoints.transformers_models import load_config, load_model
from splitquant_plugins.evaluation.tasks.base import Task


class TransformersModel(Task):
    """A transformers model, by its folder or Hub id, with its configuration."""

    def __init__(self, model: str) -> None:
        super().__init__(model)
        self.config: Any = load_config(model)

    def load_model(self) -> nn.Module:
        """Load the architecture that the configuration names."""
        return load_model(self.model)

    def label_numbers(self) -> dict[str, int]:
        """The number of each class, by its name."""
        return {str(name): int(number) for number, name in self.config.id2label.items()}
