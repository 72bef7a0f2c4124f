"""A small classifier on disk, with a vocabulary, and texts for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from splitquant_plugins.cli.main import run

SIZES = {
    "vocab_size": 120,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables are as wide as they like, wherever the tests run."""
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def classifier(tmp_path: Path) -> Callable[..., Path]:
    """The maker of a classifier's folder, sharded where a size is given, with or without a vocabulary."""
    transformers = pytest.importorskip("transformers")

    def make(name: str = "float", *, shards: str | None = None, vocabulary: bool = True, **options: Any) -> Path:
        folder = tmp_path / name
        config = transformers.BertConfig(**{**SIZES, "num_labels": 3, "max_position_embeddings": 32, **options})
        model = transformers.BertForSequenceClassification(config)
        model.save_pretrained(folder, **({"max_shard_size": shards} if shards else {}))
        if vocabulary:
            words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{number}" for number in range(115))]
            (folder / "vocab.txt").write_text("\n".join(words) + "\n")
        return folder

    return make


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A csv with texts and labels."""
    rows = [f"w{number} w{number + 7} w{number % 5},{number % 3}" for number in range(12)]
    path = tmp_path / "texts.csv"
    path.write_text("text,label\n" + "\n".join(rows) + "\n")
    return path


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must fail, and return the one line that it says."""

    def check(*arguments: object) -> str:
        capsys.readouterr()
        assert run([str(argument) for argument in arguments]) == 2
        (line,) = [each for each in capsys.readouterr().err.splitlines() if "shards" not in each and each.strip()]
        assert line.startswith("splitquant: error: ")
        return line

    return check
