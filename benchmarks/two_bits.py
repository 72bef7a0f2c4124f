"""Two stored bits per weight, as well as each method can: plain rounding, GPTQ, AutoRound, and decoupleQ by stages.

    python benchmarks/two_bits.py [--model FOLDER --text CALIBRATION,TEST] [--seeds 3] [--only NAME,NAME]
                                  [--own 1024] [--json FILE] [--smoke]

The model is that of causal_lm.py (trained first, which takes a while), or a causal language model of transformers in
FOLDER with two text files, one text a line. All layers but the head are quantized to 2 bits with one scale and zero per
output channel, through Intel Neural Compressor, from the same 128 calibration sequences; `own text` stands for as
many sequences as `--own` says, written by the model itself. Behind a split, k = 2 INT2 stand against INT4 of one part.
Measured is the divergence of the predictions from the float model's, mean over the tokens of 200 other sequences. The
seed draws the calibration sequences, orders training, and writes the text. AutoRound is measured where it is
installed. Needs the extra inc.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import causal_lm
import torch
from _harness import report
from torch import Tensor, nn

from splitquant_plugins import DecoupleQPass, SplitQuantPass, self_calibration
from splitquant_plugins.evaluation.peak_memory import PeakMemory

PACKAGES = ("splitquant-plugins", "torch", "transformers", "neural-compressor", "auto-round")
LONGEST = 192
Batches = list[dict[str, Tensor]]


@dataclass(frozen=True)
class Subject:
    """A float model, the calibration sequences to choose from, those to be measured on, and the name of its head."""

    model: nn.Module
    calibration: Batches
    test: Batches
    head: str

    def float_head(self) -> nn.Module:
        """A copy whose head shares no weight with the embedding."""
        twin = copy.deepcopy(self.model)
        head = twin.get_submodule(self.head)
        assert isinstance(head, nn.Linear)
        head.weight = nn.Parameter(head.weight.detach().clone())
        return twin


@dataclass(frozen=True)
class Way:
    """A row: how a copy of the model is quantized with calibration sequences and a seed, and the bits of its codes."""

    title: str
    bits: int
    quantize: Callable[[Subject, Batches, int], nn.Module]


def inc(recipe: str, bits: int, first: Callable[[Subject, Batches, int], Any] | None = None, **options: Any) -> Any:
    """Quantize through INC with a recipe of this name, behind a pass."""

    def quantize(subject: Subject, batches: Batches, seed: int) -> nn.Module:
        import neural_compressor.torch.quantization as nc

        config = getattr(nc, recipe)(bits=bits, use_sym=False, group_size=-1, **options)
        config.set_local(f".*{subject.head}.*", nc.RTNConfig(dtype="fp32"))
        chosen = config if first is None else first(subject, batches, seed) + config
        prepared = nc.prepare(subject.float_head(), chosen)
        if recipe == "GPTQConfig":
            for batch in batches:
                prepared(**batch)
        converted: nn.Module = nc.convert(prepared)
        return converted.eval()

    return quantize


def auto_round(steps: int, **options: Any) -> Any:
    """AutoRound's own entry, which leaves the rounded weights in the model."""

    def quantize(subject: Subject, batches: Batches, seed: int) -> nn.Module:
        from auto_round import AutoRound

        twin = subject.float_head()
        length = min(batch["input_ids"].shape[1] for batch in batches)
        dataset = [{"input_ids": batch["input_ids"][:, :length]} for batch in batches]
        settings = {"bits": 2, "group_size": -1, "sym": False, "iters": steps, "batch_size": 8, "seed": seed, **options}
        data = {"dataset": dataset, "nsamples": len(dataset), "seqlen": length}
        rounder = AutoRound(twin, None, layer_config={subject.head: {"bits": 16}}, device_map="cpu", **settings, **data)
        quantized, _ = rounder.quantize()
        return quantized.eval()

    return quantize


def decoupleq(**options: Any) -> Any:
    """A factory of the pass; `own` instead of calibration sequences: so many of the model's own."""
    own = options.pop("own", None)

    def make(subject: Subject, batches: Batches, seed: int) -> DecoupleQPass:
        if own:
            length = batches[0]["input_ids"].shape[1]
            batches = self_calibration(subject.model, sequences=own, length=length, seed=seed)
        return DecoupleQPass(calibration=batches, seed=seed, **options)

    return make


def split(**options: Any) -> Any:
    """Two parts by k-means, and decoupleQ behind."""
    return lambda *given: SplitQuantPass(k=2) + decoupleq(**options)(*given)


