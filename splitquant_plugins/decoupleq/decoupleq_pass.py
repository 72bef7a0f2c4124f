"""DecoupleQPass: choose the values that a backend's plain rounding will give, with calibration data.

decoupleQ (arXiv 2404.12759) solves integers, scales and zeros of each layer for a small error of its outputs. The
solution is written back as float weights that lie on the backend's own grid, so that its rounding to nearest finds
exactly the solution; no backend has to know of it.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, cast

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from splitquant_plugins.config import SplitConfig, validated
from splitquant_plugins.decoupleq.alternation import SolveOptions
from splitquant_plugins.decoupleq.backend_grid import target_of
from splitquant_plugins.decoupleq.blocks import BlockOptions, Call, block_outputs, capture_inputs, other_parameters
from splitquant_plugins.decoupleq.drift import iter_moments_with_drift, with_drift
from splitquant_plugins.decoupleq.joint import most_parts
from splitquant_plugins.decoupleq.on_grid import GridSolution, solve_on_grid
from splitquant_plugins.decoupleq.resume import Finished, fingerprint
from splitquant_plugins.decoupleq.stages import BlockInputs, Stage, stages_of
from splitquant_plugins.decoupleq.tuning import SolvedLayer, tuned_solutions
from splitquant_plugins.errors import AlreadySplitError, ConfigError, InputError
from splitquant_plugins.grid import Granularity, Grid, Scheme, UniformGrid
from splitquant_plugins.manifest import ATTRIBUTE, LayerRecord, Manifest, ValuesRecord, set_manifest
from splitquant_plugins.modules import SplitModule, part_names
from splitquant_plugins.parts import sum_parts
from splitquant_plugins.passes.base import GridRule, ModelPass
from splitquant_plugins.passes.calibration import (
    CALIBRATED_KINDS,
    Batches,
    SecondMoment,
    evaluating,
    iter_calls,
    iter_second_moments,
)
from splitquant_plugins.passes.checks import refuse_quantized_model, refuse_unfit_weights
from splitquant_plugins.passes.module_tree import restored_on_error
from splitquant_plugins.passes.record import new_manifest
from splitquant_plugins.passes.select import Layer, reason_to_ignore, select_layers
from splitquant_plugins.plugins import Plugins, own_version
from splitquant_plugins.progress import track

_UNSPLIT = SplitConfig(k=1, split_bias=False, fold_batchnorm=False)
_DEFAULT_BITS = 2


class DecoupleQConfig(BaseModel):
    """Options of DecoupleQPass."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    bits: int | None = Field(None, ge=2, le=8, description="bits per code; None: the recipe's, or 2")
    granularity: Granularity | None = Field(None, description="what shares a scale; None: the recipe's, or channel")
    group_size: int | None = Field(None, ge=1, description="inputs that share a scale; None: the recipe's")
    scheme: Scheme | None = Field(None, description="affine or symmetric; None: the recipe's, or affine")
    include: tuple[str, ...] = Field((), description="shell patterns of layer names; empty: all layers")
    exclude: tuple[str, ...] = Field((), description="shell patterns of layer names that keep plain rounding")
    sequential: bool = Field(True, description="solve layers in order, each on inputs that the solved ones make")
    drift: float = Field(
        0.5, ge=0, le=1, description="with sequential: part of what the layers before lost that a layer makes up for"
    )
    tune_blocks: bool = Field(False, description="then train scales, zeros and norms of each block")
    tune_norms: bool = Field(True, description="with tune_blocks: train the norms' parameters too")
    tune_biases: bool = Field(False, description="with tune_blocks: train the layers' biases too")
    epochs: int = Field(8, ge=0, description="with tune_blocks: passes over the batches")
    learning_rate: float = Field(1e-3, gt=0, description="with tune_blocks: relative to scales, absolute for the rest")
    damping: float = Field(0.01, ge=0, description="part of the mean diagonal of H that is added to its diagonal")
    rounding: Literal["gptq", "projected"] = Field("gptq", description="how codes are chosen for given scales")
    rounds: int = Field(4, ge=0, description="most alternations of codes and scales per start")
    starts: tuple[float, ...] = Field((1.0, 0.85, 1.2), description="first ranges, as factors of the best plain one")
    sweeps: int = Field(4, ge=0, description="sweeps of coordinate descent after each rounding")
    search_inputs: int = Field(10, ge=0, description="rows of at most so many weights are searched more widely")
    seed: int = Field(0, ge=0, le=2**32 - 1, description="of the search, and of the order of training batches")

    def grid(self, given: Grid | None) -> Grid:
        """Return the recipe's grid, or without one the plain grid of these options; ConfigError where they differ."""
        wanted = {"bits": self.bits, "granularity": self.granularity, "scheme": self.scheme}
        if given is None:
            granularity = self.granularity or ("channel" if self.group_size is None else "group")
            return UniformGrid(self.bits or _DEFAULT_BITS, self.scheme or "affine", granularity, self.group_size)
        # A backend that sets the group size by the shape of the weight says None.
        wanted["group_size"] = self.group_size
        for option, value in wanted.items():
            if value is not None and value != getattr(given, option):
                raise ConfigError(
                    f"DecoupleQPass({option}={value!r}), but the recipe rounds to a grid with {option}="
                    f"{getattr(given, option)!r}: leave the option out, or change the recipe"
                )
        return given


