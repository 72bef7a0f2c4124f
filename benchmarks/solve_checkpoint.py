"""decoupleQ's layer stage of a checkpoint that is solved block by block, in a process limited to 8 GiB.

Run `python benchmarks/solve_checkpoint.py [--smoke] [--json FILE] [--folder DIR] [--layers 2] [--sequences 64]
[--fast]`. The checkpoint has the shape of Llama-3.2-1B (bfloat16, random weights with heavy tails), but for its number
of blocks, and is solved for INC's INT2 grid, a scale per channel, on sequences of 256 random tokens. `--fast` takes one
start, one round and one sweep in the place of the defaults. The limit is RLIMIT_DATA, see checkpoint.py. The time of a
block is that between two finished ones, or with one block that since the blocks' calls were known; the whole model has
16, and the row says what that comes to. Peak RSS is the process's (ru_maxrss), mapped files and libraries and all.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _harness import report
from checkpoint import LLAMA_1B, TINY, make_checkpoint

LIMIT = 8 << 30
TOKENS = 256
FAST = {"rounds": 1, "starts": (1.0,), "sweeps": 1}
PACKAGES = ("splitquant-plugins", "torch", "transformers", "numba")


def child(folder: Path, solved: Path, sequences: int, fast: bool) -> None:
    """Solve the checkpoint, and print what it took."""
    import torch

    from splitquant_plugins import DecoupleQPass, UniformGrid
    from splitquant_plugins.streaming import solve_checkpoint as module

    vocabulary = json.loads((folder / "config.json").read_text("utf-8"))["vocab_size"]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (sequences, TOKENS), generator=generator)
    solver = DecoupleQPass(calibration=[{"input_ids": row[None]} for row in ids], **(FAST if fast else {}))
    times = []
    save, find = module.Finished.save, module.block_calls

    def saving(*arguments: Any) -> None:
        save(*arguments)
        times.append(time.perf_counter())

    def finding(*arguments: Any) -> Any:
        found = find(*arguments)
        times.append(time.perf_counter())
        return found

    module.Finished.save, module.block_calls = saving, finding  # type: ignore[method-assign, assignment]
    started = time.perf_counter()
    manifest = module.solve_checkpoint(folder, solved, solver, grid=UniformGrid(2), ignore=("lm_head",))
    records = [layer.values for layer in manifest.layers if layer.values is not None and layer.values.samples]
    gained = [record.error_before / record.error_after for record in records]
    figures = {
        "layers": len(records),
        "error before / after": sum(gained) / len(gained),
        "seconds": time.perf_counter() - started,
        "seconds per block": times[-1] - times[-2],
        "before the first": times[0] - started,
        "peak RSS MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    print(json.dumps(figures), flush=True)


def run(smoke: bool, layers: int, sequences: int, fast: bool, folder: Path | None) -> list[dict[str, Any]]:
    """Make the checkpoint, and solve it in a process of its own."""
    work = Path(tempfile.mkdtemp(prefix="blocks.", dir=folder))
    try:
        sizes = TINY if smoke else LLAMA_1B
        parameters = make_checkpoint(work / "float", {**sizes, "num_hidden_layers": layers}, 1 << 29)
        here = [sys.executable, str(Path(__file__).resolve()), "--child", str(work)]
        here += ["--sequences", str(sequences), *(["--fast"] if fast else [])]

        def limit() -> None:
            resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT))

        done = subprocess.run(here, preexec_fn=limit, stdout=subprocess.PIPE, text=True, check=True)
        figures = json.loads(done.stdout.splitlines()[-1])
        row = {"blocks": layers, "million parameters": parameters / 1e6, "tokens": sequences * TOKENS, "fast": fast}
        row |= figures
        row["16 blocks, hours"] = (figures["before the first"] + 16 * figures["seconds per block"]) / 3600
        return [row]
    finally:
        shutil.rmtree(work)


def main() -> None:
    """Parse arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--fast", action="store_true")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child / "float", arguments.child / "solved", arguments.sequences, arguments.fast)
        return
    sequences = 2 if arguments.smoke else arguments.sequences
    rows = run(arguments.smoke, arguments.layers, sequences, arguments.fast, arguments.folder)
    report("decoupleQ's layer stage, block by block, at most 8 GiB", rows, arguments.json, PACKAGES)


if __name__ == "__main__":
    main()
