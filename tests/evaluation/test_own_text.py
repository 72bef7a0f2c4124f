"""`--calibration self`: text that the model to be quantized writes itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from splitquant_plugins.errors import InputError
from splitquant_plugins.evaluation.tasks.choose import task_of

transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


def test_a_language_model_writes_its_calibration_data(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**SIZES, max_position_embeddings=12)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    batches = task_of(str(tmp_path)).calibration("self", limit=20)
    tokens = torch.cat([batch["input_ids"] for batch in batches])
    assert tokens.shape == (20, 12)


def test_a_classifier_cannot(tmp_path: Path) -> None:
    config = transformers.BertConfig(**SIZES, max_position_embeddings=12)
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="cannot write text of its own"):
        task_of(str(tmp_path)).calibration("self", limit=4)
