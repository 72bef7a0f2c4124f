"""decoupleQ's layer stage for checkpoints that do not fit in memory: one block at a time, from disk to disk."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from splitquant_plugins.checkpoints.files import write_json
from splitquant_plugins.checkpoints.source import INDEX_FILE, Source
from splitquant_plugins.checkpoints.tensors import write_tensors
from splitquant_plugins.decoupleq.capture import BlockInputs, Call, detached, masks_of
from splitquant_plugins.decoupleq.decoupleq_pass import DecoupleQPass
from splitquant_plugins.decoupleq.layer_order import find_blocks, stage_of_block
from splitquant_plugins.decoupleq.layer_stage import LayerStage
from splitquant_plugins.decoupleq.layers import LayerToSolve, layers_to_solve, with_float_weights
from splitquant_plugins.decoupleq.record import manifest_of_run
from splitquant_plugins.decoupleq.resume import Finished, fingerprint
from splitquant_plugins.decoupleq.run import UNREACHED
from splitquant_plugins.errors import ConfigError, InputError
from splitquant_plugins.grid import Grid
from splitquant_plugins.manifest import Manifest, ValuesRecord
from splitquant_plugins.passes.base import GridRule
from splitquant_plugins.passes.calibration import evaluating, iter_calls
from splitquant_plugins.passes.checks import refuse_unfit_modules, refuse_unfit_values
from splitquant_plugins.passes.outputs import output_tensor
from splitquant_plugins.plugins import version_of
from splitquant_plugins.progress import track
from splitquant_plugins.streaming.block_calls import block_calls
from splitquant_plugins.streaming.layout import empty_skeleton
from splitquant_plugins.streaming.parameters import IN_MEMORY, Parameters
from splitquant_plugins.streaming.spilled import Spill

REST_FILE = "rest.safetensors"
_ACTIVATIONS = ".activations."
# Activations that are held in memory may take this part of the memory for calibration.
_PART_FOR_ACTIVATIONS = 4


def solve_checkpoint(
    folder: Path,
    solved: Path,
    solver: DecoupleQPass,
    *,
    grid: Grid | GridRule | None = None,
    ignore: Sequence[str] = (),
) -> Manifest:
    """Solve the layers in the blocks of a transformers checkpoint for a backend's grid, and write it to `solved`.

    `folder` holds safetensors and config.json; `solved` will hold the same tensors, those of the solved layers such
    that the backend's plain rounding gives the solution, and may hold blocks that a run which was killed has finished.
    `ignore` are patterns of names that the recipe does not quantize. Where all other layers are in blocks, the values
    are those that `solver` would find with the model in memory. Held at any time: one block, its layers' statistics
    (`solver.calibration_bytes`), and of the activations a quarter of that; others lie in memory-mapped files beside
    `solved`. Before the first block what comes before the blocks is held, too, as embeddings are.

    Layers outside of the repeated blocks keep plain rounding, with that reason. Raises ConfigError for options that
    need the whole model, InputError for models whose blocks do not simply follow each other.
    """
    solver.refuse_missing_calibration()
    _refuse_what_needs_the_model(solver)
    if solved.resolve() == folder.resolve():
        raise InputError(f"{solved} is the checkpoint that is read; choose another folder for what is solved")
    source = Source(folder)
    run = _Run(source, solved, solver, grid, ignore)
    solved.mkdir(parents=True, exist_ok=True)
    for left in solved.glob(f"{_ACTIVATIONS}*"):  # by a run that was killed
        shutil.rmtree(left)
    with tempfile.TemporaryDirectory(prefix=_ACTIVATIONS, dir=solved) as spilled:
        run.solve(Spill(Path(spilled), solver.calibration_bytes // _PART_FOR_ACTIVATIONS))
    return run.manifest()


class _Run:
    """One application: walks the blocks with two streams of activations, behind solved blocks and behind float ones."""

    def __init__(
        self, source: Source, solved: Path, solver: DecoupleQPass, grid: Grid | GridRule | None, ignore: Sequence[str]
    ) -> None:
        self.source, self.solved, self.solver, self.config = source, solved, solver, solver.config
        self.model, dtype = empty_skeleton(source.folder, buffers=True)
        self.device = torch.device(solver.device or "cpu")
        for module in self.model.modules():
            module._buffers.update(
                {key: each.to(self.device) for key, each in module._buffers.items() if each is not None}
            )
        self.parameters = Parameters(self.model, source, dtype)
        self.parameters.refuse_unused()
        refuse_unfit_modules(self.model)
        self.blocks = find_blocks(self.model)
        kind = type(self.model).__name__
        if not self.blocks[0][0]:
            raise InputError(f"{kind} has no repeated blocks to be solved one by one; {IN_MEMORY}")
        if getattr(getattr(self.model, "config", None), "is_encoder_decoder", False):
            raise InputError(
                f"{kind} has an encoder and a decoder, and only one stack of blocks is walked; {IN_MEMORY}"
            )
        chosen, self.kept = layers_to_solve(self.model, self.config, solver.plugins, grid, ignore, loaded=False)
        self.layers = {name: layer for name, layer in chosen.items() if self._block_of(name) is not None}
        outside = "it is in none of the repeated blocks, which are all that is solved of a checkpoint"
        self.kept.update(dict.fromkeys(chosen.keys() - self.layers.keys(), outside))
        self._refuse_shared_tensors()
        self.records: dict[str, ValuesRecord] = {}
        twins: dict[str, list[LayerToSolve]] = {name: [] for name in self.layers}
        self.stage = LayerStage(self.layers, twins, self.config, self._float_weights, solver.calibration_bytes)

    def solve(self, spill: Spill) -> None:
        """Solve the blocks that are not finished, and write what makes a checkpoint of them."""
        solver, rest = self.solver, self._names_in(None)
        with torch.inference_mode(False), torch.no_grad():
            self._load(rest)
            finished = Finished(self.solved, self._fingerprint())
            masks = masks_of(self.model, iter_calls(self.model, solver.calibration))
            inputs = iter_calls(self.model, solver.calibration)
            calls = block_calls(self.model, self.blocks, inputs, spill, self._run_first)
            self._forget(rest)
            behind_solved, behind_float = calls.first, calls.first
            for number in track(range(len(self.blocks)), "solving blocks", enabled=solver.progress):
                name, block = self.blocks[number]
                now = BlockInputs(block, calls.of(number, behind_solved), masks)
                before = calls.of(number, behind_float)
                self._load(self._names_in(name))
                next_float = [spill.keep(_returned(block, call)) for call in before]
                self._solve_block(number, now, before, finished)
                next_solved = [spill.keep(_returned(block, call)) for call in now.calls]
                for kept in {id(each): each for each in (*behind_solved, *behind_float)}.values():
                    kept.drop()
                behind_solved, behind_float = next_solved, next_float
                self._forget(self._names_in(name))
        if not self.records:
            raise InputError(UNREACHED)
        for name in self.layers:
            reason = "the calibration batches never reach it"
            self.records.setdefault(name, ValuesRecord(action="kept", reason=reason))
        self._write_rest(rest)

    def manifest(self) -> Manifest:
        """What was solved, and what was not."""
        return manifest_of_run(self.model, self.config, self.layers, self.records, self.kept, self.stage.notes)

    def _solve_block(self, number: int, now: BlockInputs, before: Sequence[Call], finished: Finished) -> None:
        """Solve a block, which is loaded, and write it; or take it as it was finished before."""
        name, block = self.blocks[number]
        layers = {one: layer for one, layer in self.layers.items() if self._block_of(one) == name}
        for one, layer in layers.items():
            layer.original = [cast(nn.Parameter, module.weight) for module in layer.modules]
            refuse_unfit_values(f"{one}.weight", layer.original[0])
        stored = finished.load(number)
        if stored is None:
            tensors = {self.parameters.source_of(each): self._state[each] for each in self._names_in(name)}
            records: dict[str, ValuesRecord] = {}
            modules = {one: layer.modules[0] for one, layer in layers.items()}
            stage = stage_of_block(name, block, now, now.batches, modules)
            asymmetric = before if self.config.asymmetric_calibration else None
            for one, solution, record in self.stage.solve(stage, now, asymmetric):
                (floats,) = solution.floats
                tensors[self._weight_of(one)] = floats.t().contiguous() if layers[one].transposed else floats
                records[one] = record
            finished.save(number, tensors, {one: record.model_dump() for one, record in records.items()})
        else:
            tensors, described = stored
            records = {one: ValuesRecord.model_validate(record) for one, record in described.items()}
            for one in records:
                floats = tensors[self._weight_of(one)]
                layers[one].put(
                    [layers[one].grid.quantize_dequantize(floats.t() if layers[one].transposed else floats)]
                )
        self.records.update(records)
        for layer in layers.values():
            layer.original = []

    def _run_first(self, call: Call) -> Any:
        """Run the first block, for the kind of its output."""
        name, block = self.blocks[0]
        self._load(self._names_in(name))
        args, kwargs = detached(call)
        output = block(*args, **kwargs)
        self._forget(self._names_in(name))
        return output

    @contextmanager
    def _float_weights(self) -> Iterator[None]:
        """The block at hand with its float weights."""
        with with_float_weights([layer for layer in self.layers.values() if layer.original]):
            yield

    @property
    def _state(self) -> dict[str, Tensor]:
        return self.model.state_dict(keep_vars=True)

    def _names_in(self, block: str | None) -> list[str]:
        """Names of the tensors of a block, or with None of those in no block."""
        return [name for name in self._state if self._block_of(name) == block]

    def _block_of(self, name: str) -> str | None:
        return next((block for block, _ in self.blocks if name == block or name.startswith(f"{block}.")), None)

    def _weight_of(self, layer: str) -> str:
        return self.parameters.source_of(f"{layer}.weight")

    def _load(self, names: Sequence[str]) -> None:
        """Give tensors their values; those that are tied stay one."""
        made: dict[str, Tensor] = {}
        for name in names:
            source = self.parameters.source_of(name)
            if source not in made:
                made[source] = self.source.read(source, self.parameters.dtypes[source]).to(self.device)
            self._set(name, made[source])

    def _forget(self, names: Sequence[str]) -> None:
        state = self._state
        for name in names:
            self._set(name, state[name].detach().to("meta"))

    def _set(self, name: str, values: Tensor) -> None:
        owner, _, key = name.rpartition(".")
        module = self.model.get_submodule(owner)
        if key in module._parameters:
            before = module._parameters[key]
            module._parameters[key] = nn.Parameter(values, requires_grad=before is None or before.requires_grad)
        else:
            module._buffers[key] = values

    def _refuse_shared_tensors(self) -> None:
        """A tensor of a block that has a second name would have to be in memory twice, or in two files."""
        owners: dict[str, str] = {}
        for name in self._state:
            first = owners.setdefault(self.parameters.source_of(name), name)
            if first != name and (self._block_of(first), self._block_of(name)) != (None, None):
                raise ConfigError(f"{first} and {name} are one tensor, and blocks are solved apart; {IN_MEMORY}")

    def _fingerprint(self) -> str:
        """Hash what the solutions depend on; of the checkpoint's files, names, sizes and dates."""
        description = {
            "version": version_of(),
            "options": self.config.model_dump(),
            "calibration bytes": self.solver.calibration_bytes,
            "checkpoint": self.source.fingerprint(),
            "config.json": (self.source.folder / "config.json").read_text("utf-8"),
            "grids": {name: repr(layer.grid) for name, layer in self.layers.items()},
        }
        return fingerprint(description, iter_calls(self.model, self.solver.calibration))

    def _write_rest(self, rest: Sequence[str]) -> None:
        """Write the tensors outside of blocks, and last the index, which makes a checkpoint of the files."""
        if (self.solved / INDEX_FILE).is_file():
            return  # a later step was killed, and knows the files by their dates
        here = list(dict.fromkeys(map(self.parameters.source_of, rest)))
        read = {name: self.source.read(name, self.parameters.dtypes[name]) for name in here}
        write_tensors(self.solved / REST_FILE, read)
        files = dict.fromkeys(here, REST_FILE)
        for number, (name, _) in enumerate(self.blocks):
            file = Finished.tensors_file(number)
            files.update({self.parameters.source_of(each): file for each in self._names_in(name)})
        total = sum(self.parameters.spec_of(name).bytes for name in files)
        shutil.copyfile(self.source.folder / "config.json", self.solved / "config.json")
        write_json(self.solved / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": files})


def _returned(block: nn.Module, call: Call) -> Tensor:
    args, kwargs = detached(call)
    with evaluating(block):
        return output_tensor(block(*args, **kwargs)).detach()


def _refuse_what_needs_the_model(solver: DecoupleQPass) -> None:
    config = solver.config
    for option, given in (
        ("tune_blocks", config.tune_blocks),
        ("tune_model", config.tune_model),
        ("sequential=False", not config.sequential),
        ("objective='predictions'", config.objective == "predictions"),
        ("resume_dir", solver.resume_dir is not None),
    ):
        if given:
            why = "what was finished is kept with the output" if option == "resume_dir" else "blocks come one at a time"
            raise ConfigError(f"DecoupleQPass({option}) for a checkpoint that is streamed: {why}; leave it out")
