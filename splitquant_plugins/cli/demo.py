"""`splitquant demo`: train a small model on the spot, quantize it plain and split, and say what came of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from splitquant_plugins.cli.options import json_option, quiet_libraries

WEIGHTS = ("int2", "int4", "int8")
PACKAGES = ("splitquant-plugins", "torch", "transformers", "optimum-quanto")


@click.command()
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True)
@click.option("--quick", is_flag=True, hidden=True, help="A few steps on a little data: for tests.")
@json_option
@click.pass_context
def demo(context: click.Context, seed: int, quick: bool, json_path: Path | None) -> None:
    """Show what a split does, on a BERT-Tiny trained here and now. Needs no network, and about a minute.

    The model is trained from scratch on a generated text classification task, as one would train any model, and
    then quantized by optimum-quanto, plain and split. The weights are what training made them.
    """
    import time

    from rich.console import Console

    from splitquant_plugins import report
    from splitquant_plugins.backends import WeightRequest
    from splitquant_plugins.compare import compare, plan_runs
    from splitquant_plugins.plugins import Plugins
    from splitquant_plugins.progress import track
    from splitquant_plugins.transformers_models import require_transformers

    started = time.perf_counter()
    plugins = context.find_object(Plugins) or Plugins.load()
    runs = plan_runs(plugins, ["quanto"], [WeightRequest(width) for width in WEIGHTS], ["none", "kmeans"], [seed])
    require_transformers()
    quiet_libraries()

    from splitquant_plugins.demo.subject import train_subject

    sizes = {"train_rows": 400, "test_rows": 100, "steps": 5} if quick else SIZES
    with _one_thread():
        subject = train_subject(seed, **sizes, progress=True)
        found = [row for run in track(runs, "quantizing", enabled=True) for row in compare(subject, [run])]
    figures = {"versions": _versions(), "float_linear_bytes": _float_bytes(subject.model), **sizes}
    rows = [{**row, **figures} for row in found]
    report.write_rows(json_path, rows)
    ...
