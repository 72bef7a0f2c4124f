"""A word-level vocabulary: the words of the training texts, one token each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
PAD, UNKNOWN, START, END = range(len(SPECIAL))


class Vocabulary:
    """Words that occur at least `least` times in the texts; any other becomes [UNK]."""

    def __init__(self, texts: Iterable[str], least: int = 5) -> None:
        counts = Counter(word for text in texts for word in text.split())
        words = sorted(word for word, count in counts.items() if count >= least)
        self._ids = {word: number for number, word in enumerate((*SPECIAL, *words))}

    def __len__(self) -> int:
        return len(self._ids)

    def __call__(self, texts: Sequence[str], max_length: int = 64, **_: object) -> dict[str, Tensor]:
        """Return `input_ids` and `attention_mask`, int64 [texts, longest], as a tokenizer would."""
        rows = [
            [START, *(self._ids.get(word, UNKNOWN) for word in text.split()[: max_length - 2]), END] for text in texts
        ]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [PAD] * (longest - len(row)) for row in rows])
        return {"input_ids": ids, "attention_mask": (ids != PAD).long()}
