"""`splitquant compare`: quality and sizes, plain against split, on the user's own model and data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from splitquant_plugins.cli.options import (
    CommaList,
    grid_options,
    html_option,
    json_option,
    language_options,
    pass_options,
    quiet_libraries,
    refuse_inputs_as_output,
    refuse_same_output,
    split_options,
    stride_option,
    untied_for_head,
    weight_request,
)
from splitquant_plugins.cli.recipe_option import recipe_options
from splitquant_plugins.evaluation import tables as report


@click.command()
@click.argument("model")
@click.option(
    "--data",
    required=True,
    help="Texts and labels (csv or jsonl with text,label), documents (.txt, one in a line, or a column text), a folder "
    "of class folders of pictures, a saved dataset, a Hub id; for a module FILE.py:FUNCTION.",
)
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
@click.option(
    "--fail-above",
    "upper",
    multiple=True,
    metavar="MEASURE=VALUE",
    help="The same where a language model is above: perplexity, or kl in nats per token.",
)
@language_options
@stride_option
@grid_options
@split_options
@json_option
@html_option
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
    upper: tuple[str, ...],
    context: int | None,
    stride: int | None,
    head: bool,
    calibration: str | None,
    json_path: Path | None,
    html_path: Path | None,
    decoupleq: dict[str, Any] | None,
    **shared: Any,
) -> int:
    """Quantize MODEL in several ways and compare them on DATA.

    MODEL is a text classifier, a causal language model or an image classifier of transformers (Hub id or folder), or
    FILE.py:FUNCTION: a function, which is called, that returns any torch.nn.Module. DATA for a module is a function
    that returns inputs, or a pair of inputs and labels.

    Bits and bytes are what is really stored: three parts of 2 bits are 6 bits per weight.
    """
    from splitquant_plugins.backends import WeightRequest
    from splitquant_plugins.checkpoints.coverage import coverage_of, sentences
    from splitquant_plugins.checkpoints.files import write_text
    from splitquant_plugins.evaluation import compare as comparison
    from splitquant_plugins.evaluation.choices import summary
    from splitquant_plugins.evaluation.pages.compare_page import compare_page
    from splitquant_plugins.evaluation.subject import load_task_subject
    from splitquant_plugins.evaluation.tasks.choose import task_of
    from splitquant_plugins.evaluation.tasks.language_model import head_sentences
    from splitquant_plugins.evaluation.thresholds import failures, parse_thresholds, refuse_unmeasured
    from splitquant_plugins.plugins import Plugins
    from splitquant_plugins.progress import estimating

    quiet_libraries()
    gate = parse_thresholds(thresholds, upper)
    if values is not None:
        click.echo("splitquant: warning: --values is called --method now; the old name goes away", err=True)
        methods = values
    refuse_inputs_as_output(json_path, model, data, calibration)
    refuse_inputs_as_output(html_path, model, data, calibration)
    refuse_same_output(json=json_path, html=html_path)
    requests = [weight_request(width, **shared) for width in weights]
    if quantizers is not None:
        _refuse_choices_of_weights()
        requests = [WeightRequest("", quantizer=name) for name in quantizers]
    options = untied_for_head(pass_options(**shared), head=head)
    task = task_of(model, context=context, stride=stride, head=head)
    refuse_unmeasured(gate, task.kind.name, task.kind.measures)
    batches = None if calibration is None else task.calibration(calibration)
    plugins = Plugins.load()
    runs = comparison.plan_runs(plugins, backends, requests, splits, seeds, options, methods, batches, decoupleq)
    if equal_storage:
        runs += comparison.equal_storage_runs(plugins, runs)
    with estimating(len(runs)) as (begin, part):
        subject = load_task_subject(task, data, limit, part)
        rows = list(comparison.compare(subject, runs, lambda run: begin(run.title), part))
    report_title = f"{model} on {data}: {_measured_on(rows[0])}"
    shown = report.compare_columns(task.kind.measures)
    if quantizers is not None:
        shown = (shown[0], ("quantizer", "quantizer", report.text), *shown[1:])
    report.print_table(report_title, rows, shown)
    for row in rows:
        if row["choices"]:
            click.echo(f"{row['backend']} {row['weights']} {row['split']}: {summary(row['choices'])}")
    split = [row for row in rows if row["split"] != "none"] or rows
    least = min(split, key=lambda row: row["quantized_share"])
    click.echo(f"{least['backend']} {least['weights']} {least['split']}:")
    for line in (*sentences(coverage_of(least)), *head_sentences(least)):
        click.echo(line)
    report.write_rows(json_path, rows)
    if html_path is not None:
        write_text(html_path, compare_page(f"{model} on {data}", _measured_on(rows[0]), rows, shown))
    below = failures(gate, rows)
    for line in below:
        click.echo(f"splitquant: {line}", err=True)
    return 1 if below else 0


def _measured_on(row: Mapping[str, Any]) -> str:
    """What the float model was measured on, and how good it is."""
    count = f"n = {row['n']}"
    if row["tokens"] is not None:
        return f"{count}, {row['tokens']:,} tokens, FP32 perplexity {row['fp32_perplexity']:.3f}"
    if row["fp32_accuracy"] is None:
        return f"{count}, without labels"
    return f"{count}, FP32 accuracy {report.percent(row['fp32_accuracy'])}"


def _refuse_choices_of_weights() -> None:
    """Raise ConfigError where the user also chose what a stock quantizer fixes."""
    from splitquant_plugins.errors import ConfigError

    for name in ("weights", "granularity", "group_size", "scheme", "equal_storage"):
        if click.get_current_context().get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE:
            option = name.replace("_", "-")
            raise ConfigError(f"--{option} goes without --quantizer: a stock quantizer says itself what it rounds to")
