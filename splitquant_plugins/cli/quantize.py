"""`splitquant quantize`: a folder with a split, quantized model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from splitquant_plugins.cli.options import (
    grid_options,
    json_option,
    language_options,
    pass_options,
    quiet_libraries,
    refuse_inputs_as_output,
    split_options,
    untied_for_head,
    weight_request,
)
from splitquant_plugins.cli.recipe_option import recipe_options
from splitquant_plugins.errors import ConfigError
from splitquant_plugins.evaluation import tables as report


@click.command()
@click.argument("model")
@click.option("--backend", default="quanto", show_default=True)
@click.option("--weights", default="int4", show_default=True, help="int2, int4 or int8.")
@click.option("--split", "splitter", default="auto", show_default=True, help="Splitter, or none.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--output", required=True, type=click.Path(path_type=Path), help="Folder to be made.")
@click.option(
    "--stream/--no-stream",
    default=None,
    help="Work layer by layer, for checkpoints that do not fit in memory.  [default: if the checkpoint is sharded]",
)
@click.option(
    "--scheduler",
    metavar="HOST:PORT",
    help="Stream on the workers of this Dask scheduler; they see the folders under the same paths.",
)
@grid_options
@split_options
@language_options
@click.option("--method", default="rtn", show_default=True, help="How values are chosen, as in compare.")
@json_option
@recipe_options(several=False)
def quantize(
    model: str,
    backend: str,
    weights: str,
    splitter: str,
    seed: int,
    output: Path,
    stream: bool | None,
    scheduler: str | None,
    context: int | None,
    head: bool,
    calibration: str | None,
    method: str,
    json_path: Path | None,
    decoupleq: dict[str, Any] | None,
    **shared: Any,
) -> None:
    """Split and quantize MODEL (Hub id or folder, or FILE.py:FUNCTION that returns a module) and save it.

    transformers' `from_pretrained` loads what is saved, after `import splitquant_plugins`, and so does the backend's
    adapter. The head of a language model stays float, unless --head is given.
    """
    from splitquant_plugins.backends import ROUND_TO_NEAREST
    from splitquant_plugins.checkpoints.coverage import coverage_of, sentences
    from splitquant_plugins.evaluation.compare import DECOUPLEQ
    from splitquant_plugins.evaluation.tasks.choose import task_of
    from splitquant_plugins.evaluation.tasks.language_model import head_sentences
    from splitquant_plugins.evaluation.tasks.text_classification import OWN_TEXT
    from splitquant_plugins.plugins import Plugins
    from splitquant_plugins.streaming.quantize_model import quantize_model

    quiet_libraries()
    refuse_inputs_as_output(json_path, model, calibration)
    options = {**untied_for_head(pass_options(**shared), head=head), "seed": seed, "progress": True}
    if stream and calibration == OWN_TEXT:
        raise ConfigError(
            "--calibration self runs the whole model, which --stream never has: write the text before, and give it"
        )
    task = task_of(model, context=context, head=head)
    solved = decoupleq or {} if method == DECOUPLEQ else None
    row = quantize_model(
        Plugins.load(),
        model,
        backend,
        weight_request(weights, method=ROUND_TO_NEAREST if method == DECOUPLEQ else method, **shared),
        splitter,
        output,
        options,
        stream,
        scheduler,
        pretrained=True,
        decoupleq=solved,
        calibration=None if calibration is None else task.calibration(calibration),
        task=task,
    )
    columns = (
        ("layers_split", "layers split", report.text),
        ("layers_quantized", "quantized", report.text),
        ("bits_per_weight", "bits/weight", report.two_decimals),
        ("disk_bits_per_weight", "on disk", report.two_decimals),
        ("model_bytes", "model kB", report.kilobytes),
        ("split_seconds", "split s", report.two_decimals),
        ("quantize_seconds", "quantize s", report.two_decimals),
    )
    report.print_table(f"{model} in {output}: {backend} {weights}, split {splitter}", [row], columns)
    for line in (*sentences(coverage_of(row)), *head_sentences(row)):
        click.echo(line)
    if not row["tokenizer_files"] and task.has_tokenizer:
        click.echo(f"{model} has no tokenizer files, and so {output} has none; the model itself is complete")
    report.write_rows(json_path, [row])
