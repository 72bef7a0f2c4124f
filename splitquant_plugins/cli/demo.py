"""`splitquant demo`: train a small model on the spot, quantize it plain and split, and say what came of it."""

from __future__ import annotations

from pathlib import Path

import click

from splitquant_plugins.cli.options import json_option, quiet_libraries
from splitquant_plugins.evaluation import tables as report

SPLIT = "auto"
FREE = ("int2", "int4")
PICTURE = "splitquant-demo.png"
FULL = {"train_rows": 12000, "test_rows": 2000, "steps": 800}
QUICK = {"train_rows": 400, "test_rows": 100, "steps": 5}
LEFT_OUT = ("k", "method", "split_seconds", "quantize_seconds", "peak_mb")
PACKAGES = ("splitquant-plugins", "torch", "transformers", "optimum-quanto")


@click.command()
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True)
@click.option("--quick", is_flag=True, hidden=True, help="A few steps on a little data: for tests.")
@click.option(
    "--picture", type=click.Path(dir_okay=False, path_type=Path), default=PICTURE, show_default=True, help="A PNG."
)
@json_option
@click.pass_context
def demo(context: click.Context, seed: int, quick: bool, picture: Path, json_path: Path | None) -> None:
    """Show what a split does, on a BERT-Tiny trained here and now. Needs no network, and about a minute.

    The model is trained from scratch on a generated text classification task, as one would train any model, and
    then quantized, plain and with the default split: by optimum-quanto, whose grids are fine, and on the coarsest
    grid of small chips, INT2 with one symmetric scale per tensor. The weights are what training made them.
    """
    import time

    import torch
    from rich.console import Console

    from splitquant_plugins.backends import WeightRequest
    from splitquant_plugins.checkpoints.transformers_models import require_transformers
    from splitquant_plugins.demo.corpus import LABELS
    from splitquant_plugins.demo.findings import findings
    from splitquant_plugins.demo.picture import draw_accuracy
    from splitquant_plugins.demo.subject import train_subject
    from splitquant_plugins.demo.training import one_thread
    from splitquant_plugins.evaluation.compare import compare, plan_runs
    from splitquant_plugins.evaluation.inspect_layers import count_outliers
    from splitquant_plugins.evaluation.metrics import linear_weights
    from splitquant_plugins.evaluation.pictures import require_matplotlib
    from splitquant_plugins.plugins import Plugins, version_of
    from splitquant_plugins.progress import track

    started = time.perf_counter()
    require_transformers()
    plugins = context.find_object(Plugins) or Plugins.load()
    free = plan_runs(plugins, ["quanto"], [WeightRequest(width) for width in FREE], ["none", SPLIT], [seed])
    restricted = plan_runs(
        plugins,
        ["simulated"],
        [WeightRequest("int2", granularity="tensor", scheme="symmetric")],
        ["none", SPLIT],
        [seed],
    )
    runs = [*free, *restricted]
    require_matplotlib()
    quiet_libraries()
    sizes = QUICK if quick else FULL
    with one_thread():
        subject, data = train_subject(seed, **sizes, progress=True)
    with one_thread(), torch.no_grad():
        found = [row for run in track(runs, "quantizing", enabled=True) for row in compare(subject, [run])]
    versions = {name: version_of(name) for name in PACKAGES}
    rows = [{**row, **sizes, "versions": versions} for row in found]

    fp32, n = rows[0]["fp32_accuracy"], rows[0]["n"]
    weights = list(linear_weights(subject.model).values())
    number = sum(weight.numel() for weight in weights)
    outliers = sum(count_outliers(weight) for weight in weights)
    console = Console(width=None if Console().is_terminal else 200, highlight=False)
    console.print(
        f"A BERT-Tiny, trained from scratch in {sizes['steps']} steps on {sizes['train_rows']} generated notes, says "
        f"which of {len(LABELS)} departments a note should go to. For example:"
    )
    for text, label in list(zip(data.texts, data.labels, strict=True))[:3]:
        console.print(f"  {LABELS[label]:>10} | {text}", markup=False)
    console.print(
        f"FP32: accuracy {report.percent(fp32)} on n = {n} unseen notes, seed {seed}; {number:,} Linear weights in "
        f"{report.kilobytes(4 * number)} kB, {100 * outliers / number:.2f} % of them outliers."
    )
    columns = [column for column in report.COMPARE_COLUMNS if column[0] not in LEFT_OUT]
    report.print_table("Plain weights and the default split", rows, columns)
    for sentence in findings(rows):
        console.print(sentence)
    listed = ", ".join(f"{name} {version}" for name, version in versions.items())
    console.print(f"{listed}; {time.perf_counter() - started:.0f} s.")
    draw_accuracy(picture, rows)
    console.print(f"Picture: {picture.resolve()}", soft_wrap=True, markup=False)
    console.print(
        "What a split gains on a model of yours: splitquant compare MODEL --data DATA, splitquant inspect MODEL"
    )
    report.write_rows(json_path, rows)
