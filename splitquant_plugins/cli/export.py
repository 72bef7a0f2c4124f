"""`splitquant export`: a program for a device from a split, quantized model, beside the plain one in a table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from splitquant_plugins.cli.options import json_option, pass_options, quiet_libraries, refuse_inputs_as_output

if TYPE_CHECKING:
    from collections.abc import Sequence

    from splitquant_plugins.evaluation.tables import Column

PLAIN = "none"


@click.command()
@click.argument("model")
@click.option("--target", required=True, help="Device, such as xnnpack, ethos-u55, ethos-u85, vulkan or cortex-m.")
@click.option("--output", required=True, type=click.Path(path_type=Path), help="Program to be written, FILE.pte.")
@click.option("--backend", default="pt2e", show_default=True, help="What quantizes and lowers.")
@click.option("--split", "splitter", default="auto", show_default=True, help="Splitter, or none.")
@click.option("--k", type=int, default=2, show_default=True, help="Parts per layer.")
@click.option(
    "--calibration",
    type=click.Path(dir_okay=False),
    help="csv with a column text, for a transformers model.",
)
@click.option("--length", type=click.IntRange(min=2), help="Tokens per input of a transformers model.  [default: 64]")
@click.option("--only", is_flag=True, help="Do not make the plain program for the table.")
@click.option("-O", "--option", "extra", multiple=True, metavar="NAME=VALUE", help="Further options of SplitQuantPass.")
@json_option
def export(
    model: str,
    target: str,
    output: Path,
    backend: str,
    splitter: str,
    k: int,
    calibration: str | None,
    length: int | None,
    only: bool,
    extra: tuple[str, ...],
    json_path: Path | None,
) -> None:
    """Quantize MODEL for a device, split, and write its program.

    MODEL is a transformers folder or Hub id, an exported program FILE.pt2, or FILE.py:NAME: the function NAME of that
    file, which is run, returns a model and a list of batches. The first batch has the program's sizes, all calibrate.

    Cycles are the estimates of the target's compiler, where it makes any. dB compares the outputs of the quantized
    model, run here, with the float model's on the calibration batches.
    """
    from splitquant_plugins.checkpoints.files import refuse_output_file, write_atomically
    from splitquant_plugins.errors import ConfigError
    from splitquant_plugins.evaluation import tables as report
    from splitquant_plugins.evaluation.exportable import load_exportable
    from splitquant_plugins.evaluation.programs import program_row
    from splitquant_plugins.passes.splitquant import SplitQuantPass
    from splitquant_plugins.plugins import Plugins

    quiet_libraries()
    inputs = [each for each in (model.rpartition(":")[0] or model, calibration) if each and Path(each).exists()]
    refuse_output_file(output, inputs)
    refuse_inputs_as_output(json_path, *inputs)
    plugins = Plugins.load()
    chosen = plugins.backend(backend)
    chosen.require()
    targets = chosen.targets()
    if target not in targets:
        raise ConfigError(f"backend {backend} has no target {target!r}: choose from {', '.join(targets) or 'none'}")
    first = (
        None
        if splitter == PLAIN
        else SplitQuantPass(splitter=splitter, plugins=plugins, **pass_options(k=k, extra=extra))
    )
    subject = load_exportable(model, calibration, length)
    rows: list[dict[str, Any]] = []
    for one in [first] if only or first is None else [None, first]:
        program, row = program_row(chosen, subject, target, one)
        rows.append(row)
    write_atomically(output, lambda path: path.write_bytes(program.content))
    n = sum(len(batch[0]) for batch in subject.batches)
    report.print_table(f"{model} for {target} ({targets[target]}): n = {n} inputs", rows, _columns())
    for name, number in rows[-1]["host"].items():
        click.echo(f"left to the host: {name} ({number})")
    click.echo(f"{output}: {len(program.content):,} bytes, split {rows[-1]['split']}")
    report.write_rows(json_path, rows)


def _columns() -> Sequence[Column]:
    from splitquant_plugins.evaluation.tables import decibel, kilobytes, percent, text, two_decimals

    return (
        ("split", "split", text),
        ("k", "k", text),
        ("layers_split", "layers split", text),
        ("bytes", "kB", kilobytes),
        ("cycles", "cycles", text),
        ("delegates", "delegates", text),
        ("host_operators", "host operators", text),
        ("output_sqnr_db", "dB", decibel),
        ("agreement", "agreement", percent),
        ("seconds", "s", two_decimals),
    )
