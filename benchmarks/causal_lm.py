"""Two-bit weights of a small causal language model: plain rounding, HQQ, GPTQ and decoupleQ.

    python benchmarks/causal_lm.py [--steps 2000] [--seed 0] [--model FOLDER] [--json FILE] [--smoke]

A Llama of 4 layers and width 256 learns the documentation strings of Python's standard library, byte by byte, from
random weights; this takes most of the time. `--model` keeps the trained weights in a folder, and takes them from
there in later runs. Then its layers (not the head) are quantized to 2 bits with a scale and a zero for 64 inputs, by
Intel Neural Compressor, with the same 128 calibration sequences for all methods that use any, and the perplexity per
byte is measured on text that was not trained on. Needs the extra inc; quanto's HQQ is added where quanto is installed.
"""

from __future__ import annotations

import argparse
import ast
import copy
import math
import sysconfig
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from _harness import report
from torch import Tensor, nn

from splitquant_plugins import DecoupleQPass
from splitquant_plugins.backends import Backend, QuantizedModel, WeightFormat, WeightRequest
from splitquant_plugins.evaluation.peak_memory import PeakMemory
from splitquant_plugins.plugins import Plugins

LENGTH = 128
FULL = {"layers": 4, "width": 256, "calibration": 128, "evaluation": 256, "batch": 8}
SMOKE = {"layers": 2, "width": 64, "calibration": 4, "evaluation": 4, "batch": 2}
PACKAGES = ("splitquant-plugins", "torch", "transformers", "neural-compressor", "optimum-quanto")


def docstrings(enough: int | None = None) -> list[str]:
    """The documentation strings of the standard library, in the order of its files; no module is imported.

    `enough`: so many, or a few more.
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = [path for path in folder.rglob("*.py") if not {"site-packages", "test", "tests"} & set(path.parts)]
    found = []
    for path in sorted(files):
        if enough is not None and len(found) >= enough:
            break
        try:
            tree = ast.parse(path.read_text("utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                text = ast.get_docstring(node)
                if text and len(text) > 40:
                    found.append(text)
    return found


def token_ids(texts: list[str]) -> tuple[Tensor, Tensor]:
    """Bytes of the texts as two streams: every tenth text for evaluation, the others for training."""
    streams = []
    for chosen in ([t for i, t in enumerate(texts) if i % 10], texts[::10]):
        streams.append(torch.tensor(list("\n\n".join(chosen).encode()), dtype=torch.int64))
    return streams[0], streams[1]


def model_of(layers: int, width: int) -> nn.Module:
    """A Llama with a byte vocabulary and random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=False,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    model: nn.Module = LlamaForCausalLM(config)
    return model


