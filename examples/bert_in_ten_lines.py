"""A BERT with two-bit weights, by transformers and optimum-quanto: plain, and with the pass in front of the recipe.

    python examples/bert_in_ten_lines.py
    python examples/bert_in_ten_lines.py --model FOLDER_OR_HUB_ID --texts FILE      # a text on each line

Without `--model` it trains a small one first, in seconds and without a network. Needs `pip install ".[quanto]"`.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import small_models
import torch


@torch.no_grad()
def ten_lines(name: str, texts: Sequence[str]) -> dict[str, float]:
    """Return how far the logits of the quantized models are off the float model's, relative to those."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, QuantoConfig

    from splitquant_plugins import SplitQuantPass

    recipe = QuantoConfig(weights="int2")
    inputs = AutoTokenizer.from_pretrained(name)(list(texts), padding=True, truncation=True, return_tensors="pt")
    wanted = AutoModelForSequenceClassification.from_pretrained(name)(**inputs).logits
    errors = {}
    for what, quantization in {"plain": recipe, "split": SplitQuantPass() + recipe}.items():
        model = AutoModelForSequenceClassification.from_pretrained(name, quantization_config=quantization)
        errors[what] = float((model(**inputs).logits - wanted).norm() / wanted.norm())
    return errors


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Read the command line, run, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a text classifier: a folder or a Hub id")
    parser.add_argument("--texts", type=Path, help="a file with a text on each line, for --model")
    options = parser.parse_args(arguments)
    if bool(options.model) != bool(options.texts):
        parser.error("--model and --texts go together")
    with tempfile.TemporaryDirectory() as folder:
        texts = options.texts.read_text("utf-8").splitlines() if options.texts else small_models.save_bert(Path(folder))
        errors = ten_lines(options.model or folder, texts)
    for what, error in errors.items():
        print(f"INT2, {what}: logits {error:.2%} off those of the float model, on {len(texts)} texts")
    print("The split model stores three parts of 2 bits for each weight.")
    return errors


if __name__ == "__main__":
    main()