class DecoupleQPass(ModelPass):
    """Choose the rounded values of every layer with calibration data, at no cost in storage.

    Options are those of `DecoupleQConfig`, as keywords; an unknown one is an error that lists them. `calibration`
    are unlabelled batches (dicts of keyword arguments, tuples, tensors, or a function that returns an iterator over
    them); a few hundred inputs do. `resume_dir` keeps finished blocks, from which a run with the same options,
    weights and batches goes on. `calibration_bytes` limits the statistics held at once, `progress` shows a bar. The
    manifest is found with `manifest_of(model)`.

    After a SplitQuantPass the parts of a layer are solved together; they then no longer sum to the float weight,
    but to what serves the layer's outputs best.

    Source: decoupleQ, arXiv 2404.12759.
    """

    def __init__(
        self,
        *,
        calibration: Batches | None = None,
        progress: bool = False,
        resume_dir: str | Path | None = None,
        calibration_bytes: int = 2**30,
        plugins: Plugins | None = None,
        **options: Any,
    ) -> None:
        if calibration is None:
            raise ConfigError("DecoupleQPass needs calibration=batches, a few hundred unlabelled inputs")
        if isinstance(calibration, Iterator):
            raise ConfigError(
                "calibration is a one-shot iterator, and the batches are read several times: give a list, a "
                "DataLoader, or a function that returns an iterator"
            )
        self.plugins = plugins or Plugins.load()
        self.calibration = calibration
        self.progress = progress
        self.resume_dir = resume_dir
        self.calibration_bytes = calibration_bytes
        self.config = _config_from(options)

    @classmethod
    def from_options(cls, options: dict[str, Any], plugins: Plugins | None = None) -> DecoupleQPass:
        """Make a pass of what `options` returned; its calibration data have to be set before it runs."""
        made = cls(calibration=(), plugins=plugins, **options)
        made.calibration = None
        return made

    def options(self) -> dict[str, Any]:
        """Return all keywords but calibration and plugins, as JSON takes them."""
        folder = None if self.resume_dir is None else str(self.resume_dir)
        own = {"progress": self.progress, "resume_dir": folder, "calibration_bytes": self.calibration_bytes}
        return {**self.config.model_dump(mode="json"), **own}

    def __repr__(self) -> str:
        chosen = self.config.model_dump(exclude_defaults=True)
        return f"DecoupleQPass({', '.join(f'{key}={value!r}' for key, value in chosen.items())})"

    def __add__(self, recipe: Any) -> Any:
        """Return a recipe of the same kind as `recipe` that runs this pass first."""
        if isinstance(recipe, ModelPass):
            raise ConfigError(
                f"DecoupleQPass + {type(recipe).__name__}: values are chosen last; write "
                "SplitQuantPass(...) + DecoupleQPass(...) + recipe"
            )
        return super().__add__(recipe)

    def apply(self, model: nn.Module, *, grid: Grid | GridRule | None = None, ignore: Sequence[str] = ()) -> nn.Module:
        """Replace the weights of the model's layers by solved ones and return the model.

        On an error the model is put back as it was.
        """
        self.refuse_missing_calibration()
        _refuse_unfit(model)
        started = time.perf_counter()
        layers, kept = self._layers(model, grid, ignore)
        run = _Run(self, model, layers)
        try:
            with restored_on_error(model), evaluating(model):
                run.solve()
        except BaseException:
            run.put_back()
            raise
        manifest = _manifest_of_run(model, self, run, kept)
        manifest.seconds += time.perf_counter() - started
        set_manifest(model, manifest)
        for record in manifest.layers:
            self.plugins.after_layer(record)
        self.plugins.after_split(model, manifest)
        return model

    def _layers(
        self, model: nn.Module, grid: Grid | GridRule | None, ignore: Sequence[str]
    ) -> tuple[dict[str, ValueLayer], dict[str, str]]:
        """Return the layers to be solved by name, and why the others are not."""
        splits = {name: module for name, module in model.named_modules() if isinstance(module, SplitModule)}
        inside = tuple(f"{name}." if name else "" for name in splits)
        config = _UNSPLIT.model_copy(update={"include": self.config.include, "exclude": self.config.exclude})
        selection = select_layers(model, config, self.plugins, ignore)
        kept = {one.name: str(one.reason) for one in selection.ignored if not one.name.startswith(inside)}
        whole = [layer for layer in selection.split if not layer.name.startswith(inside)]
        refuse_unfit_weights(whole)
        found = {layer.name: ValueLayer.whole(layer) for layer in whole}
        for name, split in splits.items():
            reason = reason_to_ignore([name], self.config, ignore)
            if reason is None:
                found[name] = ValueLayer.split(name, split)
            else:
                kept[name] = reason
        for name, layer in list(found.items()):
            chosen = grid(name) if callable(grid) else self.config.grid(grid)
            if layer.kind not in CALIBRATED_KINDS:
                kept[name] = f"no second moment is known for layers of kind {layer.kind}"
            elif chosen is None:
                kept[name] = "the recipe has no linear grid for it that is known beforehand"
            elif len(layer.modules) > most_parts(target_of(chosen, layer.original[0].shape).values):
                kept[name] = f"{len(layer.modules)} parts of {chosen.bits} bits are too many to be solved together"
            else:
                checked = self.config.grid(chosen)
                # Whole layers may be rounded to a grid that parts are not.
                layer.grid = checked if layer.is_split else getattr(checked, "whole", checked)
                continue
            del found[name]
        if not found:
            reasons = "; ".join(sorted(set(kept.values()))) or "it has no layers"
            raise ConfigError(f"DecoupleQPass finds no layer to solve in {type(model).__name__}: {reasons}")
        return found, kept


