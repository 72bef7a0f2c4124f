"""Models that are trained on the spot in seconds, for examples that need no network: a BERT, a Llama, a small net."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

ANIMALS = ["dog", "cat", "cow", "hen", "fox", "owl"]
PLACES = ["house", "barn", "tree", "pond", "hill", "gate"]
GOOD = ["happy", "warm", "kind", "calm", "bright", "gentle", "clever", "quick"]
BAD = ["sad", "cold", "cruel", "loud", "dark", "rough", "dull", "slow"]
WORDS = ["the", "a", "is", "and", "sees", "near", ".", *ANIMALS, *PLACES, *GOOD, *BAD]


def sentences(n: int, seed: int) -> list[str]:
    """Return `n` sentences of animals in places, three adjectives in each."""
    random = Random(seed)
    pick = random.choice
    return [
        f"the {pick(ANIMALS)} is {pick(GOOD + BAD)} and {pick(GOOD + BAD)} and sees "
        f"a {pick(GOOD + BAD)} {pick(ANIMALS)} near the {pick(PLACES)} ."
        for _ in range(n)
    ]


def is_friendly(sentence: str) -> bool:
    """Say whether most of a sentence's adjectives are good ones."""
    return sum((word in GOOD) - (word in BAD) for word in sentence.split()) > 0


def tokenizer_of_words(folder: Path) -> Any:
    """Return a tokenizer of WORDS, saved where `AutoTokenizer.from_pretrained` finds it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {word: number for number, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    words = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = ["input_ids", "attention_mask"]
    made = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", model_input_names=names
    )
    made.save_pretrained(folder)
    return made


def batches(n: int, size: int, steps: int) -> Iterator[Tensor]:
    """Yield the row numbers of each training step, drawn at random."""
    for _ in range(steps):
        yield torch.randint(n, (size,))


def train(model: nn.Module, loss_of: Callable[[Tensor], Tensor], *, n: int, steps: int, rate: float = 3e-3) -> None:
    """Train in place with Adam on `n` rows; `loss_of` takes the row numbers of a step."""
    optimizer = torch.optim.Adam(model.train().parameters(), lr=rate)
    for rows in batches(n, 32, steps):
        loss = loss_of(rows)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval().requires_grad_(False)


def save_bert(folder: Path, *, seed: int = 0, steps: int = 100) -> list[str]:
    """Train a BERT to tell friendly sentences, and save it in a folder; return sentences that it has not seen."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(seed)
    tokenizer = tokenizer_of_words(folder)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = BertForSequenceClassification(
        BertConfig(vocab_size=len(tokenizer), max_position_embeddings=32, num_labels=2, **sizes)
    )
    texts = sentences(512, seed)
    tokens = tokenizer(texts, return_tensors="pt").input_ids
    labels = torch.tensor([is_friendly(text) for text in texts]).long()
    train(model, lambda rows: model(input_ids=tokens[rows], labels=labels[rows]).loss, n=len(texts), steps=steps)
    model.save_pretrained(folder)
    return sentences(200, seed + 1)


def save_language_model(folder: Path, *, seed: int = 0, steps: int = 100) -> list[str]:
    """Train a Llama on sentences, and save it in a folder; return sentences that it has not seen."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    tokenizer = tokenizer_of_words(folder)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes))
    tokens = tokenizer(sentences(512, seed), return_tensors="pt").input_ids
    train(model, lambda rows: model(input_ids=tokens[rows], labels=tokens[rows]).loss, n=len(tokens), steps=steps)
    model.save_pretrained(folder)
    return sentences(40, seed + 1)


def stripes(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return noisy images of stripes [n, 3, 16, 16] in four directions, and the direction of each [n]."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (n,), generator=generator)
    rows, columns = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    ways = torch.stack([rows, columns, (rows + columns) / 2**0.5, (rows - columns) / 2**0.5])
    phase = 6.28 * torch.rand(n, 1, 1, generator=generator)
    images = torch.sin(1.6 * ways[labels] + phase)[:, None].repeat(1, 3, 1, 1)
    return images + 1.5 * torch.randn(images.shape, generator=generator), labels


def separable(inputs: int, outputs: int) -> nn.Sequential:
    """Return a depthwise and a pointwise convolution with BatchNorm, as mobile nets have them."""
    return nn.Sequential(
        nn.Conv2d(inputs, inputs, 3, padding=1, groups=inputs, bias=False),
        nn.BatchNorm2d(inputs),
        nn.ReLU(),
        nn.Conv2d(inputs, outputs, 1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


def convolutional_net(*, seed: int = 0, steps: int = 100) -> nn.Module:
    """Train a small net of depthwise-separable convolutions to tell the direction of stripes."""
    torch.manual_seed(seed)
    stem = [nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4)]
    model = nn.Sequential(*stem, separable(16, 32), separable(32, 32), *head)
    images, labels = stripes(512, seed)
    train(model, lambda rows: nn.functional.cross_entropy(model(images[rows]), labels[rows]), n=512, steps=steps)
    return model
