"""One checkpoint streamed by one process, and by one and two single-threaded workers of a Dask cluster beside it.

Run `python benchmarks/cluster.py [--smoke] [--json FILE] [--folder DIR]`. The checkpoint has 120 million bfloat16
parameters in the shape of a Llama, random weights with heavy tails, and becomes INT4 with k-means, k = 3, in shards of
32 MB. All processes use one thread each, and have made a small checkpoint before, so that imports and compilation are
not counted. Seconds are those of the whole call, the planning on this machine and the questions to the workers
included. Peak RSS is the largest of a process that does the work (ru_maxrss), libraries and all.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _harness import report
from checkpoint import TINY, make_checkpoint

SIZES = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
}
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
WORKERS = (1, 2)


def run(smoke: bool = False, folder: Path | None = None) -> list[dict[str, Any]]:
    """Measure each way once; smoke: on a tiny checkpoint, to see that everything runs."""
    work = Path(tempfile.mkdtemp(prefix="cluster.", dir=folder))
    try:
        make_checkpoint(work / "small", TINY, 500_000)
        if not smoke:
            make_checkpoint(work / "float", SIZES, 64 << 20)
        source = work / ("small" if smoke else "float")
        shard = 200_000 if smoke else 32 << 20
        rows = [_row("one process", source, *_here(work, source, shard))]
        for count in WORKERS:
            name = f"{count} worker{'s' if count > 1 else ''}"
            rows.append(_row(name, source, *_there(work, source, shard, count)))
            _refuse_difference(work / "here", work / f"there{count}")
        for row in rows:
            row["of one process"] = row["MB/s"] / rows[0]["MB/s"]
        return rows
    finally:
        shutil.rmtree(work)


def _row(way: str, source: Path, seconds: float, peak: int) -> dict[str, Any]:
    size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    return {"way": way, "seconds": seconds, "MB/s": size / 1e6 / seconds, "peak RSS, MiB": peak / 2**20}


def _here(work: Path, source: Path, shard: int) -> tuple[float, int]:
    command = [sys.executable, __file__, "--one", str(work), str(source), str(shard)]
    done = subprocess.run(command, env={**os.environ, **ONE_THREAD}, check=True, capture_output=True, text=True)
    seconds, peak = json.loads(done.stdout.splitlines()[-1])
    return seconds, peak


def one(work: Path, source: Path, shard: int) -> None:
    """The run in a process of its own; prints seconds and peak."""
    stream(work / "small", work / "warm", 200_000)
    seconds = stream(source, work / "here", shard)
    print(json.dumps([seconds, _peak()]))


def _there(work: Path, source: Path, shard: int, count: int) -> tuple[float, int]:
    from distributed import Client, LocalCluster

    options = {"processes": True, "dashboard_address": None, "memory_limit": 0, "env": ONE_THREAD}
    with LocalCluster(n_workers=count, threads_per_worker=1, **options) as cluster:
        address = cluster.scheduler_address
        stream(work / "small", work / f"warm{count}", 200_000, address)
        seconds = stream(source, work / f"there{count}", shard, address)
        with Client(address, set_as_default=False) as client:
            return seconds, max(client.run(_peak).values())


def stream(source: Path, output: Path, shard: int, scheduler: str | None = None) -> float:
    """Stream a checkpoint, here or on a cluster; return the seconds."""
    from splitquant_plugins import SplitQuantPass
    from splitquant_plugins.backends import WeightRequest
    from splitquant_plugins.plugins import Plugins
    from splitquant_plugins.streaming.run import stream_model

    plugins = Plugins.load()
    backend = plugins.backend("quanto")
    form = backend.resolve(WeightRequest("int4"))
    first = SplitQuantPass(splitter="kmeans", k=3, plugins=plugins)
    started = time.perf_counter()
    stream_model(source, output, first, backend, form, scheduler=scheduler, shard_bytes=shard)
    return time.perf_counter() - started


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _refuse_difference(one: Path, other: Path) -> None:
    for path in one.glob("*.safetensors"):
        if path.read_bytes() != (other / path.name).read_bytes():
            raise RuntimeError(f"{other / path.name} is not what one process writes")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--json")
    parser.add_argument("--folder", type=Path, help="where the temporary files go")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        one(Path(arguments.one[0]), Path(arguments.one[1]), int(arguments.one[2]))
    else:
        found = run(arguments.smoke, arguments.folder)
        report("A checkpoint on a cluster, k-means k = 3, INT4", found, arguments.json)
