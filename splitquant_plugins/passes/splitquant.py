"""SplitQuantPass: select layers, split their tensors, build the split modules, check, record."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from joblib import Parallel, delayed
from torch import Tensor, nn

from splitquant_plugins.checkpoints.coverage import coverage, float_tensors
from splitquant_plugins.checkpoints.transformers_models import forget_tied_embeddings
from splitquant_plugins.config import SplitConfig, config_from, validated
from splitquant_plugins.errors import ConfigError, SplitQuantWarning
from splitquant_plugins.grid import Granularity, Grid
from splitquant_plugins.manifest import LayerRecord, Manifest, set_manifest
from splitquant_plugins.modules import SplitModule
from splitquant_plugins.passes.base import GridRule, ModelPass
from splitquant_plugins.passes.budget import Candidate, allocate
from splitquant_plugins.passes.build import build_split, replace_everywhere
from splitquant_plugins.passes.calibration import Batches
from splitquant_plugins.passes.checks import refuse_unfit_model, refuse_unfit_weights
from splitquant_plugins.passes.layer_moments import LayerMoments
from splitquant_plugins.passes.module_tree import restored_on_error
from splitquant_plugins.passes.record import ignored_record, layer_record, new_manifest, warn_of_harm
from splitquant_plugins.passes.select import AnyLayer, Layer, select_layers
from splitquant_plugins.passes.split_layer import (
    LayerTask,
    SplitTensors,
    as_parameters,
    check_split,
    measure_candidates,
    share_parts,
    split_task,
)
from splitquant_plugins.plan import LayerPlan, TensorPlan
from splitquant_plugins.plugins import Plugins
from splitquant_plugins.progress import track

UNREACHED = "the calibration batches do not reach it, and its errors are those of its weight"
WITHIN_BUDGET = "within the budget, splitting other layers gains more, or splitting it gains nothing"


class SplitQuantPass(ModelPass):
    """Replace each layer by k layers with narrower ranges whose weights sum to its own.

    Options are those of `SplitConfig` and of the chosen splitter, as keywords; an unknown one is an error
    that lists them. `jobs` is the number of layers worked on at once (any joblib backend applies; -1: all
    cores), `progress` shows a bar. The manifest is found with `manifest_of(model)`.

    `calibration` are unlabelled batches (dicts of keyword arguments, tuples, tensors, or a function that
    returns an iterator over them) that the splitter weighs errors with; the statistics of as many layers are
    held at once as fit into `calibration_bytes`. `budget` is a limit of stored bits per weight over the
    layers, within which 1 to 4 parts are chosen for each by the error that they remove; it needs a grid.

    Source: SplitQuant, arXiv 2501.12428.
    """

    def __init__(
        self,
        *,
        jobs: int = 1,
        progress: bool = False,
        calibration: Batches | None = None,
        calibration_bytes: int = 2**30,
        plugins: Plugins | None = None,
        **options: Any,
    ) -> None:
        if isinstance(jobs, bool) or not isinstance(jobs, int) or (jobs < 1 and jobs != -1):
            raise ConfigError(f"jobs={jobs!r}: give the number of layers to work on at once, or -1 for all cores")
        if isinstance(calibration_bytes, bool) or not isinstance(calibration_bytes, int) or calibration_bytes < 1:
            raise ConfigError(f"calibration_bytes={calibration_bytes!r}: give a number of bytes, at least 1")
        if not isinstance(progress, bool):
            raise ConfigError(f"progress={progress!r}: give True or False")
        if plugins is not None and not isinstance(plugins, Plugins):
            raise ConfigError(f"plugins={plugins!r}: give what Plugins.load() returns, or leave it out")
        self.plugins = plugins or Plugins.load()
        own = {key: value for key, value in options.items() if key in SplitConfig.model_fields}
        self.config = config_from(own)
        self.jobs = jobs
        self.progress = progress
        self._splitter = self.plugins.splitter(self.config.splitter)
        self.calibration = calibration
        self.calibration_bytes = calibration_bytes
        if calibration is not None and not self._splitter.uses_calibration:
            raise ConfigError(f"splitter {self.config.splitter!r} makes no use of calibration data; leave it out")
        if self.config.budget is not None and "k" in options:
            raise ConfigError("budget chooses the parts of each layer; leave k out")
        rest = {key: value for key, value in options.items() if key not in own}
        also = [*SplitConfig.model_fields, "calibration", "jobs", "progress"]
        owner = f"SplitQuantPass with splitter {self.config.splitter!r}"
        self.splitter_options = validated(self._splitter.Options, rest, owner, also)

    @property
    def splits_activations(self) -> bool:
        return self.config.activations

    @property
    def needs_grid(self) -> bool:
        """Whether the grid that the parts will be rounded to has to be known."""
        return self._splitter.needs_grid or self.config.budget is not None

    @property
    def needs_modules(self) -> bool:
        """With calibration and budgets: batches are what the model takes, and an exported graph may take less."""
        return self.calibration is not None or self.config.budget is not None

    def options(self) -> dict[str, Any]:
        """Return all keywords but calibration and plugins, as JSON takes them."""
        config = self.config.model_dump(mode="json", exclude={"k"} if self.config.budget is not None else None)
        own = {"jobs": self.jobs, "progress": self.progress, "calibration_bytes": self.calibration_bytes}
        return {**config, **self.splitter_options.model_dump(mode="json"), **own}

    def __repr__(self) -> str:
        chosen = {**self.config.model_dump(exclude_defaults=True), **self.splitter_options.model_dump()}
        return f"SplitQuantPass({', '.join(f'{key}={value!r}' for key, value in chosen.items())})"

    def apply(self, model: nn.Module, *, grid: Grid | GridRule | None = None, ignore: Sequence[str] = ()) -> nn.Module:
        """Prepare the model, select its layers, split their tensors, build split modules, check and record them.

        The modules take the layers' places in the model, which is returned. On an error it is put back as it was.
        """
        self.refuse_missing_calibration()
        if isinstance(ignore, str):
            raise ConfigError(f"ignore={ignore!r}: give a list of layer names")
        refuse_unfit_model(model)
        self._refuse_missing_grid(grid)
        manifest, started = new_manifest(self.config, self.splitter_options.model_dump()), time.perf_counter()
        with restored_on_error(model):
            manifest.notes += self.plugins.prepare_model(model, self.config)
            tensors = float_tensors(model)
            layers = self._select(model, ignore, manifest)
            for layer, parts in self.split_layers(model, layers, grid):
                module = self._build(layer, parts)
                checked = check_split(layer.name, layer.plan, parts)
                model = model if checked.reason else replace_everywhere(model, layer.names, module)
                self._record(manifest, layer_record(layer.names, layer.plan, checked))
            manifest.coverage = coverage(tensors, None, manifest)
            return self._finish(model, manifest, started)

    def _select(self, model: nn.Module, ignore: Sequence[str], manifest: Manifest) -> list[Layer]:
        """Return the layers to be split; the others, with their reasons, go into the manifest."""
        selection = select_layers(model, self.config, self.plugins, ignore)
        refuse_unfit_weights(selection.split)
        for layer in selection.ignored:
            self._record(manifest, ignored_record(layer.names, str(layer.reason), layer.kind))
        if not selection.split:
            reasons = "; ".join(sorted({str(layer.reason) for layer in selection.ignored})) or "it has no layers"
            message = f"SplitQuantPass splits no layer of this {type(model).__name__}: {reasons}"
            warnings.warn(message, SplitQuantWarning, stacklevel=4)
        return selection.split

    def split_layers(
        self, model: nn.Module, layers: Sequence[AnyLayer], grid: Grid | GridRule | None
    ) -> Iterator[tuple[AnyLayer, SplitTensors]]:
        """Yield the layers with their parts, or with the reason why they stay whole.

        With calibration data, layers are taken in groups whose second moments fit into `calibration_bytes`. Splitting
        the groups before keeps the model's outputs, so that all groups see the same inputs.
        """
        moments = LayerMoments(
            model,
            self.calibration,
            self.calibration_bytes,
            objective=self.config.objective,
            objective_groups=self.config.objective_groups,
        )
        numbers = self._parts_within_budget(layers, grid, moments)
        for layer in layers:
            if numbers.get(layer.name) == 1:
                yield layer, SplitTensors([], [], 0.0, WITHIN_BUDGET)
        rest = [layer for layer in layers if numbers.get(layer.name) != 1]
        done: dict[object, tuple[str, SplitTensors]] = {}
        for group, found in moments.groups(rest):
            firsts: dict[object, Layer] = {}
            for layer in group:
                if _identity(layer.plan.weight) not in done:
                    firsts.setdefault(_identity(layer.plan.weight), layer)
            tasks = (
                self.task(layer.name, layer.plan, grid, numbers.get(layer.name), found.get(layer.name))
                for layer in firsts.values()
            )
            # Threads share the weights; a joblib backend that the caller configured takes precedence.
            workers = Parallel(n_jobs=self.jobs, prefer="threads", return_as="generator")
            results = workers(delayed(split_task)(task, self.plugins) for task in tasks)
            for layer in track(group, "splitting layers", enabled=self.progress):
                key = _identity(layer.plan.weight)
                if key in done:
                    yield layer, share_parts(layer.plan, *done[key])
                else:
                    tensors = as_parameters(layer.plan, next(results))
                    if self.calibration is not None and layer.name not in found:
                        tensors = replace(tensors, why="; ".join(filter(None, (tensors.why, UNREACHED))))
                    done[key] = (layer.name, tensors)
                    yield layer, done[key][1]

    def _parts_within_budget(
        self, layers: Sequence[Layer], grid: Grid | GridRule | None, moments: LayerMoments
    ) -> dict[str, int]:
        """Choose the number of parts of each layer within the budget; empty where there is none.

        Candidates are measured and let go of: the parts of all would take nine times the memory of the weights, and
        the chosen ones are made again. The second moments are kept for that where those of all layers fit into
        `calibration_bytes`, so that the batches are read once; else they are read twice for each group.
        """
        if self.config.budget is None:
            return {}
        options: dict[str, list[Candidate]] = {}
        for group, found in moments.groups(layers):
            tasks = (self.task(layer.name, layer.plan, grid, None, found.get(layer.name)) for layer in group)
            workers = Parallel(n_jobs=self.jobs, prefer="threads")
            answers = workers(delayed(measure_candidates)(task, self.plugins) for task in tasks)
            options.update(zip([layer.name for layer in group], answers, strict=True))
        weights = sum(layer.plan.weight.numel() for layer in layers)
        return {name: candidate.k for name, candidate in allocate(options, self.config.budget * weights).items()}

    def _build(self, layer: Layer, tensors: SplitTensors) -> SplitModule | None:
        """Build the module that is to take a layer's place, unless the layer stays whole."""
        if tensors.reason is not None:
            return None
        return build_split(self.plugins, layer.module, {"weight": tensors.weight, "bias": tensors.bias}, layer.plan)

    def _record(self, manifest: Manifest, record: LayerRecord) -> None:
        manifest.layers.append(record)
        self.plugins.after_layer(record)

    def _finish(self, model: nn.Module, manifest: Manifest, started: float) -> nn.Module:
        if self.config.untie_embeddings:
            forget_tied_embeddings(model)
        manifest.seconds = time.perf_counter() - started
        warn_of_harm(manifest)
        set_manifest(model, manifest)
        self.plugins.after_split(model, manifest)
        return model

    def _refuse_missing_grid(self, grid: Grid | GridRule | None) -> None:
        if grid is not None and not callable(grid) and not callable(getattr(grid, "quantize_dequantize", None)):
            raise ConfigError(f"grid={grid!r}: give a Grid such as UniformGrid(4), or a function of a layer's name")
        if self.config.objective == "predictions" and self.calibration is None:
            raise ConfigError("objective='predictions' runs calibration data: give calibration=batches")
        if grid is None and self.needs_grid:
            who = "budget" if self.config.budget is not None else f"splitter {self.config.splitter!r}"
            raise ConfigError(
                f"{who} needs the grid that the parts will be rounded to: attach the "
                "pass to a recipe (SplitQuantPass(...) + recipe), or call .apply(model, grid=UniformGrid(...))"
            )
        if grid is None and self.calibration is not None:
            raise ConfigError(
                "calibration weighs the errors that a grid makes, and none is known: attach the pass to a recipe, or "
                "call .apply(model, grid=UniformGrid(...))"
            )

    def split_tensors(
        self, name: str, plan: LayerPlan, grid: Grid | GridRule | None = None, k: int | None = None
    ) -> SplitTensors:
        """Split and check the tensors of one layer, without touching any module; for those who have no modules.

        In `k` parts, or as many as the options say.
        """
        return check_split(name, plan, split_task(self.task(name, plan, grid, k), self.plugins))

    def candidates(self, name: str, plan: LayerPlan, grid: Grid) -> list[Candidate]:
        """What 1 to 4 parts of a layer would store and what error they would leave, without calibration."""
        return measure_candidates(self.task(name, plan, grid), self.plugins)

    def task(
        self,
        name: str,
        plan: LayerPlan,
        grid: Grid | GridRule | None,
        k: int | None = None,
        second_moment: Tensor | None = None,
    ) -> LayerTask:
        """Return the work on one layer's tensors: in `k` parts, or as many as the options say."""
        known = grid(name) if callable(grid) else grid
        weight_plan = TensorPlan(
            layer=name,
            role="weight",
            k=self.config.k if k is None else k,
            splitter=self.config.splitter,
            granularity=_clustered_together(plan, self.config, known),
            options=self.splitter_options,
            seed=self.config.seed,
            second_moment=second_moment,
        )
        bias_plan = replace(weight_plan, role="bias", granularity="tensor") if self.config.split_bias else None
        bias = None if plan.bias is None else plan.bias.detach()
        return LayerTask(plan.weight.detach(), bias, weight_plan, bias_plan, known)


def _clustered_together(plan: LayerPlan, config: SplitConfig, grid: Grid | None) -> Granularity:
    """What is clustered at once: with one scale for the tensor, the tensor, unless the user said otherwise."""
    one_scale = grid is not None and grid.granularity == "tensor"
    return "tensor" if config.granularity == "auto" and one_scale else plan.granularity


def _identity(tensor: Tensor) -> object:
    """Return a key that is equal for tensors, views among them, that show the same memory in the same way."""
    if not tensor.numel():
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
