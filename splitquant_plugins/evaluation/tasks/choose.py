"""Which kind of model it is, told from the model itself."""

from __future__ import annotations

from typing import Any

from splitquant_plugins.checkpoints.transformers_models import load_config, require_transformers
from splitquant_plugins.evaluation.python_functions import split_function
from splitquant_plugins.evaluation.tasks.base import Task
from splitquant_plugins.evaluation.tasks.image_classification import ImageClassification
from splitquant_plugins.evaluation.tasks.language_model import LanguageModel
from splitquant_plugins.evaluation.tasks.module import Module
from splitquant_plugins.evaluation.tasks.text_classification import OtherTextModel, TextClassification


def task_of(
    model: str,
    *,
    context: int | None = None,
    stride: int | None = None,
    head: bool = False,
    by_length: bool = False,
) -> Task:
    """Return the task of a transformers folder or Hub id, by the architecture it names, or of FILE.py:FUNCTION.

    `context`, `stride` and `head` are for language models, and a ConfigError elsewhere. No weight is loaded yet.
    """
    task: Task
    if split_function(model) is not None:
        task = Module(model)
    else:
        names = set(getattr(load_config(model), "architectures", None) or ())
        if names & _architectures("CAUSAL_LM"):
            return LanguageModel(model, context=context, stride=stride, head=head)
        if names & _architectures("IMAGE_CLASSIFICATION"):
            task = ImageClassification(model)
        elif names and not names & _architectures("SEQUENCE_CLASSIFICATION"):
            task = OtherTextModel(model)
        else:
            task = TextClassification(model, by_length=by_length)
    task.check_options(context=context, stride=stride, head=head)
    return task


def _architectures(what: str) -> set[str]:
    """Class names of transformers' models of a kind."""
    known: Any = require_transformers().models.auto.modeling_auto
    found: set[str] = set()
    for names in getattr(known, f"MODEL_FOR_{what}_MAPPING_NAMES").values():
        found.update([names] if isinstance(names, str) else names)
    return found
