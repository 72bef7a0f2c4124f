"""SplitQuantPass: select layers, split their tensors, build the split modules, check, record."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from joblib import Parallel, delayed
from torch import Tensor, nn

from splitquant_plugins.checkpoints.transformers_models import forget_tied_embeddings
from splitquant_plugins.config import SplitConfig, config_from, validated
from splitquant_plugins.errors import ConfigError, InputError, SplitQuantWarning
from splitquant_plugins.manifest import LayerRecord, Manifest, set_manifest
from splitquant_plugins.passes.base import GridRule, ModelPass
from splitquant_plugins.passes.budget import Candidate, allocate
from splitquant_plugins.passes.calibration import Batches, collect_second_moments
from splitquant_plugins.passes.checks import refuse_unfit_model, refuse_unfit_weights
from splitquant_plugins.passes.module_tree import replace_module, restored_on_error
from splitquant_plugins.passes.record import ignored_record, layer_record, new_manifest
from splitquant_plugins.passes.select import Layer, select_layers
from splitquant_plugins.passes.split_layer import CandidateMeasure, LayerSplitter, SplitTensors
from splitquant_plugins.plan import LayerPlan, TensorPlan
from splitquant_plugins.plugins import Plugins
from splitquant_plugins.progress import track

if TYPE_CHECKING:
    from splitquant_plugins.grid import Grid

CALIBRATED_KINDS = ("linear", "conv1d", "conv2d", "conv3d", "conv1d_hf")


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
        unknown = set(rest) - set(self._splitter.Options.model_fields)
        if unknown:
            allowed = sorted(
                [*SplitConfig.model_fields, *self._splitter.Options.model_fields, "calibration", "jobs", "progress"]
            )
            raise ConfigError(
                f"SplitQuantPass with splitter {self.config.splitter!r} has no option "
                f"{', '.join(map(repr, sorted(unknown)))}; it takes: {', '.join(allowed)}"
            )
        self.splitter_options = validated(self._splitter.Options, rest, f"splitter {self.config.splitter!r}")

    @property
    def splits_activations(self) -> bool:
        """Whether activation layers are split too."""
        return self.config.activations

    @property
    def needs_modules(self) -> bool:
        """Calibration and budgets look at the whole model, which an exported graph no longer is."""
        return self.calibration is not None or self.config.budget is not None

    def __repr__(self) -> str:
        chosen = {**self.config.model_dump(exclude_defaults=True), **self.splitter_options.model_dump()}
        return f"SplitQuantPass({', '.join(f'{key}={value!r}' for key, value in chosen.items())})"

    def apply(self, model: nn.Module, *, grid: Grid | GridRule | None = None, ignore: Sequence[str] = ()) -> nn.Module:
        """Split the model's layers in place and return the model.

        On an error the model is put back as it was.
        """
        refuse_unfit_model(model)
        if (self._splitter.needs_grid or self.config.budget is not None) and grid is None:
            who = "budget" if self.config.budget is not None else f"splitter {self.config.splitter!r}"
            raise ConfigError(
                f"{who} needs the grid that the parts will be rounded to: attach the "
                "pass to a recipe (SplitQuantPass(...) + recipe), or call .apply(model, grid=UniformGrid(...))"
            )
        started = time.perf_counter()
        selection = select_layers(model, self.config, self.plugins, ignore)
        refuse_unfit_weights(selection.split)
        if not selection.split:
            reasons = "; ".join(sorted({str(layer.reason) for layer in selection.ignored})) or "it has no layers"
            message = f"SplitQuantPass splits no layer of this {type(model).__name__}: {reasons}"
            warnings.warn(message, SplitQuantWarning, stacklevel=3)
        with restored_on_error(model):
            notes = self.plugins.prepare_model(model, self.config)
            manifest = new_manifest(self.config, self.splitter_options.model_dump(), notes)
            result = self._rewrite(model, manifest, grid, ignore)
        if self.config.untie_embeddings:
            forget_tied_embeddings(result)
        manifest.seconds = time.perf_counter() - started
        set_manifest(result, manifest)
        self.plugins.after_split(result, manifest)
        return result

    def _rewrite(
        self, model: nn.Module, manifest: Manifest, grid: Grid | GridRule | None, ignore: Sequence[str]
    ) -> nn.Module:
        """Put split modules in the places of the selected layers, and a record of every layer in the manifest."""
        selection = select_layers(model, self.config, self.plugins, ignore)
        refuse_unfit_weights(selection.split)  # again: the preparation may have changed the weights
        for layer in selection.ignored:
            self._record(manifest, ignored_record(layer.names, str(layer.reason), layer.kind))
        chosen = self._choose_parts(model, selection.split, grid)
        rest = []
        for layer in selection.split:
            if chosen.get(layer.name, self.config.k) == 1 and chosen:
                reason = "within the budget, splitting other layers gains more, or splitting it gains nothing"
                self._record(manifest, ignored_record(layer.names, reason, layer.kind))
            else:
                rest.append(layer)
        done: dict[object, tuple[Layer, SplitTensors]] = {}
        for layers, moments in self._calibrated(model, rest):
            jobs = _Jobs(grid, moments, chosen)
            for layer, parts, record in self._split_layers(layers, jobs, done):
                if record.action == "split":
                    split = self.plugins.build_module(layer.module, parts, layer.plan)
                    split.train(layer.module.training)
                    split.notify(self.plugins.part_replaced)
                    for name in layer.names:
                        if name:
                            replace_module(model, name, split)
                        else:
                            model = split
                self._record(manifest, record)
        return model

    def _calibrated(
        self, model: nn.Module, layers: Sequence[Layer]
    ) -> Iterator[tuple[Sequence[Layer], dict[str, Tensor]]]:
        """Yield the layers in groups, each with the second moments of its inputs where there are data.

        A group's second moments fit into `calibration_bytes`. Splitting the groups before keeps the model's
        outputs, so that all groups see the same inputs.
        """
        if self.calibration is None:
            yield layers, {}
            return
        groups = _groups_within(layers, self.calibration_bytes)
        if len(groups) > 1 and isinstance(self.calibration, Iterator):
            raise InputError(
                f"calibration: the batches are read {len(groups)} times to keep within calibration_bytes, but they "
                "are a one-shot iterator; pass a list, a DataLoader, or a function that returns an iterator"
            )
        for group in groups:
            modules = {layer.name: layer.module for layer in group if layer.plan.kind in CALIBRATED_KINDS}
            moments = collect_second_moments(model, self.calibration, modules, dtype=torch.float32)
            yield group, {name: moment.matrix for name, moment in moments.items() if moment.samples}

    def _choose_parts(self, model: nn.Module, layers: Sequence[Layer], grid: Grid | GridRule | None) -> dict[str, int]:
        """Choose the number of parts of each layer within the budget; empty where there is none."""
        if self.config.budget is None:
            return {}
        options: dict[str, list[Candidate]] = {}
        for group, moments in self._calibrated(model, layers):
            measure = CandidateMeasure(self.plugins)
            tasks = [self._task(layer.name, layer.plan, _Jobs(grid, moments, {})) for layer in group]
            found = Parallel(n_jobs=self.jobs, prefer="threads")(delayed(measure)(*task) for task in tasks)
            options.update(zip([layer.name for layer in group], found, strict=True))
        weights = sum(layer.plan.weight.numel() for layer in layers)
        return {name: candidate.k for name, candidate in allocate(options, self.config.budget * weights).items()}

    def _record(self, manifest: Manifest, record: LayerRecord) -> None:
        manifest.layers.append(record)
        self.plugins.after_layer(record)

    def _split_layers(
        self, layers: Sequence[Layer], jobs: _Jobs, done: dict[object, tuple[Layer, SplitTensors]]
    ) -> Iterator[tuple[Layer, dict[str, list[Tensor | None]], LayerRecord]]:
        """Split the layers' tensors, several at once, in order; layers with tied weights share their parts."""
        splitter = LayerSplitter(self.plugins)
        firsts: dict[object, Layer] = {}
        for layer in layers:
            if _identity(layer.plan.weight) not in done:
                firsts.setdefault(_identity(layer.plan.weight), layer)
        calls = (delayed(splitter)(*self._task(layer.name, layer.plan, jobs)) for layer in firsts.values())
        # Threads share the weights; a joblib backend that the caller configured takes precedence.
        results = iter(Parallel(n_jobs=self.jobs, prefer="threads", return_as="generator")(calls))
        for layer in track(layers, "splitting layers", enabled=self.progress):
            key = _identity(layer.plan.weight)
            if key not in done:
                done[key] = (layer, _as_parameters(next(results), layer.plan))
            first, tensors = done[key]
            bias = tensors.bias if first is layer else _whole_bias(layer.plan, tensors)
            source = None if first is layer else first.name
            record = layer_record(
                layer.names, layer.plan, replace(tensors, bias=bias), self.config.splitter, shared_with=source
            )
            yield layer, {"weight": list(tensors.weight), "bias": bias}, record

    def split_tensors(self, name: str, plan: LayerPlan, grid: Grid | GridRule | None = None) -> SplitTensors:
        """Split the tensors of one layer, without touching any module; for adapters that rewrite graphs."""
        return LayerSplitter(self.plugins)(*self._task(name, plan, _Jobs(grid, {}, {})))

    def candidates(self, name: str, plan: LayerPlan, grid: Grid) -> list[Candidate]:
        """What 1 to 4 parts of a layer would store and what error they would leave, without calibration."""
        return CandidateMeasure(self.plugins)(*self._task(name, plan, _Jobs(grid, {}, {})))

    def _task(
        self, name: str, plan: LayerPlan, jobs: _Jobs
    ) -> tuple[Tensor, Tensor | None, TensorPlan, TensorPlan | None, Grid | None]:
        weight_plan = TensorPlan(
            layer=name,
            role="weight",
            k=jobs.parts.get(name, self.config.k),
            splitter=self.config.splitter,
            granularity=plan.granularity,
            options=self.splitter_options,
            seed=self.config.seed,
            second_moment=jobs.moments.get(name),
        )
        bias_plan = None
        if self.config.split_bias and self._splitter.splits_bias:
            bias_plan = replace(weight_plan, role="bias", granularity="tensor")
        chosen = jobs.grid(name) if callable(jobs.grid) else jobs.grid
        bias = None if plan.bias is None else plan.bias.detach()
        return plan.weight.detach(), bias, weight_plan, bias_plan, chosen


