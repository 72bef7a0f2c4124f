"""Two stored bits of causal language models: what each method leaves of the float model, and in what time.

    python benchmarks/two_bits.py [--story FOLDER --texts FOLDER] [--model FOLDER] [--group-size N] [--seeds 1]
        [--first-seed 0] [--only 'METHOD; METHOD'] [--json FILE] [--rows FILE] [--smoke]

Two models: the Llama that causal_lm.py trains on docstrings (`--model` keeps its weights between runs), and with
`--story` a folder of transformers with `--texts`, which holds calibration.txt and test.txt, a document per line. All
Linears but the head are quantized on INC's affine grid; every method sees the same 128 calibration sequences. AutoRound
takes layers only whose sides are multiples of 32: where there are others, the methods it is compared with are measured
on its layers once more (`aligned`). A seed draws the calibration lines and is that of the methods. KL is to the float
model, per token of the test text, in nats. Bits are what INC's format stores for a weight, scales and zero points
included. Needs the extra inc; AutoRound's rows need auto-round.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from _harness import report
from causal_lm import FULL, LENGTH, SMOKE, docstrings, sequences, token_ids, trained_model
from torch import Tensor, nn

from splitquant_plugins import DecoupleQPass, SplitQuantPass, self_calibration
from splitquant_plugins.evaluation.peak_memory import PeakMemory
from splitquant_plugins.evaluation.scores import TokenScore
from splitquant_plugins.passes.base import ModelPass

PACKAGES = ("splitquant-plugins", "torch", "transformers", "neural-compressor", "auto-round")
LINES, TOKENS, TESTED = 128, 192, 200
# Sequences that a model writes itself, each as long as a text of the test.
OWN_SEQUENCES = 1024


@dataclass(frozen=True)
class Subject:
    """A float model with its texts; `ignore` names the layers that stay float."""

    name: str
    layers: str
    model: nn.Module
    tokenizer: Any
    calibration: list[dict[str, Tensor]]
    test: list[dict[str, Tensor]]
    ignore: tuple[str, ...]
    seed: int
    smoke: bool


@dataclass(frozen=True)
class Method:
    """A way to quantize: `run(model, subject, group_size)` returns the quantized model; `bits` of the format."""

    name: str
    bits: int
    parts: int
    run: Callable[[nn.Module, Subject, int], nn.Module]
    aligned: bool = False


def recipe(kind: str, bits: int, subject: Subject, group_size: int, **options: Any) -> Any:
    """INC's configuration, with the layers to ignore left float."""
    from neural_compressor.torch import quantization
    from splitquant_inc.weight_only import leave_float

    config = getattr(quantization, f"{kind}Config")(bits=bits, group_size=group_size, **options)
    leave_float(config, subject.ignore, subject.model)
    return config


def by_inc(config: Any, model: nn.Module, subject: Subject, first: ModelPass | None = None) -> nn.Module:
    """Prepare, show the calibration sequences, convert."""
    from neural_compressor.torch.quantization import convert, prepare

    example = subject.calibration[0]["input_ids"]
    options = {"example_inputs": example} if config.name == "awq" else {}
    prepared = prepare(model, config if first is None else first + config, **options)
    if config.name in ("gptq", "awq"):
        with torch.no_grad():
            for batch in subject.calibration:
                prepared(**batch)
    converted: nn.Module = convert(prepared)
    return converted


def stock(kind: str, bits: int, **options: Any) -> Callable[[nn.Module, Subject, int], nn.Module]:
    """INC's own method."""

    def run(model: nn.Module, subject: Subject, group_size: int) -> nn.Module:
        own = {"model_path": getattr(model, "name_or_path", "") or "."} if kind == "GPTQ" else {}
        symmetric = {} if kind == "HQQ" else {"use_sym": False}
        return by_inc(recipe(kind, bits, subject, group_size, **symmetric, **own, **options), model, subject)

    return run


