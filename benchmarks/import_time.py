"""What importing the package costs, beside importing torch, and that it pulls in neither it nor a backend.

Run `python benchmarks/import_time.py [--smoke] [--json FILE]`. Fresh processes in turn, `python -X importtime`.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
from typing import Any

from _harness import report

HEAVY = (
    *("torch", "sklearn", "numba", "llvmlite", "joblib", "matplotlib"),
    *("transformers", "optimum", "neural_compressor", "torchao"),
)


def run(smoke: bool, runs: int = 5) -> list[dict[str, Any]]:
    """Measure the package, its pass and torch alone."""
    statements = {
        "import splitquant_plugins": "import splitquant_plugins",
        "from splitquant_plugins import SplitQuantPass": "from splitquant_plugins import SplitQuantPass",
        "import torch": "import torch",
    }
    samples: dict[str, list[tuple[float, list[str]]]] = {name: [] for name in statements}
    for _ in range(1 if smoke else runs):
        for name, statement in statements.items():
            samples[name].append(_import(statement))
    torch_seconds = statistics.median(seconds for seconds, _ in samples["import torch"])
    return [
        {
            "statement": name,
            "ms": 1000 * statistics.median(seconds for seconds, _ in taken),
            "times import torch": statistics.median(seconds for seconds, _ in taken) / torch_seconds,
            "pulls in": ", ".join(taken[0][1]) or "none of the heavy packages",
        }
        for name, taken in samples.items()
    ]


def _import(statement: str) -> tuple[float, list[str]]:
    """Seconds that a statement's imports take in a fresh process, and the heavy packages among them."""
    call = [sys.executable, "-X", "importtime", "-c", statement]
    log = subprocess.run(call, capture_output=True, text=True, check=True).stderr
    lines = re.findall(r"import time:\s+(\d+) \|\s+(\d+) \|(\s+)(\S+)", log)
    start = next(number for number, line in enumerate(lines) if line[3] == "site") + 1
    own = sum(int(self_time) for self_time, _, _, _ in lines[start:])
    loaded = {name.partition(".")[0] for _, _, _, name in lines}
    return own / 1e6, [name for name in HEAVY if name in loaded]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--json")
    arguments = parser.parse_args()
    report("Import time", run(arguments.smoke), arguments.json)
