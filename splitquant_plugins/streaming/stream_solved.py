"""A checkpoint solved block by block, and then quantized shard by shard."""

from __future__ import annotations

import glob
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from splitquant_plugins.backends import Backend, WeightFormat
from splitquant_plugins.decoupleq.decoupleq_pass import DecoupleQPass
from splitquant_plugins.errors import ConfigError
from splitquant_plugins.manifest import Manifest
from splitquant_plugins.passes.splitquant import SplitQuantPass
from splitquant_plugins.streaming.layout import empty_skeleton
from splitquant_plugins.streaming.run import Streamed, stream_model
from splitquant_plugins.streaming.solve_checkpoint import solve_checkpoint
from splitquant_plugins.streaming.workplace import Workplace


def stream_solved(
    folder: Path,
    output: Path,
    solver: DecoupleQPass,
    backend: Backend,
    form: WeightFormat,
    *,
    ignore: Sequence[str] | None = None,
    finish: Callable[[Path, Manifest], None] | None = None,
) -> Streamed:
    """Solve the blocks of a checkpoint for a backend's grid and quantize what comes of it into `output`.

    Until the output appears, finished blocks lie in a folder beside it, `NAME.solved`, from which a run that was killed
    goes on. Arguments and errors are those of `solve_checkpoint` and `stream_model`.
    """
    packer = backend.packer(form)
    if packer is None:
        raise ConfigError(f"backend {backend.name} cannot stream {form.weights} ({form.method}); leave out --stream")
    packer.ignore = ignore
    model, _ = empty_skeleton(folder)
    quantized = set(packer.quantized(model))
    left = [glob.escape(name) for name, _ in model.named_modules() if name and name not in quantized]
    solved = output.with_name(f"{output.name}.solved")
    with Workplace(output).locked():
        manifest = solve_checkpoint(folder, solved, solver, grid=packer.grid, ignore=[*left, *(ignore or ())])
    manifest.seconds += sum(layer.values.seconds for layer in manifest.layers if layer.values is not None)

    def finish_solved(made: Path, of_no_split: Manifest) -> None:
        manifest.coverage = of_no_split.coverage
        manifest.save(made)
        if finish is not None:
            finish(made, manifest)

    nothing = SplitQuantPass(exclude=("*",), plugins=solver.plugins, progress=solver.progress)
    made = stream_model(solved, output, nothing, backend, form, ignore=ignore, finish=finish_solved)
    shutil.rmtree(solved)
    return replace(made, manifest=manifest, split_seconds=manifest.seconds)