def passes(
    bits: int, *, split: dict[str, Any] | None = None, values: dict[str, Any] | None = None, own_text: bool = False
) -> Callable[[nn.Module, Subject, int], nn.Module]:
    """This package's passes in front of INC's RTN."""

    def run(model: nn.Module, subject: Subject, group_size: int) -> nn.Module:
        batches = subject.calibration
        if own_text:
            sequences, length = (8, 16) if subject.smoke else (OWN_SEQUENCES, subject.test[0]["input_ids"].shape[1])
            batches = self_calibration(model, sequences=sequences, length=length, seed=subject.seed)
        less = {"block_steps": 2, "model_steps": 2} if subject.smoke else {}
        first: ModelPass | None = None if split is None else SplitQuantPass(**split)
        if values is not None:
            solver = DecoupleQPass(calibration=batches, seed=subject.seed, **values, **less)
            first = solver if first is None else first + solver
        config = recipe("RTN", bits, subject, group_size, use_sym=False)
        return by_inc(config, model, subject, first)

    return run


def auto_round(bits: int, steps: int, **options: Any) -> Callable[[nn.Module, Subject, int], nn.Module]:
    """AutoRound itself, of which INC does not hand on all options; it leaves rounded floats in the model."""

    def run(model: nn.Module, subject: Subject, group_size: int) -> nn.Module:
        from auto_round import AutoRound
        from transformers import ByT5Tokenizer

        scheme = {"bits": bits, "group_size": group_size, "sym": False, "data_type": "int", "act_bits": 16}
        single = [ids[None] for batch in subject.calibration for ids in batch["input_ids"]]
        tuned = AutoRound(
            model,
            tokenizer=subject.tokenizer or ByT5Tokenizer(),  # it wants one, though the data are tokens
            scheme=scheme,
            iters=2 if subject.smoke else steps,
            seqlen=max(ids.shape[1] for ids in single),
            nsamples=len(single),
            dataset=[{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in single],
            seed=subject.seed,
            amp=False,
            enable_torch_compile=False,
            device_map="cpu",
            **options,
        ).quantize()
        rounded: nn.Module = tuned[0].float().eval()
        return rounded

    return run


METHODS = (
    Method("RTN", 2, 1, stock("RTN", 2), aligned=True),
    Method("HQQ", 2, 1, stock("HQQ", 2, quant_zero=False)),
    Method("AWQ", 2, 1, stock("AWQ", 2, use_auto_scale=False)),
    Method("GPTQ", 2, 1, stock("GPTQ", 2, act_order=True)),  # INC's quantizes layers that are to stay float
    Method("AutoRound, 200 steps", 2, 1, auto_round(2, 200), aligned=True),
    Method("AutoRound, 1000 steps, extension", 2, 1, auto_round(2, 1000, enable_alg_ext=True), aligned=True),
    Method("decoupleQ", 2, 1, passes(2, values={}), aligned=True),
    Method("decoupleQ, blocks", 2, 1, passes(2, values={"tune_blocks": True}), aligned=True),
    Method(
        "decoupleQ, blocks and model, own text",
        2,
        1,
        passes(2, values={"tune_blocks": True, "tune_model": True}, own_text=True),
    ),
    Method("RTN", 4, 1, stock("RTN", 4)),
    Method("HQQ", 4, 1, stock("HQQ", 4, quant_zero=False)),
    Method("GPTQ", 4, 1, stock("GPTQ", 4, act_order=True)),
    Method("AutoRound, 200 steps", 4, 1, auto_round(4, 200)),
    Method("decoupleQ", 4, 1, passes(4, values={})),
    Method("k-means", 2, 2, passes(2, split={"k": 2, "splitter": "kmeans"})),
    Method("auto", 2, 2, passes(2, split={"k": 2})),
    Method("auto + decoupleQ", 2, 2, passes(2, split={"k": 2}, values={})),
    Method("auto + decoupleQ, blocks", 2, 2, passes(2, split={"k": 2}, values={"tune_blocks": True})),
    Method("k-means", 2, 3, passes(2, split={"k": 3, "splitter": "kmeans"})),
    Method("auto", 2, 3, passes(2, split={"k": 3})),
)


def next_logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Logits of the next token, [batch, tokens, vocabulary]."""
    with torch.no_grad():
        found: Tensor = model(**batch).logits[:, :-1].float()
    return found


def quality(model: nn.Module, subject: Subject, wanted: Sequence[Tensor]) -> dict[str, Any]:
    """KL to the float model, whose logits are `wanted`, per token, and perplexity."""
    score = TokenScore()
    for batch, reference in zip(subject.test, wanted, strict=True):
        score.add(reference, next_logits(model, batch), batch["input_ids"][:, 1:])
    figures = score.figures()
    return {"KL": figures["kl"], "perplexity": figures["perplexity"]}


def stored_bits(model: nn.Module) -> float | None:
    """Bits per weight that INC stores; None where the model holds rounded floats."""
    from splitquant_inc.stored_layers import stored_layers

    found = stored_layers(model)
    weights = sum(parts[0].weight.numel() for parts in found.values())
    return sum(part.bits for parts in found.values() for part in parts) / weights if weights else None


def unaligned(model: nn.Module) -> list[str]:
    """Names of the Linears that AutoRound leaves float."""
    from splitquant_inc.auto_round import MULTIPLE

    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return [name for name, each in linears if each.in_features % MULTIPLE or each.out_features % MULTIPLE]


def docstring_model(seed: int, folder: Path | None, smoke: bool) -> Subject:
    """The Llama of causal_lm.py."""
    sizes = SMOKE if smoke else FULL
    training, held_out = token_ids(docstrings(200 if smoke else None))
    model = trained_model(folder, training, sizes, 2 if smoke else 2000, 0)
    calibration = sequences(training[seed * LENGTH // 2 :], sizes["calibration"])
    test = sequences(held_out, sizes["evaluation"])
    return Subject("docstrings", "all", model, None, calibration, test, ("lm_head",), seed, smoke)


def story_model(seed: int, folder: Path, texts: Path, smoke: bool) -> Subject:
    """A causal language model of transformers, its head a tensor of its own."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    head = model.get_output_embeddings()
    # A quantizer that copies what it leaves float would untie it anyway, and differently.
    head.weight = nn.Parameter(head.weight.detach().clone())

    def batches(file: str, number: int, drawn: random.Random | None) -> list[dict[str, Tensor]]:
        lines = (texts / file).read_text("utf-8").splitlines()
        chosen = lines[:number] if drawn is None else drawn.sample(lines, min(number, len(lines)))
        found = [tokenizer(line, return_tensors="pt", truncation=True, max_length=TOKENS) for line in chosen]
        return [{"input_ids": each.input_ids} for each in found]

    calibration = batches("calibration.txt", 4 if smoke else LINES, random.Random(seed))
    test = batches("test.txt", 4 if smoke else TESTED, None)
    return Subject("story", "all", model, tokenizer, calibration, test, ("lm_head",), seed, smoke)


def subjects(arguments: argparse.Namespace, seed: int) -> Iterator[Subject]:
    """The models of a seed, and those with fewer layers quantized."""
    loaders = [lambda: docstring_model(seed, arguments.model, arguments.smoke)]
    if arguments.story:
        loaders.insert(0, lambda: story_model(seed, arguments.story, arguments.texts, arguments.smoke))
    for load in loaders:
        subject = load()
        yield subject
        more = unaligned(subject.model)
        if more:
            yield replace(subject, layers="aligned", ignore=(*subject.ignore, *more))


def measured(subject: Subject, method: Method, group_size: int, wanted: Sequence[Tensor]) -> dict[str, Any]:
    """A row; where the method fails, its error."""
    row: dict[str, Any] = {"model": subject.name, "layers": subject.layers, "method": method.name}
    row |= {"format": f"INT{method.bits}", "k": method.parts, "seed": subject.seed}
    twin = copy.deepcopy(subject.model)
    started, busy = time.perf_counter(), time.process_time()
    try:
        with PeakMemory() as memory:
            quantized = method.run(twin, subject, group_size).eval()
    except Exception as error:
        return {**row, "failed": f"{type(error).__name__}: {error}".partition("\n")[0][:120]}
    row["seconds"] = time.perf_counter() - started
    row["CPU seconds"] = time.process_time() - busy
    row["peak MB"] = memory.megabytes
    row["bits/weight"] = stored_bits(quantized)
    return row | quality(quantized, subject, wanted)


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows; with `--json`, a line of each is added to a file beside it as it comes (FILE.rows.jsonl)."""
    lines = None if arguments.json is None else arguments.json.with_suffix(".rows.jsonl")
    rows: list[dict[str, Any]] = []
    only = {name.strip() for name in arguments.only.split(";")} if arguments.only else None
    for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
        for subject in subjects(arguments, seed):
            wanted = [next_logits(subject.model, batch) for batch in subject.test]
            row = {"model": subject.name, "layers": subject.layers, "method": "FP32", "format": "", "k": 1}
            row |= {"seed": seed, "bits/weight": 32.0, **quality(subject.model, subject, wanted)}
            keep(row, rows, lines)
            for method in METHODS:
                name = f"{method.name}/{method.bits}/{method.parts}"
                if only is not None and not {method.name, name} & only:
                    continue
                if method.name.startswith("AutoRound") and find_spec("auto_round") is None:
                    continue
                if subject.layers == "aligned" and not method.aligned:
                    continue
                if method.name.startswith("AutoRound") and subject.layers == "all" and unaligned(subject.model)[1:]:
                    continue  # measured on its own layers
                keep(measured(subject, method, arguments.group_size, wanted), rows, lines)
    return rows


def keep(row: dict[str, Any], rows: list[dict[str, Any]], lines: Path | None) -> None:
    """Print a row, and add it to the others and to the file of lines: a long run may be cut."""
    print(json.dumps(row), flush=True)
    rows.append(row)
    if lines is not None:
        with lines.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per model and method, with the mean over seeds and how far apart they are."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in ("model", "layers", "method", "format", "k")), []).append(row)
    table = []
    for same in found.values():
        one = {key: value for key, value in same[0].items() if key != "seed"}
        good = [row for row in same if "KL" in row]
        for key in ("KL", "perplexity", "seconds", "CPU seconds", "peak MB"):
            values = [row[key] for row in good if row.get(key) is not None]
            if values:
                one[key] = statistics.fmean(values)
        kls = [row["KL"] for row in good]
        one["KL from-to"] = f"{min(kls):.4g} to {max(kls):.4g}" if len(kls) > 1 else None
        one["n"] = len(good)
        table.append(one)
    return table


def main() -> None:
    """Parse arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--story", type=Path)
    parser.add_argument("--texts", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--group-size", type=int, default=-1)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--only")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--rows", type=Path, nargs="*", help="lines of earlier runs to put into the table, too")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    if bool(arguments.story) != bool(arguments.texts):
        parser.error("--story and --texts go together")
    with tempfile.TemporaryDirectory() as folder:
        arguments.model = arguments.model or Path(folder)
        rows = run(arguments)
    if arguments.rows:
        rows += [json.loads(line) for path in arguments.rows for line in path.read_text("utf-8").splitlines()]
    grid = "a scale per channel" if arguments.group_size == -1 else f"groups of {arguments.group_size}"
    seeds = sorted({row["seed"] for row in rows})
    title = f"Language models on INC's affine grid, {grid}; seeds {seeds[0]} to {seeds[-1]}"
    report(title, summary(rows), arguments.json, PACKAGES)


if __name__ == "__main__":
    main()