def ways(own: int, fast: bool = False) -> list[Way]:
    """The rows; `fast` cuts all training short."""
    few = {"block_steps": 2, "model_steps": 2} if fast else {}
    blocks, model = {"tune_blocks": True, **few}, {"tune_model": True, **few}
    rows = [
        Way("RTN", 2, inc("RTNConfig", 2)),
        Way("GPTQ, act_order", 2, inc("GPTQConfig", 2, act_order=True)),
        Way("decoupleQ, layers", 2, inc("RTNConfig", 2, decoupleq())),
        Way("decoupleQ, blocks", 2, inc("RTNConfig", 2, decoupleq(**blocks))),
        Way("decoupleQ, blocks, own text", 2, inc("RTNConfig", 2, decoupleq(own=own, **blocks))),
        Way("decoupleQ, blocks and model, own text", 2, inc("RTNConfig", 2, decoupleq(own=own, **{**blocks, **model}))),
        Way("RTN INT4", 4, inc("RTNConfig", 4)),
        Way("decoupleQ INT4", 4, inc("RTNConfig", 4, decoupleq())),
        Way("k = 2 INT2, decoupleQ, layers", 4, inc("RTNConfig", 2, split())),
        Way("k = 2 INT2, decoupleQ, blocks", 4, inc("RTNConfig", 2, split(**blocks))),
    ]
    if find_spec("auto_round") is not None:
        rows[2:2] = [
            Way("AutoRound, 200 steps", 2, auto_round(200)),
            Way("AutoRound, 1000 steps, algorithm extension", 2, auto_round(1000, enable_alg_ext=True)),
        ]
    return rows


@torch.no_grad()
def predictions(model: nn.Module, batches: Batches) -> list[Tensor]:
    """Log-chances of the next token, [tokens, vocabulary], per batch."""
    return [model(**batch).logits[:, :-1].float().log_softmax(-1).flatten(0, 1) for batch in batches]


def divergence(wanted: list[Tensor], found: list[Tensor]) -> float:
    """KL(float || quantized), mean over the tokens."""
    total = sum(float((one.exp() * (one - two)).sum()) for one, two in zip(wanted, found, strict=True))
    return total / sum(len(one) for one in wanted)


def story_subject(folder: str, text: str) -> Subject:
    """A model of transformers, and texts for it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)

    def read(path: str, number: int) -> Batches:
        lines = Path(path).read_text("utf-8").splitlines()[:number]
        ids = [tokenizer(line, return_tensors="pt", truncation=True, max_length=LONGEST).input_ids for line in lines]
        return [{"input_ids": one} for one in ids]

    calibration, test = text.split(",")
    return Subject(
        AutoModelForCausalLM.from_pretrained(folder).eval(), read(calibration, 1000), read(test, 200), "lm_head"
    )


def docstring_subject(smoke: bool, folder: Path | None) -> Subject:
    """The model of causal_lm.py, and bytes of documentation for it."""
    sizes = causal_lm.SMOKE if smoke else causal_lm.FULL
    training, held_out = causal_lm.token_ids(causal_lm.docstrings(200 if smoke else None))
    model = causal_lm.trained_model(folder, training, sizes, 2 if smoke else 2000, 0)
    calibration = causal_lm.sequences(training, 4 if smoke else 512, 1)
    return Subject(model, calibration, causal_lm.sequences(held_out, 4 if smoke else 200), "lm_head")


def run(subject: Subject, chosen: list[Way], seeds: int, number: int = 128) -> list[dict[str, Any]]:
    """A row for each way, over the seeds."""
    wanted = predictions(subject.model, subject.test)
    rows = []
    for way in chosen:
        found, seconds, memory = [], [], 0.0
        for seed in range(seeds):
            torch.manual_seed(seed)
            order = torch.randperm(len(subject.calibration)).tolist()
            batches = [subject.calibration[place] for place in order[:number]]
            started = time.perf_counter()
            with PeakMemory() as peak:
                quantized = way.quantize(subject, batches, seed)
            seconds.append(time.perf_counter() - started)
            memory = max(memory, peak.megabytes)
            found.append(divergence(wanted, predictions(quantized, subject.test)))
            print(f"{way.title}, seed {seed}: {found[-1]:.4f}, {seconds[-1]:.0f} s", flush=True)
        rows.append(
            {
                "values": way.title,
                "bits of codes": way.bits,
                "KL": statistics.mean(found),
                "spread": max(found) - min(found),
                "seconds": statistics.mean(seconds),
                "peak MB": memory,
            }
        )
    return rows


def main() -> None:
    """Parse arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--text")
    parser.add_argument("--docstring-model", type=Path, help="folder where causal_lm.py kept its model")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only")
    parser.add_argument("--own", type=int, default=1024)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    if bool(arguments.model) != bool(arguments.text):
        raise SystemExit("--model and --text go together")
    if arguments.model:
        subject = story_subject(arguments.model, arguments.text)
    else:
        subject = docstring_subject(arguments.smoke, arguments.docstring_model)
    chosen = ways(4 if arguments.smoke else arguments.own, arguments.smoke)
    if arguments.only:
        chosen = [way for way in chosen if way.title in arguments.only.split(",")]
    rows = run(subject, chosen, 1 if arguments.smoke else arguments.seeds, 4 if arguments.smoke else 128)
    tokens = sum(batch["input_ids"][:, 1:].numel() for batch in subject.test)
    title = f"Divergence from FP32 on {tokens} tokens, INT2 per channel through INC, seeds 0 to {arguments.seeds - 1}"
    report(title, rows, arguments.json, PACKAGES)


if __name__ == "__main__":
    main()
