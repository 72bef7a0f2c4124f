"""`splitquant inspect`: what a split would do to each layer of a model, as a table, JSON and a picture."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from splitquant_plugins.cli.options import (
    html_option,
    json_option,
    pass_options,
    quiet_libraries,
    refuse_inputs_as_output,
    refuse_same_output,
    untied_for_head,
)
from splitquant_plugins.evaluation import tables as report

if TYPE_CHECKING:
    from torch import nn

    from splitquant_plugins.evaluation.inspect_layers import Inspection
    from splitquant_plugins.grid import Grid
    from splitquant_plugins.passes.splitquant import SplitQuantPass

COLUMNS: tuple[report.Column, ...] = (
    ("layer", "layer", report.text),
    ("shape", "shape", lambda shape: "×".join(map(str, shape))),
    ("min", "min", report.number),
    ("max", "max", report.number),
    ("outliers", "outliers", "{:,}".format),
    ("scaling_factor", "S", report.number),
    ("least_part_scaling_factor", "S split", report.number),
    ("tensor_gain_db", "dB/tensor", "{:+.1f}".format),
    ("channel_gain_db", "dB/channel", "{:+.1f}".format),
    ("channel_plain_bits_per_weight", "bits", report.two_decimals),
    ("channel_split_bits_per_weight", "bits split", report.two_decimals),
)
CURVE_COLUMNS: tuple[report.Column, ...] = (
    ("bits_per_weight", "bits/weight", report.two_decimals),
    ("error", "error", report.number),
    ("weight_sqnr_db", "dB", report.two_decimals),
    ("layer", "layer", report.text),
    ("k", "k", report.text),
)


@click.command()
@click.argument("model")
@click.option("--splitter", default="auto", show_default=True)
@click.option("--k", type=int, default=3, show_default=True, help="Parts per layer.")
@click.option("--bits", type=click.IntRange(2, 8), default=2, show_default=True, help="Bits of the grid.")
@click.option("--layer", "patterns", multiple=True, metavar="PATTERN", help="Only layers of such names; * for any.")
@click.option("--head", is_flag=True, help="Inspect the head of a language model too.")
@click.option("-O", "--option", "extra", multiple=True, metavar="NAME=VALUE", help="Further options of SplitQuantPass.")
@click.option(
    "--picture",
    "picture",
    type=click.Path(path_type=Path),
    metavar="FILE|DIR",
    help="Draw the histograms: one .png, one self-contained .html, or a folder of PNGs.",
)
@click.option("--curve", is_flag=True, help="Also show the error that each budget of stored bits per weight leaves.")
@click.option(
    "--granularity",
    type=click.Choice(["tensor", "channel"]),
    default="channel",
    show_default=True,
    help="What shares a scale, for the curve.",
)
@json_option
@html_option
@click.pass_context
def inspect(
    context: click.Context,
    model: str,
    splitter: str,
    k: int,
    bits: int,
    patterns: tuple[str, ...],
    head: bool,
    extra: tuple[str, ...],
    picture: Path | None,
    curve: bool,
    granularity: Literal["tensor", "channel"],
    json_path: Path | None,
    html_path: Path | None,
) -> None:
    """Show, for each layer of MODEL (Hub id, folder or FILE.py:FUNCTION), what a split would bring and cost.

    Range and outliers are of the weight; an outlier lies more than 3 interquartile ranges below the first or
    above the third quartile. S is the paper's scaling factor (2^b - 1)/(max - min), of the whole weight and of
    its coarsest part. The gain is the rise of the weight's signal-to-noise ratio in dB on affine grids of that
    many bits, per tensor and per output channel. Bits per weight count codes, scales and zero points, per channel.
    Nothing is written to MODEL.
    """
    from splitquant_plugins.checkpoints.files import write_text
    from splitquant_plugins.errors import InputError
    from splitquant_plugins.evaluation import pictures
    from splitquant_plugins.evaluation.pages.inspect_page import inspect_page
    from splitquant_plugins.evaluation.tasks.choose import task_of
    from splitquant_plugins.evaluation.tasks.language_model import HEAD_REASON
    from splitquant_plugins.grid import UniformGrid
    from splitquant_plugins.manifest import FILE_NAME
    from splitquant_plugins.passes.splitquant import SplitQuantPass
    from splitquant_plugins.plugins import Plugins

    quiet_libraries()
    refuse_inputs_as_output(json_path, model)
    refuse_inputs_as_output(html_path, model)
    refuse_same_output(json=json_path, html=html_path, picture=picture)
    if picture is not None:
        pictures.check_target(picture)
        refuse_inputs_as_output(picture if picture.suffix else None, model)
        pictures.require_matplotlib()
    plugins = context.find_object(Plugins) or Plugins.load()
    options = {"include": patterns, **untied_for_head(pass_options(k=k, extra=extra), head=head)}
    split_pass = SplitQuantPass(splitter=splitter, plugins=plugins, **options)
    if (Path(model) / FILE_NAME).is_file():
        raise InputError(f"{model} was split before; inspect the float model that it was made from")
    task = task_of(model, head=head)
    loaded = task.load_model()
    ignored = task.stays_float(loaded) or ()
    layers = list(inspections(loaded, split_pass, bits, ignored))
    title = f"{model}: splitter {splitter}, k = {split_pass.config.k}, INT{bits}"
    rows = [row_of(layer, splitter, bits) for layer in layers]
    report.print_table(title, rows, COLUMNS)
    for layer in layers:
        if layer.reason:
            click.echo(f"{layer.layer} stays whole: {layer.reason}")
    for name in ignored:
        click.echo(f"{name} stays float: {HEAD_REASON}")
    steps: list[dict[str, Any]] = []
    if curve:
        steps = curve_of(loaded, split_pass, UniformGrid(bits, granularity=granularity), ignored)
        report.print_table(f"budget: stored bits per weight, per {granularity}", steps, CURVE_COLUMNS)
    report.write_rows(json_path, rows)
    if html_path is not None:
        kept = dict.fromkeys(ignored, HEAD_REASON)
        write_text(html_path, inspect_page(title, f"{len(rows)} layers", rows, COLUMNS, kept, steps))
    if picture is not None:
        pictures.write_picture(picture, title, layers)


def inspections(
    model: nn.Module, split_pass: SplitQuantPass, bits: int, ignored: Sequence[str] = (), *, progress: bool = True
) -> Iterator[Inspection]:
    """Prepare the model as the pass would, and inspect the layers that it would split, in order.

    `ignored` are names of layers that stay float.

    Raises InputError where there is no such layer.
    """
    import torch

    from splitquant_plugins.errors import InputError
    from splitquant_plugins.evaluation.inspect_layers import inspect_weight
    from splitquant_plugins.grid import UniformGrid
    from splitquant_plugins.passes.checks import refuse_unfit_model, refuse_unfit_weights
    from splitquant_plugins.passes.select import select_layers
    from splitquant_plugins.progress import track

    refuse_unfit_model(model)
    split_pass.plugins.prepare_model(model, split_pass.config)
    selection = select_layers(model, split_pass.config, split_pass.plugins, [glob.escape(name) for name in ignored])
    refuse_unfit_weights(selection.split)
    if not selection.split:
        raise InputError(f"{type(model).__name__} has no layer that the pass would split")
    grids = {"channel": UniformGrid(bits), "tensor": UniformGrid(bits, granularity="tensor")}
    for layer in track(selection.split, "inspecting layers", enabled=progress):
        # A splitter that looks at the grid makes other parts for another grid.
        made = {name: split_pass.split_tensors(layer.name, layer.plan, grid) for name, grid in grids.items()}
        weight = layer.plan.weight.detach()
        with torch.no_grad():
            yield inspect_weight(
                layer.name,
                layer.plan.kind,
                weight,
                {name: tensors.weight or [weight] for name, tensors in made.items()},
                grids,
                made["channel"].reason,
            )


def curve_of(
    model: nn.Module, split_pass: SplitQuantPass, grid: Grid, ignored: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Return the points of the best trade-off, from unsplit to the least error; the model is prepared already.

    Each is a layer that gets more parts, with the stored bits per weight and the weight SQNR in decibels from
    then on, over all layers that the pass would split.
    """
    from splitquant_plugins.evaluation.metrics import ratio_db
    from splitquant_plugins.passes.budget import tradeoff
    from splitquant_plugins.passes.select import select_layers

    whole = [glob.escape(name) for name in ignored]
    layers = select_layers(model, split_pass.config, split_pass.plugins, whole).split
    weights = [layer.plan.weight.detach() for layer in layers]
    number = sum(weight.numel() for weight in weights)
    energy = sum(float(weight.double().square().sum()) for weight in weights)
    options = {layer.name: split_pass.candidates(layer.name, layer.plan, grid) for layer in layers}
    return [
        {
            "layer": step.layer or "(all)",
            "k": step.k or 1,
            "bits_per_weight": step.bits / number,
            "error": step.error,
            "weight_sqnr_db": ratio_db(energy, step.error),
        }
        for step in tradeoff(options)
    ]


def row_of(layer: Inspection, splitter: str, bits: int) -> dict[str, Any]:
    """Return a layer's row of the table and of the JSON."""
    own = ("layer", "kind", "shape", "weights", "min", "max", "outliers", "scaling_factor", "least_part_scaling_factor")
    row: dict[str, Any] = {name: getattr(layer, name) for name in own}
    row |= {"splitter": splitter, "k": len(layer.parts), "bits": bits, "boundaries": layer.boundaries}
    row["parts"] = [asdict(part) for part in layer.parts]
    for name, gain in layer.gains.items():
        row |= {f"{name}_{key}": value for key, value in {**asdict(gain), "gain_db": gain.gain_db}.items()}
    return {**row, "reason": layer.reason}
