"""A causal language model with two-bit weights that is saved, comes back from disk, and writes the same text.

    python examples/language_model_and_back_from_disk.py
    python examples/language_model_and_back_from_disk.py --model FOLDER_OR_HUB_ID --texts FILE --prompt "Once upon"

Without `--model` it trains a small Llama first, in seconds and without a network. Needs `pip install ".[quanto]"`.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import small_models
import torch


@torch.no_grad()
def perplexity(model: Any, tokenizer: Any, texts: Sequence[str]) -> float:
    """Return the perplexity of texts, each on its own; those of a single token say nothing and are left out."""
    loss, tokens = 0.0, 0
    for text in texts:
        ids = tokenizer(text, truncation=True, return_tensors="pt").input_ids
        if ids.shape[1] > 1:
            loss += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
            tokens += ids.shape[1] - 1
    return math.exp(loss / tokens)


def continued(model: Any, tokenizer: Any, prompt: str) -> str:
    """Return what the model makes of a prompt, taking the likeliest token each time."""
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    tokens = model.generate(**inputs, max_new_tokens=12, do_sample=False, pad_token_id=tokenizer.pad_token_id or 0)
    text: str = tokenizer.decode(tokens[0])
    return text


def from_disk_and_back(name: str, texts: Sequence[str], prompt: str, saved: Path) -> dict[str, Any]:
    """Quantize a model plain and split, save the split one and load it; return perplexities, and both texts."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, QuantoConfig

    from splitquant_plugins import SplitQuantPass  # it is also what lets from_pretrained load what was split

    recipe = QuantoConfig(weights="int2")
    tokenizer = AutoTokenizer.from_pretrained(name)
    whole = AutoModelForCausalLM.from_pretrained(name)
    plain = AutoModelForCausalLM.from_pretrained(name, quantization_config=recipe)
    split = AutoModelForCausalLM.from_pretrained(name, quantization_config=SplitQuantPass() + recipe)
    split.save_pretrained(saved)
    again = AutoModelForCausalLM.from_pretrained(saved)
    models = {"float": whole, "INT2, plain": plain, "INT2, split": split, "INT2, split, from disk": again}
    return {
        "perplexity": {what: perplexity(model, tokenizer, texts) for what, model in models.items()},
        "before": continued(split, tokenizer, prompt),
        "after": continued(again, tokenizer, prompt),
    }


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Read the command line, run, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a causal language model: a folder or a Hub id")
    parser.add_argument("--texts", type=Path, help="a file with a text on each line, for --model")
    parser.add_argument("--prompt", default="the fox is", help="what the model is to go on with")
    options = parser.parse_args(arguments)
    if bool(options.model) != bool(options.texts):
        parser.error("--model and --texts go together")
    with tempfile.TemporaryDirectory() as folder:
        small = Path(folder, "small")
        texts = (
            options.texts.read_text("utf-8").splitlines() if options.texts else small_models.save_language_model(small)
        )
        found = from_disk_and_back(options.model or str(small), texts, options.prompt, Path(folder, "saved"))
    for what, value in found["perplexity"].items():
        print(f"{what}: perplexity {value:.3f}")
    print("The split model stores three parts of 2 bits for each weight. Before it was saved, and after:")
    print(f"  {found['before']}\n  {found['after']}")
    return found


if __name__ == "__main__":
    main()