def train(model: nn.Module, stream: Tensor, steps: int, batch: int, seed: int) -> None:
    """AdamW with a warm-up and a cosine, next-byte cross entropy."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.01)
    warm_up = max(steps // 20, 1)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min((step + 1) / warm_up, 0.5 * (1 + math.cos(math.pi * step / steps)))
        starts = torch.randint(len(stream) - LENGTH - 1, (batch,), generator=generator)
        ids = torch.stack([stream[start : start + LENGTH] for start in starts.tolist()])
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step} of {steps}: loss {float(loss.detach()):.3f}", flush=True)
    model.eval()


def sequences(stream: Tensor, number: int, batch: int = 8) -> list[dict[str, Tensor]]:
    """Sequences evenly spread over a stream, in batches."""
    starts = torch.linspace(0, len(stream) - LENGTH, number).long().tolist()
    ids = torch.stack([stream[start : start + LENGTH] for start in starts])
    return [{"input_ids": part} for part in ids.split(batch)]


@torch.no_grad()
def perplexity(run: Any, batches: list[dict[str, Tensor]]) -> float:
    """Perplexity per byte."""
    total, count = 0.0, 0
    for batch in batches:
        logits, ids = run(batch)[:, :-1].float(), batch["input_ids"][:, 1:]
        loss = nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), ids.reshape(-1), reduction="sum")
        total, count = total + float(loss), count + ids.numel()
    return math.exp(total / count)


def trained_model(folder: Path | None, stream: Tensor, sizes: dict[str, int], steps: int, seed: int) -> nn.Module:
    """Train a model, or take it from the folder, where it is kept for the next run."""
    from safetensors.torch import load_file, save_file

    torch.manual_seed(seed)
    model = model_of(sizes["layers"], sizes["width"])
    path = None if folder is None else folder / f"causal_lm_{steps}_{seed}.safetensors"
    if path is not None and path.is_file():
        model.load_state_dict(load_file(path))
        return model.eval()
    train(model, stream, steps, sizes["batch"], seed)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(model.state_dict(), path)
    return model


def ways(plugins: Plugins, calibration: list[dict[str, Tensor]]) -> list[tuple[str, Backend, WeightFormat, Any]]:
    """Title, backend, format and pass of each row."""
    inc = plugins.backend("inc")

    def form(method: str) -> WeightFormat:
        return inc.resolve(WeightRequest("int2", "group", 64, "affine", method))

    def solver(**options: Any) -> DecoupleQPass:
        return DecoupleQPass(calibration=calibration, plugins=plugins, **options)

    rows: list[tuple[str, Backend, WeightFormat, Any]] = [
        ("RTN", inc, form("rtn"), None),
        ("HQQ", inc, form("hqq"), None),
        ("GPTQ", inc, form("gptq"), None),
        ("decoupleQ", inc, form("rtn"), solver()),
        ("decoupleQ, blocks tuned", inc, form("rtn"), solver(tune_blocks=True)),
    ]
    if find_spec("optimum") is not None and find_spec("optimum.quanto") is not None:
        quanto = plugins.backend("quanto")
        rows.append(("HQQ, quanto's groups of 128", quanto, quanto.resolve(WeightRequest("int2", method="hqq")), None))
    return rows


def run(smoke: bool = False, steps: int = 2000, seed: int = 0, folder: Path | None = None) -> list[dict[str, Any]]:
    """Train, quantize in every way and measure; a row for each."""
    sizes = SMOKE if smoke else FULL
    training, held_out = token_ids(docstrings(200 if smoke else None))
    started = time.perf_counter()
    model = trained_model(folder, training, sizes, 2 if smoke else steps, seed)
    seconds = time.perf_counter() - started
    calibration = sequences(training, sizes["calibration"])
    evaluation = sequences(held_out, sizes["evaluation"])
    fp32 = perplexity(lambda batch: model(**batch).logits, evaluation)
    rows: list[dict[str, Any]] = [
        {"values": "FP32", "perplexity": fp32, "bits/weight": 32.0, "seconds": seconds, "peak MB": None}
    ]
    for title, backend, form, first in ways(Plugins.load(), calibration):
        twin = copy.deepcopy(model)
        started = time.perf_counter()
        with PeakMemory() as memory:
            quantized: QuantizedModel = backend.quantize(twin, form, first, calibration)
        seconds = time.perf_counter() - started
        weights = [(stored.bits, stored.weight.numel()) for parts in quantized.layers.values() for stored in parts]
        rows.append(
            {
                "values": title,
                "perplexity": perplexity(quantized.run, evaluation),
                "bits/weight": sum(bits for bits, _ in weights) / sum(number for _, number in weights),
                "layers": quantized.layers_quantized,
                "seconds": seconds,
                "peak MB": memory.megabytes,
            }
        )
        print(f"{title}: {rows[-1]['perplexity']:.4f}", flush=True)
    return rows


def main() -> None:
    """Parse arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    rows = run(arguments.smoke, arguments.steps, arguments.seed, arguments.model)
    n = (SMOKE if arguments.smoke else FULL)["evaluation"] * (LENGTH - 1)
    report(f"INT2, group 64: perplexity per byte on {n} bytes, seed {arguments.seed}", rows, arguments.json, PACKAGES)


if __name__ == "__main__":
    main()
