"""Shared modules and tied weights: split once, shared as before."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from splitquant_plugins import SplitQuantPass, manifest_of
from splitquant_plugins.modules import SplitLinear


def storage(model: nn.Module) -> int:
    return sum(t.numel() for t in {t.data_ptr(): t for t in model.parameters()}.values())


def test_a_shared_module_is_split_once(models, assert_same_function):
    model = models.tied()
    reference = copy.deepcopy(model)
    model = SplitQuantPass()(model)
    assert isinstance(model.first, SplitLinear)
    assert model.first is model.again
    first, _ = manifest_of(model).layers
    assert (first.name, first.also_known_as) == ("first", ("again",))
    assert_same_function(model, reference, torch.randn(3, 6))


def test_tied_weights_share_their_parts(models, assert_same_function):
    model = models.tied()
    reference = copy.deepcopy(model)
    model = SplitQuantPass()(model)
    _, twin = manifest_of(model).layers
    assert twin.shared_with == "first"
    assert model.twin is not model.first
    for one, other in zip(model.first.parts(), model.twin.parts(), strict=True):
        assert one.weight is other.weight
    assert torch.equal(model.twin.bias, reference.twin.bias)  # biases were never tied
    assert torch.equal(model.first.bias, reference.first.bias)
    assert storage(model) <= 3 * storage(reference)
    assert_same_function(model, reference, torch.randn(3, 6))


def test_one_gradient_step_moves_both(models):
    model = SplitQuantPass()(models.tied())
    model(torch.randn(3, 6)).sum().backward()
    with torch.no_grad():
        model.first.lower.weight -= model.first.lower.weight.grad
    assert torch.equal(model.first.weight, model.twin.weight)


def test_a_shared_parent(assert_same_function):
    block = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model = nn.Sequential(block, block)
    reference = copy.deepcopy(model)
    model = SplitQuantPass()(model)
    (record,) = manifest_of(model).layers
    assert (record.name, record.also_known_as) == ("0.0", ("1.0",))
    assert model[0][0] is model[1][0]
    assert_same_function(model, reference, torch.randn(3, 4))


def test_tied_convolutions():
    model = nn.Sequential(nn.Conv1d(4, 4, 3, bias=False), nn.Conv1d(4, 4, 3, bias=False))
    model[1].weight = model[0].weight
    model = SplitQuantPass()(model)
    assert model[0].upper.weight is model[1].upper.weight


def test_layers_of_one_size_are_not_taken_for_tied():
    model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(3)))
    model[2].weight = nn.Parameter(model[0].weight.detach().clone())
    model = SplitQuantPass()(model)
    assert all(record.shared_with is None for record in manifest_of(model).layers)
    assert model[0].lower.weight is not model[2].lower.weight


def test_a_tied_layer_that_stays_whole():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    nn.init.zeros_(model[0].weight)
    model[1].weight = model[0].weight
    model = SplitQuantPass()(model)
    assert [record.name for record in manifest_of(model).kept] == ["0", "1"]
    assert model[0].weight is model[1].weight


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 6)
        self.body = nn.Linear(6, 6)
        self.head = nn.Linear(6, 20, bias=False)
        self.head.weight = self.words.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.words(tokens)))


def test_a_head_tied_to_an_embedding_is_kept():
    model = SplitQuantPass()(Tied())
    (reason,) = (record.reason for record in manifest_of(model).kept if record.name == "head")
    assert "embedding words" in reason
    assert "untie_embeddings" in reason
    assert model.head.weight is model.words.weight
    assert isinstance(model.body, SplitLinear)


def test_untying_splits_the_head_and_leaves_the_embedding(assert_same_function):
    model = Tied()
    reference, embedding = copy.deepcopy(model), model.words.weight
    model = SplitQuantPass(untie_embeddings=True)(model)
    assert isinstance(model.head, SplitLinear)
    assert model.words.weight is embedding
    assert torch.equal(embedding, reference.words.weight)
    assert torch.equal(model.head.weight, embedding)
    assert_same_function(model, reference, torch.arange(12).reshape(3, 4))


def test_transformers_heads(models, tokens, assert_same_function):
    reference = models.gpt2()
    kept = SplitQuantPass()(copy.deepcopy(reference))
    assert kept.lm_head.weight is kept.transformer.wte.weight
    assert "untie_embeddings" in next(r.reason for r in manifest_of(kept).kept if r.name == "lm_head")
    untied = SplitQuantPass(untie_embeddings=True)(copy.deepcopy(reference))
    assert isinstance(untied.lm_head, SplitLinear)
    assert untied.config.tie_word_embeddings is False
    assert torch.equal(untied.transformer.wte.weight, reference.transformer.wte.weight)
    for model in (kept, untied):
        model.tie_weights()
        assert_same_function(model, reference, tokens)


def test_untying_without_a_tie_changes_nothing(models):
    model = SplitQuantPass(untie_embeddings=True)(models.mlp())
    assert len(manifest_of(model).split) == 3


@pytest.mark.parametrize("jobs", [1, 2])
def test_the_order_of_names_does_not_matter(jobs):
    model = nn.ModuleDict({"b": nn.Linear(4, 4), "a": nn.Linear(4, 3), "c": nn.Linear(4, 4)})
    model["c"].weight = model["b"].weight
    model = SplitQuantPass(jobs=jobs)(model)
    assert [(r.name, r.shared_with) for r in manifest_of(model).layers] == [("b", None), ("a", None), ("c", "b")]