@dataclass(frozen=True)
class _Jobs:
    """What the layers' tensors are split with: the grid, and by layer second moments and numbers of parts."""

    grid: Grid | GridRule | None
    moments: Mapping[str, Tensor]
    parts: Mapping[str, int]


def _groups_within(layers: Sequence[Layer], limit: int) -> list[list[Layer]]:
    """Cut the layers into runs whose second moments in float32 take at most `limit` bytes, or one layer."""
    groups: list[list[Layer]] = [[]]
    taken = 0
    for layer in layers:
        size = 4 * layer.plan.groups * layer.plan.weight[0].numel() ** 2
        if groups[-1] and taken + size > limit:
            groups.append([])
            taken = 0
        groups[-1].append(layer)
        taken += size
    return groups


def _identity(tensor: Tensor) -> object:
    """Return a key that is equal for tensors, views among them, that show the same memory in the same way."""
    if not tensor.numel():
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _whole_bias(plan: LayerPlan, tensors: SplitTensors) -> list[Tensor | None]:
    return [plan.bias, *[None] * (len(tensors.weight) - 1)] if tensors.weight else []


def _as_parameters(tensors: SplitTensors, plan: LayerPlan) -> SplitTensors:
    weight_grad = plan.weight.requires_grad
    bias_grad = plan.bias is not None and plan.bias.requires_grad
    return replace(
        tensors,
        weight=[nn.Parameter(part, requires_grad=weight_grad) for part in tensors.weight],
        bias=[None if part is None else nn.Parameter(part, requires_grad=bias_grad) for part in tensors.bias],
    )
