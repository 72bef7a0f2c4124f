"""One application of DecoupleQPass: the layers solved block after block, and tuned, with records of it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from splitquant_plugins.decoupleq.asymmetric_calibration import asymmetric_target, iter_paired_moments
from splitquant_plugins.decoupleq.block_tuning import other_parameters
from splitquant_plugins.decoupleq.capture import BlockInputs, Call, block_outputs, capture_inputs
from splitquant_plugins.decoupleq.config import DecoupleQConfig
from splitquant_plugins.decoupleq.layer_order import Stage, stages_of
from splitquant_plugins.decoupleq.layers import LayerToSolve
from splitquant_plugins.decoupleq.resume import Finished, fingerprint
from splitquant_plugins.decoupleq.solve_weight import SolvedWeight, solve_weight
from splitquant_plugins.decoupleq.tuned_solutions import tuned_solutions
from splitquant_plugins.errors import InputError
from splitquant_plugins.manifest import ValuesRecord
from splitquant_plugins.passes.calibration import Batches, SecondMoment, iter_calls, iter_second_moments
from splitquant_plugins.plugins import own_version
from splitquant_plugins.progress import track


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
        self.all_layers = layers
        self.config = config
        self.calibration = calibration
        self.calibration_bytes = calibration_bytes
        self.resume_dir = resume_dir
        self.progress = progress
        self.layers: dict[str, LayerToSolve] = {}
        self.twins: dict[str, list[LayerToSolve]] = {}
        self.records: dict[str, ValuesRecord] = {}
        self.notes: list[str] = []
        self.undo: list[tuple[nn.Parameter, Tensor]] = []
        firsts: dict[int, str] = {}
        for name, layer in layers.items():
            first = firsts.setdefault(id(layer.original[0]), name)
            if first == name:
                self.layers[name] = layer
            self.twins.setdefault(first, []).extend([layer] if first != name else [])

    def solve(self) -> None:
        """Solve all layers, stage by stage.

        Until all are done the layers hold what the backend will round to; then, what is to be handed to it.
        """
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
            records = {name: self.records[name].model_dump() for name in solved}
            finished.save(number, tensors, records)
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
        inputs = BlockInputs(self.model, block, self.calibration)
        before = None
        tunes = self.config.tune_blocks and stage.block is not None
        with self._float_values():
            if self.config.sequential and self.config.asymmetric_calibration:
                before = capture_inputs(self.model, block, self.calibration)
            targets = block_outputs(block, before or inputs.calls) if tunes else []
        solutions: dict[str, SolvedWeight] = {}
        floats: dict[str, list[Tensor]] = {}
        options = self.config.solve_options()
        for group in stage.groups:
            for name, moment, cross in self._moments(group, inputs, before):
                layer = self.layers[name]
                started = time.perf_counter()
                if not moment.samples:
                    continue
                weight = layer.weight()
                if cross is not None:
                    part, damping = self.config.asymmetric_calibration, self.config.damping
                    weight = asymmetric_target(weight, moment.matrix, cross, part, damping)
                solution = solve_weight(weight, layer.parts(), moment.matrix, layer.grid, options, name=name)
                layer.put(solution.rounded, self.twins[name])
                floats[name] = solution.floats
                self.records[name] = ValuesRecord(
                    action="solved",
                    grid=repr(layer.grid),
                    error_before=solution.error_before,
                    error_after=solution.error_after,
                    rounds=solution.rounds,
                    samples=moment.samples,
                    plain_rows=solution.plain_rows,
                    joint=len(layer.modules) > 1,
                    seconds=time.perf_counter() - started,
                )
                if tunes:
                    solutions[name] = solution
        if not solutions:
            return floats, {}
        trained = self._tune(stage, block, solutions, inputs, targets)
        return {**floats, **{name: solution.floats for name, solution in solutions.items()}}, trained

    def _moments(
        self, group: Sequence[str], inputs: BlockInputs, before: Sequence[Call] | None
    ) -> Iterator[tuple[str, SecondMoment, Tensor | None]]:
        """Second moments of layers, and where there are the float model's inputs too, those across the two."""
        modules = {name: self.layers[name].modules[0] for name in group}
        limit = self.calibration_bytes
        if before is not None:
            yield from iter_paired_moments(inputs, before, self._float_values, modules, limit)
            return
        found = iter_second_moments(inputs, inputs.batches, modules, max_bytes=limit)
        while True:
            # What is observed in several passes is observed behind layers that were solved in between.
            with nullcontext() if self.config.sequential else self._float_values():
                one = next(found, None)
            if one is None:
                return
            yield *one, None

    @contextmanager
    def _float_values(self) -> Iterator[None]:
        """The float model, for the time of the block."""
        modules = [
            (module, original)
            for name, layer in self.layers.items()
            for one in (layer, *self.twins[name])
            for module, original in zip(one.modules, layer.original, strict=True)
        ]
        weights = [module.weight for module, _ in modules]
        trained = {id(parameter): (parameter, parameter.detach().clone()) for parameter, _ in self.undo}
        for module, original in modules:
            module.weight = original
        self.put_back()
        try:
            yield
        finally:
            for (module, _), weight in zip(modules, weights, strict=True):
                module.weight = weight
            with torch.no_grad():
                for parameter, value in trained.values():
                    parameter.copy_(value)

    def _tune(
        self,
        stage: Stage,
        block: nn.Module,
        solutions: dict[str, SolvedWeight],
        inputs: BlockInputs,
        targets: Sequence[Tensor],
    ) -> dict[str, Tensor]:
        """Train the block; put the new solutions into `solutions` and the layers, and return what else was trained."""
        options = self.config.block_options()
        prefix = f"{stage.name}." if stage.name else ""
        paths = [path.removeprefix(prefix) for name in solutions for path in self.layers[name].paths]
        others = {id(parameter): parameter for parameter in other_parameters(block, paths, options)}
        self.undo += [(parameter, parameter.detach().clone()) for parameter in others.values()]
        found, report = tuned_solutions(
            block, prefix, self.layers, solutions, inputs.calls, targets, options, inputs.masks
        )
        for name, solution in found.items():
            solutions[name] = solution
            self.layers[name].put(solution.rounded, self.twins[name])
            update = {"error_after": solution.error_after, "plain_rows": solution.plain_rows}
            self.records[name] = self.records[name].model_copy(update=update)
        if report is not None:
            self.notes.append(
                f"block {stage.name or '(the model)'} was tuned: mean square error of its outputs "
                f"{report.error_before:.4g} before, {report.error_after:.4g} after"
            )
        return {name: p.detach() for name, p in self.model.named_parameters() if id(p) in others}

    def _restored(
        self, stage: Stage, tensors: Mapping[str, Tensor], records: Mapping[str, Any]
    ) -> dict[str, list[Tensor]]:
        """Put a finished stage into the model."""
        floats: dict[str, list[Tensor]] = {}
        for name in stage.layers:
            if name not in records:
                continue
            layer = self.layers[name]
            found = [tensors.get(f"{name}/{number}") for number in range(len(layer.modules))]
            if any(part is None for part in found):
                raise InputError(f"{self.resume_dir}: the values of {name} are missing; delete the folder")
            floats[name] = cast("list[Tensor]", found)
            layer.put([layer.grid.quantize_dequantize(part) for part in floats[name]], self.twins[name])
            self.records[name] = ValuesRecord.model_validate(records[name])
        for name, parameter in self.model.named_parameters():
            if f"/{name}" in tensors:
                self.undo.append((parameter, parameter.detach().clone()))
                with torch.no_grad():
                    parameter.copy_(tensors[f"/{name}"])
        return floats

    def _fingerprint(self, stages: Sequence[Stage]) -> str:
        """Hash what the solutions depend on."""
        description = {
            "version": own_version(),
            "options": self.config.model_dump(),
            "stages": [stage.layers for stage in stages],
            "grids": {name: repr(layer.grid) for name, layer in self.layers.items()},
        }
        calls = iter_calls(self.model, self.calibration)
        inputs = (v for args, kwargs in calls for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
        return fingerprint(description, itertools.chain(self.model.state_dict().values(), inputs))

    def put_back(self) -> None:
        """Undo what was trained in place."""
        with torch.no_grad():
            for parameter, before in reversed(self.undo):
                parameter.copy_(before)
