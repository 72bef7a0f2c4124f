"""Peak memory of the pass in memory, beside what it may take: the parts and twice the largest layer.

Run `python benchmarks/pass_memory.py [--smoke] [--json FILE] [--jobs N]`. Each row is a process of its own that
builds a stack of Linear layers, lets the pass import what it needs on a small model, and reads the peak of its
resident memory (VmHWM, reset before) while the pass runs. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from _harness import report

MEGA = 1e6


def run(smoke: bool, jobs: int = 2) -> list[dict[str, Any]]:
    """A row per dtype; a smoke run has one."""
    width, layers = (64, 3) if smoke else (4096, 8)
    return [_measured(width, layers, dtype, jobs) for dtype in (("float32",) if smoke else ("float32", "bfloat16"))]


def _measured(width: int, layers: int, dtype: str, jobs: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", json.dumps([width, layers, dtype, jobs])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def child(width: int, layers: int, dtype: str, jobs: int) -> dict[str, Any]:
    """Split one model in this process."""
    import torch
    from torch import nn

    from splitquant_plugins import SplitQuantPass

    torch.set_num_threads(jobs)
    kind = getattr(torch, dtype)
    split = SplitQuantPass(jobs=jobs)
    split(nn.Sequential(nn.Linear(600, 600), nn.Linear(600, 600)).to(kind))
    model = nn.Sequential(*[nn.Linear(width, width, bias=False, dtype=kind) for _ in range(layers)])
    largest = width * width * torch.finfo(kind).bits // 8
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _status("VmRSS")
    split(model)
    growth = _status("VmHWM") - before
    allowed = (3 * layers + 2) * largest
    return {
        "layers": f"{layers} x {width}x{width} {dtype}",
        "jobs": jobs,
        "model, MB": layers * largest / MEGA,
        "growth, MB": growth / MEGA,
        "parts + 2 layers, MB": allowed / MEGA,
        "ratio": growth / allowed,
    }


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--json")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(child(*json.loads(arguments.child))))
    else:
        report("Memory of the pass, k-means k = 3", run(arguments.smoke, arguments.jobs), arguments.json)
