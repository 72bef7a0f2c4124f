"""A BERT-Tiny, trained from scratch with plain AdamW."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from splitquant_plugins.checkpoints.transformers_models import require_transformers
from splitquant_plugins.progress import track


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread: enough for so small a model, quick on a busy machine too, and repeatable."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def bert_tiny(vocabulary: int, labels: int, positions: int = 64) -> nn.Module:
    """Return BERT-Tiny as published (2 layers, 128 wide, 2 heads, 512 inside) with fresh weights and a head."""
    transformers = require_transformers()
    config = transformers.BertConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=512,
        max_position_embeddings=positions,
        num_labels=labels,
    )
    model: nn.Module = transformers.BertForSequenceClassification(config)
    return model


@one_thread()
def train(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    labels: Tensor,
    *,
    steps: int,
    seed: int,
    batch_size: int = 32,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.01,
    progress: bool = False,
) -> nn.Module:
    """Train in place with AdamW, a tenth of the steps warming up and the rate then falling to 0; return the model.

    `inputs` are [n, length] int64, `labels` [n]. The order of the rows follows from `seed`; dropout
    uses torch's global random state.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    model.train()
    order = torch.empty(0, dtype=torch.long)
    for _ in track(range(steps), "training a BERT-Tiny", enabled=progress):
        if len(order) < batch_size:
            order = torch.randperm(len(labels), generator=generator)
        batch, order = order[:batch_size], order[batch_size:]
        used = int(inputs["attention_mask"][batch].sum(dim=1).max())
        output = model(**{name: tensor[batch, :used] for name, tensor in inputs.items()}, labels=labels[batch])
        optimizer.zero_grad()
        output.loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval().requires_grad_(False)
