"""One application of DecoupleQPass: the layers solved block after block, and tuned, with records of it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from splitquant_plugins.decoupleq.block_tuning import BlockChain, block_objective, follows, other_parameters
from splitquant_plugins.decoupleq.capture import BlockInputs, block_outputs, capture_inputs, detached, masks_of
from splitquant_plugins.decoupleq.config import DecoupleQConfig
from splitquant_plugins.decoupleq.examples import Example, examples_of, held_out_of
from splitquant_plugins.decoupleq.layer_order import Stage, stages_of
from splitquant_plugins.decoupleq.layer_stage import LayerStage
from splitquant_plugins.decoupleq.layers import LayerToSolve, with_float_weights
from splitquant_plugins.decoupleq.learned_rounding import learned_parts, relearned
from splitquant_plugins.decoupleq.model_tuning import model_objective
from splitquant_plugins.decoupleq.resume import Finished, described, fingerprint
from splitquant_plugins.decoupleq.solve_weight import SolvedWeight, restored_weight, with_codes
from splitquant_plugins.decoupleq.training import Learned, Objective, train
from splitquant_plugins.errors import InputError
from splitquant_plugins.manifest import TrainingRecord, ValuesRecord
from splitquant_plugins.passes.calibration import Batches, iter_calls
from splitquant_plugins.passes.loss_moments import collect_gradient_moments
from splitquant_plugins.passes.token_masks import TokenMasks
from splitquant_plugins.plugins import version_of
from splitquant_plugins.progress import track

UNREACHED = (
    "no layer gets an input that counts from the calibration batches: are these for this model, and do their attention "
    "masks leave any token?"
)


@dataclass(frozen=True)
class SolvedBlock:
    """A block of the model, by name, with the solutions of its layers, by their names in the model."""

    name: str
    block: nn.Module
    solutions: dict[str, SolvedWeight]


class Run:
    """One application of the pass: solves stage after stage and keeps the records."""

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, LayerToSolve],
        config: DecoupleQConfig,
        calibration: Batches,
        *,
        calibration_bytes: int,
        resume_dir: str | Path | None,
        progress: bool,
    ) -> None:
        self.model = model
        self.config = config
        self.calibration = calibration
        self.calibration_bytes = calibration_bytes
        self.resume_dir = resume_dir
        self.progress = progress
        self.layers: dict[str, LayerToSolve] = {}
        self.twins: dict[str, list[LayerToSolve]] = {}
        self.records: dict[str, ValuesRecord] = {}
        self.undo: list[tuple[nn.Parameter, Tensor]] = []
        self.solutions: dict[str, SolvedWeight] = {}
        self.window: list[SolvedBlock] = []
        self.examples: list[Example] = []
        self.trained_on: list[int] = []
        self.held_out: list[int] = []
        firsts: dict[int, str] = {}
        for name, layer in layers.items():
            first = firsts.setdefault(id(layer.original[0]), name)
            if first == name:
                self.layers[name] = layer
            self.twins.setdefault(first, []).extend([layer] if first != name else [])
        by_predictions = (
            None if config.objective == "outputs" else partial(collect_gradient_moments, model, calibration)
        )
        self.layer_stage = LayerStage(
            self.layers, self.twins, config, self._float_values, calibration_bytes, by_predictions
        )

    def solve(self) -> None:
        """Solve all layers, stage by stage.

        Until all are done the layers hold what the backend will round to; then, what is to be handed to it.
        """
        if self.config.tune_blocks or self.config.tune_model:
            self.examples = examples_of(self.model, self.calibration, self.config.batch_size)
            self.trained_on, self.held_out = held_out_of(self.examples, self.config.held_out, self.config.seed)
        probes = {name: layer.modules[0] for name, layer in self.layers.items()}
        stages = stages_of(self.model, self.calibration, probes, sequential=self.config.sequential)
        finished = Finished(self.resume_dir, self._fingerprint(stages) if self.resume_dir else "")
        floats: dict[str, list[Tensor]] = {}
        for number, stage in enumerate(track(stages, "choosing values", enabled=self.progress)):
            stored = finished.load(number)
            if stored is not None:
                floats.update(self._restored(stage, *stored))
                continue
            solved, tuned = self._solved(stage)
            floats.update(solved)
            tensors = {f"{name}/{part}": t for name, each in solved.items() for part, t in enumerate(each)}
            tensors.update({f"/{name}": tensor for name, tensor in tuned.items()})
            for name in solved if self.examples else ():
                tensors.update({f"{name}/{key}": tensor for key, tensor in self.solutions[name].tensors().items()})
            records = {name: self.records[name].model_dump() for name in solved}
            finished.save(number, tensors, records)
        if self.config.tune_model and self.solutions:
            self._tune_model()
            floats.update({name: solution.floats for name, solution in self.solutions.items()})
        if not floats:
            raise InputError(UNREACHED)
        for name, parts in floats.items():
            self.layers[name].put(parts, self.twins[name])
        for name in self.layers:
            reason = "the calibration batches never reach it"
            self.records.setdefault(name, ValuesRecord(action="kept", reason=reason))
            for twin in self.twins[name]:
                self.records[twin.names[0]] = self.records[name].model_copy(update={"seconds": 0.0})

    def _solved(self, stage: Stage) -> tuple[dict[str, list[Tensor]], dict[str, Tensor]]:
        """Solve the layers of a stage; what to hand to the backend, and the block's other tensors that were trained."""
        block = self.model if stage.block is None else stage.block
        tunes = self.config.tune_blocks and stage.block is not None
        batches = [example.batch for example in self.examples] if tunes else self.calibration
        inputs = BlockInputs.captured(self.model, block, batches)
        before = None
        with self._float_values():
            if self.config.sequential and self.config.asymmetric_calibration:
                before = capture_inputs(self.model, block, batches)
            targets = block_outputs(block, before or inputs.calls) if tunes else []
        solutions: dict[str, SolvedWeight] = {}
        floats: dict[str, list[Tensor]] = {}
        for name, solution, record in self.layer_stage.solve(stage, inputs, before):
            floats[name] = solution.floats
            self.records[name] = record
            if self.examples:
                solutions[name] = solution
        trained: dict[str, Tensor] = {}
        if tunes and solutions:
            if before is None:
                # The targets are for the inputs that the blocks before gave; these are not to change.
                self.window.clear()
            trained = self._tune_block(SolvedBlock(stage.name, block, solutions), targets)
            solutions = {name: solution for one in self.window for name, solution in one.solutions.items()}
        self.solutions.update(solutions)
        return {**floats, **{name: solution.floats for name, solution in solutions.items()}}, trained

    @contextmanager
    def _float_values(self) -> Iterator[None]:
        """The float model, for the time of the block."""
        trained = {id(parameter): (parameter, parameter.detach().clone()) for parameter, _ in self.undo}
        with with_float_weights(self.layers.values(), itertools.chain(*self.twins.values())):
            self.put_back()
            try:
                yield
            finally:
                with torch.no_grad():
                    for parameter, value in trained.values():
                        parameter.copy_(value)

    def _tune_block(self, solved: SolvedBlock, targets: Sequence[Tensor]) -> dict[str, Tensor]:
        """Train the block, with those before it in the window; return what was trained besides weights, by name."""
        batches = [example.batch for example in self.examples]
        rows = [example.rows for example in self.examples]
        self.window = [*self.window, solved][-self.config.block_window :]
        calls = [capture_inputs(self.model, one.block, batches) for one in self.window]
        while len(calls) > 1 and not all(
            follows(one.block, *pair) for one, pair in zip(self.window, itertools.pairwise(calls), strict=False)
        ):
            self.window, calls = self.window[1:], calls[1:]
        chain = BlockChain([one.block for one in self.window], calls)
        objective = block_objective(chain, targets, rows, [masks.of(solved.block) for masks in self._masks])
        prefixes = {f"{one.name}." if one.name else "": f"blocks.{number}." for number, one in enumerate(self.window)}

        def inside(path: str) -> str:
            whole = f"{path}."  # a block may be a layer itself
            prefix = next(prefix for prefix in prefixes if whole.startswith(prefix))
            return (prefixes[prefix] + whole.removeprefix(prefix)).removesuffix(".")

        solutions = {name: solution for one in self.window for name, solution in one.solutions.items()}
        title = " and ".join(one.name or "the model" for one in self.window)
        others = self._train(objective, solutions, inside, f"blocks {title}" if len(calls) > 1 else f"block {title}")
        for one in self.window:
            one.solutions.update({name: solutions[name] for name in one.solutions})
        ids = {id(parameter) for parameter in others.values()}
        return {name: p.detach() for name, p in self.model.named_parameters() if id(p) in ids}

    @cached_property
    def _masks(self) -> list[TokenMasks]:
        """Which tokens of each example count."""
        return masks_of(self.model, [(example.args, example.kwargs) for example in self.examples])

    def _tune_model(self) -> None:
        """Train all that was solved on the model's own outputs."""
        calls = [(example.args, example.kwargs) for example in self.examples]
        rows = [example.rows for example in self.examples]
        masks = [masks.own for masks in self._masks]
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        floats: dict[str, Tensor] = {
            _weight_of(path): original
            for layer in self.layers.values()
            for path, original in zip(layer.paths, layer.original, strict=True)
        }
        # What was trained first has its float value in the oldest entry.
        floats.update({names[id(parameter)]: value for parameter, value in reversed(self.undo)})

        def float_outputs(place: int) -> Any:
            return functional_call(self.model, floats, *detached(calls[place]))

        objective = model_objective(self.model, calls, rows, masks, float_outputs, self.calibration_bytes)
        self._train(objective, self.solutions, str, "the model")

    def _train(
        self, objective: Objective, solutions: dict[str, SolvedWeight], inside: Callable[[str], str], title: str
    ) -> dict[str, nn.Parameter]:
        """Train solved weights (and norms, biases) of a module; `inside` gives a layer's path in it.

        Puts the new solutions into `solutions` and the layers, if these, as the backend rounds them, lower the error of
        the calls held out; else all stays as it was. Returns the other parameters that were trained, by their names in
        the module.
        """
        started = time.perf_counter()
        layers = {name: self.layers[name] for name in solutions}
        parts = {
            name: learned_parts(solution, layers[name].parts(), transposed=layers[name].transposed)
            for name, solution in solutions.items()
        }
        paths = {name: [inside(path) for path in layer.paths] for name, layer in layers.items()}
        weights = {
            _weight_of(path): part for name in parts for path, part in zip(paths[name], parts[name], strict=True)
        }
        module, config = objective.module, self.config
        names = list(
            other_parameters(
                module, itertools.chain(*paths.values()), norms=config.tune_norms, biases=config.tune_biases
            )
        )
        before = objective.mean(self.held_out)
        learned = Learned(module, weights, names)
        in_parts = any(len(layer.modules) > 1 for layer in layers.values())
        whole = module is self.model
        options = config.training_options(len(self.trained_on), whole_model=whole, in_parts=in_parts)
        report = train(learned, objective, self.trained_on, self.held_out, options)
        found = {
            name: with_codes(solution, layers[name].grid, *relearned(parts[name]))
            for name, solution in solutions.items()
        }
        others = {name: module.get_parameter(name) for name in names}
        self.undo += [(parameter, parameter.detach().clone()) for parameter in others.values()]
        previous = {name: parameter.detach().clone() for name, parameter in others.items()}
        with torch.no_grad():
            for parameter, value in zip(others.values(), learned.others, strict=True):
                parameter.copy_(value)
        for name, solution in found.items():
            layers[name].put(solution.rounded, self.twins[name])
        after = objective.mean(self.held_out)
        if after < before:
            solutions.update(found)
        else:
            after = before
            with torch.no_grad():
                for name, value in previous.items():
                    others[name].copy_(value)
            for name, solution in solutions.items():
                layers[name].put(solution.rounded, self.twins[name])
        record = TrainingRecord(
            what=title,
            held_out_before=before,
            held_out_after=after,
            steps=report.steps,
            rows=sum(objective.rows[place] for place in self.trained_on),
            rows_held_out=sum(objective.rows[place] for place in self.held_out),
            seconds=time.perf_counter() - started,
        )
        for name in solutions:
            trainings = (*self.records[name].trainings, record)
            self.records[name] = self.records[name].model_copy(update={"trainings": trainings})
        self.layer_stage.notes.append(
            f"{title} was trained for {record.steps} steps: error on {record.rows_held_out} rows held out "
            f"{before:.4g} before, {after:.4g} after"
        )
        return others

    def _restored(
        self, stage: Stage, tensors: Mapping[str, Tensor], records: Mapping[str, Any]
    ) -> dict[str, list[Tensor]]:
        """Put a finished stage into the model."""
        floats: dict[str, list[Tensor]] = {}
        for name in records:
            layer = self.layers[name]
            found = [tensors.get(f"{name}/{number}") for number in range(len(layer.modules))]
            if any(part is None for part in found):
                raise InputError(f"{self.resume_dir}: the values of {name} are missing; delete the folder")
            floats[name] = cast("list[Tensor]", found)
            if self.examples:
                own = {key.removeprefix(f"{name}/"): value for key, value in tensors.items() if key.startswith(name)}
                self.solutions[name] = restored_weight(layer.weight(), floats[name], own, layer.grid)
            layer.put([layer.grid.quantize_dequantize(part) for part in floats[name]], self.twins[name])
            self.records[name] = ValuesRecord.model_validate(records[name])
        for name, parameter in self.model.named_parameters():
            if f"/{name}" in tensors:
                self.undo.append((parameter, parameter.detach().clone()))
                with torch.no_grad():
                    parameter.copy_(tensors[f"/{name}"])
        if self.examples and stage.block is not None:
            self.window.append(SolvedBlock(stage.name, stage.block, {}))
            for one in self.window:
                prefix = f"{one.name}." if one.name else ""
                one.solutions.update({name: self.solutions[name] for name in records if name.startswith(prefix)})
        return floats

    def _fingerprint(self, stages: Sequence[Stage]) -> str:
        """Hash what the solutions depend on."""
        description: dict[str, Any] = {
            "version": version_of(),
            "options": self.config.model_dump(),
            "calibration bytes": self.calibration_bytes,
            "model": described(self.model),
            "stages": [stage.layers for stage in stages],
            "grids": {name: repr(layer.grid) for name, layer in self.layers.items()},
        }
        calls = iter_calls(self.model, self.calibration)
        # Buffers that are in no state dict are the model's too.
        tensors = itertools.chain(self.model.state_dict().values(), self.model.buffers())
        return fingerprint(description, calls, tensors)

    def put_back(self) -> None:
        """Undo what was trained in place."""
        with torch.no_grad():
            for parameter, before in reversed(self.undo):
                parameter.copy_(before)


def _weight_of(path: str) -> str:
    """Name of the weight of the module at this path."""
    return f"{path}.weight" if path else "weight"
