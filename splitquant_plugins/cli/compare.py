"""`splitquant compare`: accuracy and sizes, plain against split, on the user's own model and data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from splitquant_plugins.cli.options import (
    CommaList,
    grid_options,
    json_option,
    pass_options,
    quiet_libraries,
    refuse_inputs_as_output,
    split_options,
    weight_request,
)
from splitquant_plugins.cli.recipe_option import recipe_options
from splitquant_plugins.evaluation import tables as report


@click.command()
@click.argument("model")
@click.option("--data", required=True, help="Hub id, folder, or csv with the columns text,label.")
@click.option("--backend", "backends", type=CommaList(), default="quanto", show_default=True)
@click.option("--weights", type=CommaList(), default="int2,int4,int8", show_default=True)
@click.option(
    "--quantizer",
    "quantizers",
    type=CommaList(),
    help="Stock quantizers of the backend, instead of --weights; `splitquant plugins` lists them.",
)
@click.option("--split", "splits", type=CommaList(), default="none,auto", show_default=True, help="Splitters, or none.")
@click.option(
    "--method",
    "methods",
    type=CommaList(),
    default="rtn",
    show_default=True,
    help="How values are chosen: rtn (nearest), decoupleq, or hqq and gptq where the backend has them.",
)
@click.option("--values", type=CommaList(), hidden=True)  # the name of --method before; to go with the next release
@click.option("--seed", "seeds", type=CommaList(int), default="0", show_default=True)
@click.option("--limit", type=click.IntRange(min=1), help="Use the first rows of the data only.")
@click.option(
    "--equal-storage",
    is_flag=True,
    help="Add plain rows of as many bits as the split ones: k times theirs, or a budget's whole bits (at most 8, "
    "scales not counted).",
)
@click.option(
    "--fail-below",
    "thresholds",
    multiple=True,
    metavar="MEASURE=VALUE",
    help="Exit status 1 where a split row (any row, if none is split) is below: accuracy or agreement in per cent, "
    "logit_sqnr_db or weight_sqnr_db. May be repeated.",
)
@grid_options
@split_options
@json_option
@recipe_options(several=True)
def compare(
    model: str,
    data: str,
    backends: list[str],
    weights: list[str],
    quantizers: list[str] | None,
    splits: list[str],
    methods: list[str],
    values: list[str] | None,
    seeds: list[int],
    limit: int | None,
    equal_storage: bool,
    thresholds: tuple[str, ...],
    calibration: str | None,
    json_path: Path | None,
    decoupleq: dict[str, Any] | None,
    **shared: Any,
) -> int:
    """Quantize MODEL, a classifier (Hub id or folder), in several ways and compare them on DATA.

    Bits and bytes are what is really stored: three parts of 2 bits are 6 bits per weight.
    """
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from splitquant_plugins.backends import WeightRequest
    from splitquant_plugins.checkpoints.coverage import coverage_of, sentences
    from splitquant_plugins.evaluation import compare as comparison
    from splitquant_plugins.evaluation.choices import summary
    from splitquant_plugins.evaluation.thresholds import failures, parse_thresholds
    from splitquant_plugins.plugins import Plugins

    quiet_libraries()
    gate = parse_thresholds(thresholds)
    if values is not None:
        click.echo("splitquant: warning: --values is called --method now; the old name goes away", err=True)
        methods = values
    refuse_inputs_as_output(json_path, model, data, calibration)
    requests = [weight_request(width, **shared) for width in weights]
    if quantizers is not None:
        _refuse_choices_of_weights()
        requests = [WeightRequest("", quantizer=name) for name in quantizers]
    options = pass_options(**shared)
    batches = None if calibration is None else comparison.calibration_batches(model, calibration)
    plugins = Plugins.load()
    runs = comparison.plan_runs(plugins, backends, requests, splits, seeds, options, methods, batches, decoupleq)
    if equal_storage:
        runs += comparison.equal_storage_runs(plugins, runs)
    rows: list[dict[str, Any]] = []
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("loading", total=None)
        subject = comparison.load_subject(model, data, limit)

        def started(run: comparison.Run) -> None:
            progress.update(task, description=f"{len(rows) + 1} of {len(runs)}: {run.title}")

        for row in comparison.compare(subject, runs, started):
            rows.append(row)
    fp32 = report.percent(rows[0]["fp32_accuracy"])
    title = f"{model} on {data}: n = {rows[0]['n']}, FP32 accuracy {fp32}"
    shown = report.COMPARE_COLUMNS
    if quantizers is not None:
        shown = (shown[0], ("quantizer", "quantizer", report.text), *shown[1:])
    report.print_table(title, rows, shown)
    for row in rows:
        if row["choices"]:
            click.echo(f"{row['backend']} {row['weights']} {row['split']}: {summary(row['choices'])}")
    split = [row for row in rows if row["split"] != "none"] or rows
    least = min(split, key=lambda row: row["quantized_share"])
    click.echo(f"{least['backend']} {least['weights']} {least['split']}:")
    for line in sentences(coverage_of(least)):
        click.echo(line)
    report.write_rows(json_path, rows)
    below = failures(gate, rows)
    for line in below:
        click.echo(f"splitquant: {line}", err=True)
    return 1 if below else 0


def _refuse_choices_of_weights() -> None:
    """Raise ConfigError where the user also chose what a stock quantizer fixes."""
    from splitquant_plugins.errors import ConfigError

    for name in ("weights", "granularity", "group_size", "scheme", "equal_storage"):
        if click.get_current_context().get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE:
            option = name.replace("_", "-")
            raise ConfigError(f"--{option} goes without --quantizer: a stock quantizer says itself what it rounds to")
