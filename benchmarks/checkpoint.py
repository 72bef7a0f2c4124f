"""`splitquant quantize` on a generated, sharded checkpoint of Llama's shape, in a process limited to 2 GiB.

Run `python benchmarks/checkpoint.py [--smoke] [--json FILE] [--folder DIR] [--rows NAME,NAME] [--layers N]`. The
checkpoint has the shape of Llama-3.2-1B (1.24 billion bfloat16 parameters, tied embeddings; fewer with --layers) and
random weights with heavy tails; it and one output take 6 GB in a temporary folder, which is removed afterwards. Rows
are the paper's k-means and the default split, quanto INT4 with k = 2 and INT2 with k = 3, and a budget of stored bits
in place of k. All layers are quantized; the head, which is tied, stays whole. Loops are compiled before, by a small
checkpoint. --in-memory adds the same rows without streaming.

The limit is RLIMIT_DATA, which on Linux counts all private writable memory of the process: heap, anonymous
mappings and thread stacks, touched or not. Allocations beyond it fail. Peak RSS is what the kernel reports for the
process (ru_maxrss), libraries and all. Seconds are those of the whole command, start of Python included.
GB/s counts bytes read and written.
"""

from __future__ import annotations

import argparse
import math
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from _harness import report

from splitquant_plugins.checkpoints.files import write_json
from splitquant_plugins.checkpoints.headers import TensorSpec, longest_header
from splitquant_plugins.checkpoints.source import INDEX_FILE
from splitquant_plugins.manifest import Manifest
from splitquant_plugins.streaming.writer import ShardWriter

LIMIT = 2 << 30
LLAMA_1B = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
TINY = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}
ROWS = {
    "int4-kmeans": ("--weights", "int4", "--split", "kmeans", "--k", "2"),
    "int4-auto": ("--weights", "int4", "--split", "auto", "--k", "2"),
    "int2-kmeans": ("--weights", "int2", "--split", "kmeans", "--k", "3"),
    "int2-auto": ("--weights", "int2", "--split", "auto", "--k", "3"),
    # Three parts of 2 bits with their scales and shifts store 7.5 bits.
    "int2-budget": ("--weights", "int2", "--split", "auto", "--budget", "6.5"),
}
# Loading is outside the limit: it holds the whole model.
CHECK = """
import sys, torch
from splitquant_quanto import load
model = load(sys.argv[1])
with torch.no_grad():
    logits = model(torch.tensor([[1, 2, 3]])).logits
assert bool(torch.isfinite(logits).all())
"""


def make_checkpoint(folder: Path, sizes: dict[str, int], shard_bytes: int) -> int:
    """Write a sharded checkpoint of random weights, a block at a time; return its number of parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**sizes, tie_word_embeddings=True, dtype="bfloat16")
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    specs = {name: TensorSpec(torch.bfloat16, tuple(p.shape)) for name, p in model.named_parameters()}
    folder.mkdir(parents=True)
    shards: list[list[str]] = [[]]
    for name, spec in specs.items():
        if shards[-1] and sum(specs[n].bytes for n in shards[-1]) + spec.bytes > shard_bytes:
            shards.append([])
        shards[-1].append(name)
    generator = torch.Generator().manual_seed(0)
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with ShardWriter(folder / file, longest_header([(name, specs[name]) for name in names])) as writer:
            for name in names:
                writer.add(name, specs[name], _random(specs[name], generator))
                weight_map[name] = file
            writer.finish()
            writer.publish()
    total = sum(spec.bytes for spec in specs.values())
    write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
    write_json(folder / "config.json", {**config.to_dict(), "architectures": ["LlamaForCausalLM"]})
    return total // 2


def _random(spec: TensorSpec, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Normal values whose deviation is log-normal: heavier tails than a normal distribution's, as weights have."""
    left = torch.Size(spec.shape).numel()
    while left:
        block = torch.randn(min(left, 1 << 22), generator=generator)
        if len(spec.shape) == 1:  # the scales of a norm
            block = 1 + 0.1 * block
        else:
            block *= 0.02 * torch.randn(len(block), generator=generator).mul_(0.5).exp_()
        yield block.to(spec.dtype)
        left -= len(block)


