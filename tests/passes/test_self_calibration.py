"""Text that a language model writes itself, as calibration data."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from splitquant_plugins import self_calibration
from splitquant_plugins.errors import ConfigError, InputError
from splitquant_plugins.passes.calibration import collect_second_moments

VOCABULARY = 11
BOS, EOS = 1, 2


class Chain(nn.Module):
    """A Markov chain: the next token depends on the last alone, with chances that are known."""

    def __init__(self, *, ends: bool = False, **config: Any) -> None:
        super().__init__()
        self.table = nn.Linear(VOCABULARY, VOCABULARY, bias=False)
        with torch.no_grad():
            self.table.weight.copy_(torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(7)))
            self.table.weight[EOS] = 0.0 if ends else -1e4
        self.dropout = nn.Dropout(0.9)
        self.config = SimpleNamespace(**{"bos_token_id": BOS, "eos_token_id": EOS, "vocab_size": VOCABULARY, **config})

    def forward(self, input_ids: Tensor) -> Any:
        hot = nn.functional.one_hot(input_ids, VOCABULARY).float()
        return SimpleNamespace(logits=self.dropout(self.table(hot)))


def tokens_of(batches: list[dict[str, Tensor]]) -> Tensor:
    return torch.cat([batch["input_ids"] for batch in batches])


def llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=24,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    return transformers.LlamaForCausalLM(config)


def test_text_follows_the_models_own_chances() -> None:
    model = Chain()
    tokens = tokens_of(self_calibration(model, sequences=300, length=100, seed=3))
    assert tokens.shape == (300, 100)
    assert tokens.dtype == torch.int64
    assert (tokens[:, 0] == BOS).all()
    pairs = torch.zeros(VOCABULARY, VOCABULARY)
    pairs.index_put_((tokens[:, :-1].flatten(), tokens[:, 1:].flatten()), torch.tensor(1.0), accumulate=True)
    found = pairs / pairs.sum(dim=1, keepdim=True).clamp(min=1)
    seen = pairs.sum(dim=1) > 1000
    wanted = model.table.weight.detach().T.softmax(dim=1)
    assert seen.sum() >= 5
    assert (found - wanted)[seen].abs().max() < 0.05


def test_a_temperature_sharpens() -> None:
    model = Chain()
    sharp = tokens_of(self_calibration(model, sequences=50, length=30, temperature=1e-3))
    assert (sharp == sharp[:1]).all()


def test_the_same_seed_gives_the_same_text_and_leaves_everything_as_it_was() -> None:
    model = Chain().train()
    model.dropout.eval()
    modes = [module.training for module in model.modules()]
    state = torch.random.get_rng_state()
    first = self_calibration(model, sequences=20, length=12, seed=5)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    torch.manual_seed(99)
    again = self_calibration(model, sequences=20, length=12, seed=5)
    other = self_calibration(model, sequences=20, length=12, seed=6)
    assert torch.equal(tokens_of(first), tokens_of(again))
    assert not torch.equal(tokens_of(first), tokens_of(other))


def test_what_comes_after_the_end_is_masked() -> None:
    batches = self_calibration(Chain(ends=True), sequences=64, length=30, batch_size=16)
    assert len(batches) == 4
    seen = 0
    for batch in batches:
        for tokens, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            ends = (tokens == EOS).nonzero().flatten().tolist()
            wanted = ends[0] + 1 if ends else 30
            seen += bool(ends)
            assert mask.tolist() == [1] * wanted + [0] * (30 - wanted)
            assert (tokens[wanted:] == EOS).all()
    assert seen > 10


def test_a_start_token_that_is_the_end_token_does_not_end_the_text() -> None:
    batches = self_calibration(Chain(bos_token_id=EOS), sequences=16, length=10)
    assert "attention_mask" not in batches[0]
    assert (tokens_of(batches)[:, 0] == EOS).all()


def test_prompts_are_gone_on_from_in_turns() -> None:
    prompts = torch.tensor([[3, 4, 5], [6, 7, 8]])
    tokens = tokens_of(self_calibration(Chain(), sequences=5, length=9, prompts=prompts))
    assert torch.equal(tokens[:, :3], prompts[[0, 1, 0, 1, 0]])
    assert tokens.shape == (5, 9)


def test_without_a_start_token_texts_start_anywhere() -> None:
    tokens = tokens_of(self_calibration(Chain(bos_token_id=None), sequences=60, length=4))
    assert len(tokens[:, 0].unique()) > 5


def test_the_cache_of_keys_and_values_changes_nothing() -> None:
    model = llama()
    cached = self_calibration(model, sequences=6, length=20, seed=1)
    forward = model.forward

    def without_cache(input_ids: Tensor) -> Any:
        return SimpleNamespace(logits=forward(input_ids=input_ids, use_cache=False).logits)

    model.forward = without_cache
    plain = self_calibration(model, sequences=6, length=20, seed=1)
    assert torch.equal(tokens_of(cached), tokens_of(plain))


def test_batches_serve_as_calibration_and_for_training() -> None:
    model = llama()
    batches = self_calibration(model, sequences=8, length=16, batch_size=4)
    layer = model.get_submodule("model.layers.0.mlp.down_proj")
    moments = collect_second_moments(model, batches, {"down": layer})
    assert moments["down"].samples == sum(int(b.get("attention_mask", torch.ones(4, 16)).sum()) for b in batches)
    torch.autograd.backward(model(**batches[0]).logits.sum())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"sequences": 0}, "sequences=0"),
        ({"length": 1}, "length=1"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"seed": "a"}, "seed='a': give a whole number"),
        ({"length": 3, "prompts": torch.ones(2, 3, dtype=torch.int64)}, "leave nothing to write"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        self_calibration(Chain(), **{"sequences": 4, "length": 8, **options})


def test_more_tokens_than_the_model_takes() -> None:
    with pytest.raises(ConfigError, match="at most 24 tokens"):
        self_calibration(llama(), sequences=2, length=25)


def test_a_model_that_sees_what_comes_later_is_refused() -> None:
    class BothWays(Chain):
        def forward(self, input_ids: Tensor) -> Any:
            found = super().forward(input_ids).logits
            return SimpleNamespace(logits=found + found.mean(dim=1, keepdim=True))

    with pytest.raises(InputError, match="no causal language model"):
        self_calibration(BothWays(), sequences=2, length=8)


def test_a_model_without_logits_for_tokens_is_refused() -> None:
    class Classifier(Chain):
        def forward(self, input_ids: Tensor) -> Any:
            return SimpleNamespace(logits=super().forward(input_ids).logits.mean(dim=1))

    with pytest.raises(InputError, match=r"found \(1, 11\)"):
        self_calibration(Classifier(), sequences=2, length=8)


def test_a_model_that_takes_no_token_ids_is_refused() -> None:
    with pytest.raises(InputError, match="Linear tells neither"):
        self_calibration(nn.Linear(4, 4), sequences=2, length=8)
    prompts = torch.ones(1, 1, dtype=torch.int64)
    with pytest.raises(InputError, match="Linear cannot write text"):
        self_calibration(nn.Linear(4, 4), sequences=2, length=8, prompts=prompts)


def test_logits_that_are_no_numbers_are_refused() -> None:
    model = Chain()
    with torch.no_grad():
        model.table.weight.fill_(float("nan"))
    with pytest.raises(InputError, match="NaN"):
        self_calibration(model, sequences=2, length=8)