class ValueLayer:
    """A layer to be solved: a whole one, or a split one with its parts. Weights have output channels first."""

    grid: Grid

    def __init__(self, names: Sequence[str], kind: str, modules: Sequence[nn.Module], is_split: bool) -> None:
        self.names = tuple(names)
        self.kind = kind
        self.modules = tuple(modules)
        self.is_split = is_split
        self.original = [self._parameter(module) for module in modules]

    @classmethod
    def whole(cls, layer: Layer) -> ValueLayer:
        """A layer that was not split."""
        return cls(layer.names, layer.plan.kind, [layer.module], False)

    @classmethod
    def split(cls, name: str, module: SplitModule) -> ValueLayer:
        """A layer with its parts, which are plain layers."""
        parts = module.parts()
        kinds = {nn.Linear: "linear", nn.Conv1d: "conv1d", nn.Conv2d: "conv2d", nn.Conv3d: "conv3d"}
        kind = kinds.get(type(parts[0]), type(parts[0]).__name__)
        return cls([name], kind, parts, True)

    @property
    def paths(self) -> tuple[str, ...]:
        """Names of the modules that hold the weights."""
        return (
            tuple(f"{self.names[0]}.{part}" for part in part_names(len(self.modules)))
            if self.is_split
            else self.names[:1]
        )

    @property
    def transposed(self) -> bool:
        """Whether the weight is stored [in, out]."""
        return self.kind == "conv1d_hf"

    def _parameter(self, module: nn.Module) -> nn.Parameter:
        return cast(nn.Parameter, module.weight)

    def parts(self) -> list[Tensor]:
        """The float weights, output channels first."""
        return [weight.detach().t() if self.transposed else weight.detach() for weight in self.original]

    def weight(self) -> Tensor:
        """The weight of the float layer: the sum of its parts."""
        return sum_parts(self.parts())

    def put(self, weights: Sequence[Tensor], twins: Sequence[ValueLayer] = ()) -> None:
        """Replace the weights, also those of layers that share them."""
        for number, (weight, original) in enumerate(zip(weights, self.original, strict=True)):
            stored = (weight.t() if self.transposed else weight).contiguous()
            parameter = nn.Parameter(stored, requires_grad=original.requires_grad)
            for layer in (self, *twins):
                layer.modules[number].weight = parameter


