"""`splitquant recipe`: the recipe that made a saved model."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="Write it there, and do not print it.")
def recipe(folder: Path, output: Path | None) -> None:
    """Print the recipe that made the split model in FOLDER, for --recipe.

    It is read from the manifest: the options of the pass and of decoupleQ, and where `splitquant quantize` made the
    model also the backend and the weight format. Calibration data are not in a manifest.
    """
    import yaml

    from splitquant_plugins.checkpoints.files import refuse_output_file
    from splitquant_plugins.pretrained.saved_manifest import manifest_in
    from splitquant_plugins.recipes.files import write_recipe
    from splitquant_plugins.recipes.recipe import recipe_of

    found = recipe_of(manifest_in(folder))
    if output is None:
        click.echo(yaml.safe_dump(found.as_written() or {"format": 1}, sort_keys=False), nl=False)
    else:
        refuse_output_file(output)
        write_recipe(output, found)
    if found.decoupleq is not None and found.calibration is None:
        click.echo("splitquant: decoupleQ needs calibration data, which no manifest has: add `calibration:`", err=True)
