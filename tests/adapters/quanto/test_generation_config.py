"""A quantized language model stops where the float one stopped."""

from __future__ import annotations

import json

import pytest
import splitquant_quanto

from splitquant_plugins import SplitQuantPass
from splitquant_plugins.errors import InputError

quanto = pytest.importorskip("optimum.quanto")
transformers = pytest.importorskip("transformers")


@pytest.fixture
def folder(models, tmp_path):
    model = models.gpt2()
    model.generation_config.eos_token_id = [7, 9]
    model.generation_config.max_new_tokens = 11
    SplitQuantPass()(model)
    quanto.quantize(model, weights=quanto.qint4)
    quanto.freeze(model)
    splitquant_quanto.save(model, tmp_path)
    return tmp_path


def test_w4_the_generation_config_travels(folder):
    loaded = splitquant_quanto.load(folder)
    assert isinstance(loaded, transformers.PreTrainedModel)
    assert (loaded.generation_config.eos_token_id, loaded.generation_config.max_new_tokens) == ([7, 9], 11)


def test_a_damaged_generation_config_is_named(folder):
    (folder / "generation_config.json").write_text(json.dumps({"max_new_tokens": -4}))
    with pytest.raises(InputError, match=r"generation_config\.json"):
        splitquant_quanto.load(folder)