def measure(command: list[str], limit: int | None) -> tuple[float, int]:
    """Run a command, with its private writable memory limited; return seconds and peak RSS in bytes."""

    def confine() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    started = time.perf_counter()
    process = subprocess.Popen(command, preexec_fn=confine)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
    return time.perf_counter() - started, usage.ru_maxrss * 1024


def run(
    smoke: bool,
    folder: Path | None = None,
    jobs: int = 2,
    in_memory: bool = False,
    rows: Sequence[str] = tuple(ROWS),
    layers: int | None = None,
) -> list[dict[str, Any]]:
    """Generate, quantize and load; `smoke` takes a tiny checkpoint that shows only that everything runs."""
    unknown = [name for name in rows if name not in ROWS]
    if unknown:
        raise SystemExit(f"no row {unknown[0]!r}; choose from {', '.join(ROWS)}")
    work = Path(tempfile.mkdtemp(prefix="checkpoint.", dir=folder))
    try:
        sizes, shard = (TINY, 500_000) if smoke else (LLAMA_1B, 1 << 30)
        if layers is not None:
            sizes = {**sizes, "num_hidden_layers": layers}
        parameters = make_checkpoint(work / "float", sizes, shard)
        if not smoke:
            _compile(work, rows)
        found = []
        for name in rows:
            for stream in (True, False) if in_memory else (True,):
                found.append(_quantize(work, name, parameters, jobs, stream=stream))
        return found
    finally:
        shutil.rmtree(work)


def _compile(work: Path, rows: Sequence[str]) -> None:
    """Let the first run after an installation, which compiles its loops, be another one."""
    make_checkpoint(work / "small", TINY, 500_000)
    for name, options in ROWS.items():
        subprocess.run(
            [*_command(work / "small", work / f"small-{name}", 1), *options], check=True, capture_output=True
        )


def _command(source: Path, output: Path, jobs: int) -> list[str]:
    program = [sys.executable, "-c", "from splitquant_plugins.cli import main; main()", "quantize", str(source)]
    every_layer = ["--head", "-O", "untie_embeddings=false"]
    return [*program, "--backend", "quanto", *every_layer, "--jobs", str(jobs), "--output", str(output)]


def _quantize(work: Path, name: str, parameters: int, jobs: int, *, stream: bool) -> dict[str, Any]:
    output = work / "output"
    command = [*_command(work / "float", output, jobs), *ROWS[name], "--stream" if stream else "--no-stream"]
    limit = LIMIT if stream else None
    seconds, peak = measure(command, limit)
    loading, _ = measure([sys.executable, "-c", CHECK, str(output)], None)
    read, written = (_bytes(path) for path in (work / "float", output))
    manifest = Manifest.load(output)
    row = {
        "row": name,
        "way": "streamed" if stream else "in memory",
        "parameters": parameters,
        "limit, MiB": None if limit is None else limit >> 20,
        "seconds": seconds,
        "peak RSS, MiB": peak / 2**20,
        "gain, dB": _gain(manifest),
        "parts": "/".join(str(k) for k in sorted({layer.k for layer in manifest.split})),
        "written, GB": written / 1e9,
        "GB/s": (read + written) / 1e9 / seconds,
        "shards": len(list(output.glob("*.safetensors"))),
        "load and one step, s": loading,
    }
    shutil.rmtree(output)
    return row


def _gain(manifest: Manifest) -> float:
    """By how much less the error of the split weights is than that of whole ones on the same grid, in dB."""
    whole = sum(layer.error_whole or 0.0 for layer in manifest.split)
    split = sum(layer.error_split or 0.0 for layer in manifest.split)
    return 10 * math.log10(whole / split) if split else math.inf


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--json")
    parser.add_argument("--folder", type=Path, help="where the temporary files go")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--in-memory", action="store_true", help="also the same without streaming, for comparison")
    parser.add_argument("--rows", default=",".join(ROWS), help="which rows, of these")
    parser.add_argument("--layers", type=int, help="hidden layers of the model, 16 by default")
    arguments = parser.parse_args()
    names = arguments.rows.split(",")
    found = run(arguments.smoke, arguments.folder, arguments.jobs, arguments.in_memory, names, arguments.layers)
    report("A checkpoint of Llama's shape", found, arguments.json)
