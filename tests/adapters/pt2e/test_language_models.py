"""Models that would return a cache of keys and values beside their logits are exported without it."""

from __future__ import annotations

import copy

import torch
from splitquant_pt2e.backend import Pt2eBackend

from splitquant_plugins.backends import WeightRequest


def test_c3_gpt2_is_quantized_saved_and_loaded(models, split, tmp_path):
    model = models.gpt2()
    ids = torch.arange(24).reshape(2, 12) % 99
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    backend = Pt2eBackend()
    quantized = backend.quantize(copy.deepcopy(model), backend.resolve(WeightRequest("int8")), split(), [batch])
    found = quantized.run(batch)
    with torch.no_grad():
        assert float((found - model(**batch).logits).abs().max()) < 0.05
    backend.save(quantized, tmp_path)
    assert torch.equal(backend.load(tmp_path)(**batch).logits, found)
