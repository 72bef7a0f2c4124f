"""decoupleQ's layer stage of a checkpoint that is solved block by block, in a process limited to 8 GiB.

Run `python benchmarks/solve_checkpoint.py [--smoke] [--json FILE] [--folder DIR] [--sequences 64] [--fast]`. The
checkpoint has the shape of Llama-3.2-1B (bfloat16, random weights with heavy tails; 1.24 billion parameters), and one
of its blocks is solved for an INT2 grid, a scale per channel, on sequences of 256 random tokens. `--fast` takes one
start, one round and one sweep in the place of the defaults. The limit is RLIMIT_DATA, see checkpoint.py. The block's
time is that since the blocks' calls were known; all 16 have the same shapes, and the row says what that comes to.
Peak RSS is the process's (ru_maxrss), mapped files and libraries and all.
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
from contextlib import suppress
from pathlib import Path
from typing import Any

from _harness import report
from checkpoint import LLAMA_1B, TINY, make_checkpoint

LIMIT = 8 << 30
TOKENS = 256
FAST = {"rounds": 1, "starts": (1.0,), "sweeps": 1}
PACKAGES = ("splitquant-plugins", "torch", "transformers", "numba")


class Enough(Exception):  # noqa: N818 - control flow, not a failure
    """One block is solved."""


def child(folder: Path, solved: Path, sequences: int, fast: bool) -> None:
    """Solve the checkpoint, and print what it took."""
    import torch

    from splitquant_plugins import DecoupleQPass, UniformGrid
    from splitquant_plugins.streaming import solve_checkpoint as module

    vocabulary = json.loads((folder / "config.json").read_text("utf-8"))["vocab_size"]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (sequences, TOKENS), generator=generator)
    solver = DecoupleQPass(calibration=[{"input_ids": row[None]} for row in ids], **(FAST if fast else {}))
    times, records = [], {}
    save, find = module.Finished.save, module.block_calls

    def saving(finished: Any, number: int, tensors: Any, found: dict[str, Any]) -> None:
        save(finished, number, tensors, found)
        times.append(time.perf_counter())
        records.update(found)
        raise Enough

    def finding(*arguments: Any) -> Any:
        found = find(*arguments)
        times.append(time.perf_counter())
        return found

    module.Finished.save, module.block_calls = saving, finding  # type: ignore[method-assign, assignment]
    started = time.perf_counter()
    with suppress(Enough):
        module.solve_checkpoint(folder, solved, solver, grid=UniformGrid(2), ignore=("lm_head",))
    gained = [record["error_before"] / record["error_after"] for record in records.values()]
    figures = {
        "layers": len(records),
        "error before / after": sum(gained) / len(gained),
        "seconds of the block": times[1] - times[0],
        "of its solver": sum(record["seconds"] for record in records.values()),
        "before it": times[0] - started,
        "peak RSS MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    print(json.dumps(figures), flush=True)


def run(smoke: bool, sequences: int, fast: bool, folder: Path | None) -> list[dict[str, Any]]:
    """Make the checkpoint, and solve it in a process of its own."""
    work = Path(tempfile.mkdtemp(prefix="blocks.", dir=folder))
    try:
        sizes = TINY if smoke else LLAMA_1B
        parameters = make_checkpoint(work / "float", sizes, 1 << 29)
        here = [sys.executable, str(Path(__file__).resolve()), "--child", str(work)]
        here += ["--sequences", str(sequences), *(["--fast"] if fast else [])]

        def limit() -> None:
            resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT))

        done = subprocess.run(here, preexec_fn=limit, stdout=subprocess.PIPE, text=True, check=True)
        figures = json.loads(done.stdout.splitlines()[-1])
        row = {"million parameters": parameters / 1e6, "tokens": sequences * TOKENS, "fast": fast, **figures}
        blocks = sizes["num_hidden_layers"]
        row["hours for all"] = (figures["before it"] + blocks * figures["seconds of the block"]) / 3600
        return [row]
    finally:
        shutil.rmtree(work)


def main() -> None:
    """Parse arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--fast", action="store_true")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child / "float", arguments.child / "solved", arguments.sequences, arguments.fast)
        return
    sequences = 2 if arguments.smoke else arguments.sequences
    rows = run(arguments.smoke, sequences, arguments.fast, arguments.folder)
    report("decoupleQ's layer stage, block by block, at most 8 GiB", rows, arguments.json, PACKAGES)


if __name__ == "__main__":
    main()