class _Run:
    """One application of the pass: solves stage after stage and keeps the records."""

    def __init__(self, owner: DecoupleQPass, model: nn.Module, layers: Mapping[str, ValueLayer]) -> None:
        self.owner = owner
        self.model = model
        self.all_layers = layers
        self.layers: dict[str, ValueLayer] = {}
        self.twins: dict[str, list[ValueLayer]] = {}
        self.records: dict[str, ValuesRecord] = {}
        self.notes: list[str] = []
        self.undo: list[tuple[nn.Parameter, Tensor]] = []
        config = owner.config
        self.options = SolveOptions(**{key: value for key, value in config if key in SolveOptions.__dataclass_fields__})
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
        config = self.owner.config
        probes = {name: layer.modules[0] for name, layer in self.layers.items()}
        stages = stages_of(self.model, self.owner.calibration, probes, sequential=config.sequential)
        finished = Finished(self.owner.resume_dir, self._fingerprint(stages) if self.owner.resume_dir else "")
        floats: dict[str, list[Tensor]] = {}
        for number, stage in enumerate(track(stages, "choosing values", enabled=self.owner.progress)):
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
        config = self.owner.config
        block = self.model if stage.block is None else stage.block
        inputs = BlockInputs(self.model, block, self.owner.calibration)
        before = None
        tunes = config.tune_blocks and stage.block is not None
        with self._float_values():
            if config.sequential and config.drift:
                before = capture_inputs(self.model, block, self.owner.calibration)
            targets = block_outputs(block, before or inputs.calls) if tunes else []
        solutions: dict[str, GridSolution] = {}
        floats: dict[str, list[Tensor]] = {}
        for group in stage.groups:
            for name, moment, cross in self._moments(group, inputs, before):
                layer = self.layers[name]
                started = time.perf_counter()
                if not moment.samples:
                    continue
                weight = layer.weight()
                if cross is not None:
                    weight = with_drift(weight, moment.matrix, cross, config.drift, config.damping)
                solution = solve_on_grid(weight, layer.parts(), moment.matrix, layer.grid, self.options, name=name)
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
        limit = self.owner.calibration_bytes
        if before is not None:
            yield from iter_moments_with_drift(inputs, before, self._float_values, modules, limit)
            return
        found = iter_second_moments(inputs, inputs.batches, modules, max_bytes=limit)
        while True:
            # What is observed in several passes is observed behind layers that were solved in between.
            with nullcontext() if self.owner.config.sequential else self._float_values():
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
        solutions: dict[str, GridSolution],
        inputs: BlockInputs,
        targets: Sequence[Tensor],
    ) -> dict[str, Tensor]:
        """Train the block; put the new solutions into `solutions` and the layers, and return what else was trained."""
        config = self.owner.config
        options = BlockOptions(config.learning_rate, config.epochs, config.tune_norms, config.tune_biases, config.seed)
        prefix = f"{stage.name}." if stage.name else ""
        solved = {}
        for name, solution in solutions.items():
            layer = self.layers[name]
            paths = tuple(path.removeprefix(prefix) for path in layer.paths)
            solved[name] = SolvedLayer(paths, layer.parts(), solution, layer.transposed)
        every = [path for layer in solved.values() for path in layer.paths]
        others = {id(parameter): parameter for parameter in other_parameters(block, every, options)}
        self.undo += [(parameter, parameter.detach().clone()) for parameter in others.values()]
        found, report = tuned_solutions(block, solved, inputs.calls, targets, options, inputs.masks)
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
                raise InputError(f"{self.owner.resume_dir}: the values of {name} are missing; delete the folder")
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
            "options": self.owner.config.model_dump(),
            "stages": [stage.layers for stage in stages],
            "grids": {name: repr(layer.grid) for name, layer in self.layers.items()},
        }
        calls = iter_calls(self.model, self.owner.calibration)
        inputs = (v for args, kwargs in calls for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
        return fingerprint(description, itertools.chain(self.model.state_dict().values(), inputs))

    def put_back(self) -> None:
        """Undo what was trained in place."""
        with torch.no_grad():
            for parameter, before in reversed(self.undo):
                parameter.copy_(before)


def _config_from(options: dict[str, Any]) -> DecoupleQConfig:
    cleaned = dict(options)
    for key in ("include", "exclude"):
        if isinstance(cleaned.get(key), str):
            cleaned[key] = (cleaned[key],)
    for key in ("include", "exclude", "starts"):
        if isinstance(cleaned.get(key), list):
            cleaned[key] = tuple(cleaned[key])
    unknown = sorted(set(cleaned) - set(DecoupleQConfig.model_fields))
    if unknown:
        own = ("calibration", "calibration_bytes", "progress", "resume_dir")
        allowed = ", ".join(sorted([*DecoupleQConfig.model_fields, *own]))
        raise ConfigError(f"DecoupleQPass has no option {', '.join(map(repr, unknown))}; it takes: {allowed}")
    config: DecoupleQConfig = validated(DecoupleQConfig, cleaned, "DecoupleQPass")
    config.grid(None)  # checks that granularity and group_size go together
    SolveOptions(starts=config.starts)
    return config


def _refuse_unfit(model: object) -> None:
    if isinstance(model, (torch.export.ExportedProgram, torch.fx.GraphModule)):
        raise InputError(
            "DecoupleQPass does not work on exported graphs: call DecoupleQPass(...).apply(model, grid=...) on the "
            "model, then export it"
        )
    if not isinstance(model, nn.Module):
        raise InputError(f"DecoupleQPass takes a torch.nn.Module, not a {type(model).__name__}")
    manifest = getattr(model, ATTRIBUTE, None)
    if isinstance(manifest, Manifest) and manifest.values is not None:
        raise AlreadySplitError("DecoupleQPass was applied to this model before; load it afresh")
    refuse_quantized_model(model)


def _manifest_of_run(model: nn.Module, owner: DecoupleQPass, run: _Run, kept: Mapping[str, str]) -> Manifest:
    """Return the manifest of the split, or a new one, with what was solved."""
    before = getattr(model, ATTRIBUTE, None)
    manifest = before if isinstance(before, Manifest) else new_manifest(_UNSPLIT)
    records = {**run.records, **{name: ValuesRecord(action="kept", reason=reason) for name, reason in kept.items()}}
    layers = []
    for record in manifest.layers:
        layers.append(record.model_copy(update={"values": records.pop(record.name, None)}))
    for name, values in records.items():
        layer = run.all_layers.get(name)
        kind = layer.kind if layer is not None else type(model.get_submodule(name)).__name__
        also = layer.names[1:] if layer is not None else ()
        reason = "it was not split: there was no SplitQuantPass" if layer is not None else kept[name]
        layers.append(
            LayerRecord(name=name, kind=kind, action="kept", reason=reason, also_known_as=also, values=values)
        )
    notes = [*manifest.notes, *run.notes]
    joint = sum(values.joint for values in run.records.values())
    if joint:
        notes.append(
            f"DecoupleQPass solved the parts of {joint} layers together; they no longer sum to the float weights"
        )
    return manifest.model_copy(
        update={"layers": layers, "notes": notes, "values": owner.config.model_dump(mode="json")}
    )
