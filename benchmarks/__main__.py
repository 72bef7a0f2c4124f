"""All benchmarks, one after the other, each in a process of its own.

Run `python benchmarks [--smoke] [--only NAME,NAME] [--json FOLDER] [--model FOLDER --data CSV]`. Each prints a
table, and writes FOLDER/NAME.json with `--json`. `restricted_grids` needs a trained classifier: --model and --data.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
NAMES = (
    "import_time",
    "clustering",
    "grid_search",
    "whole_pass",
    "pass_memory",
    "checkpoint",
    "cluster",
    "latency",
    "sparse_parts",
    "restricted_grids",
    "causal_lm",
    "two_bits",
    "solve_checkpoint",
)


def commands(arguments: argparse.Namespace) -> dict[str, list[str]]:
    """The command of each chosen benchmark."""
    found = {}
    for name in arguments.only.split(",") if arguments.only else NAMES:
        if name not in NAMES:
            raise SystemExit(f"no benchmark {name!r}; choose from {', '.join(NAMES)}")
        command = [sys.executable, str(HERE / f"{name}.py")]
        if arguments.smoke:
            command.append("--smoke")
        elif name == "restricted_grids":
            if not (arguments.model and arguments.data):
                print("restricted_grids: left out, it needs --model and --data", file=sys.stderr)
                continue
            command += ["--model", arguments.model, "--data", arguments.data]
        if arguments.json:
            command += ["--json", str(arguments.json / f"{name}.json")]
        found[name] = command
    return found


def main() -> int:
    """Run them; the exit status tells how many failed."""
    parser = argparse.ArgumentParser(
        prog="python benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--only")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--data")
    arguments = parser.parse_args()
    if arguments.json:
        arguments.json.mkdir(parents=True, exist_ok=True)
    failed = []
    for name, command in commands(arguments).items():
        print(f"== {name}", flush=True)
        if subprocess.run(command, check=False).returncode:
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return len(failed)


if __name__ == "__main__":
    raise SystemExit(main())
