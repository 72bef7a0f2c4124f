"""SplitQuantPass: select layers, split their tensors, build the split modules, check, record."""

from __future__ import annotations

import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from joblib import Parallel, delayed
from torch import Tensor, nn

from splitquant_plugins.check import check_parts, refuse_unfit_model, refuse_unfit_weights
from splitquant_plugins.config import SplitConfig, config_from, validated
from splitquant_plugins.errors import CannotSplit, ConfigError, SplitFailedError
from splitquant_plugins.manifest import LayerRecord, Manifest, set_manifest
from splitquant_plugins.plan import TensorPlan
from splitquant_plugins.plugins import Plugins, _own_version
from splitquant_plugins.progress import track
from splitquant_plugins.selection import KeptLayer, Layer, select_layers
from splitquant_plugins.surgery import replace_module

if TYPE_CHECKING:
    from splitquant_plugins.grid import Grid

GridRule = Callable[[str], "Grid | None"]


class ModelPass(ABC):
    """A pass over a float model that can be put in front of a backend's recipe with `+`."""

    plugins: Plugins

    @abstractmethod
    def apply(
        self, model: nn.Module, *, grid: Grid | GridRule | None = None, leave: Sequence[str] = ()
    ) -> nn.Module:
        """Rewrite the model in place and return it.

        `grid` is the grid that the recipe will round to, for all layers or by name; `leave` are patterns of
        layer names that the recipe does not quantize.
        """

    def __call__(self, model: nn.Module) -> nn.Module:
        """Rewrite the model in place and return it."""
        return self.apply(model)

    def __add__(self, recipe: Any) -> Any:
        """Return a recipe of the same kind as `recipe`, or a longer pass, that runs this pass first."""
        if isinstance(recipe, ModelPass):
            return PassSequence([self, recipe])
        return self.plugins.attach(self, recipe)


class PassSequence(ModelPass):
    """Several passes, one after the other."""

    def __init__(self, passes: Sequence[ModelPass]) -> None:
        self.passes = tuple(passes)
        self.plugins = self.passes[0].plugins

    def apply(
        self, model: nn.Module, *, grid: Grid | GridRule | None = None, leave: Sequence[str] = ()
    ) -> nn.Module:
        """Run the passes in order."""
        for one in self.passes:
            model = one.apply(model, grid=grid, leave=leave)
        return model


class SplitQuantPass(ModelPass):
    """Replace each layer by k layers with narrower ranges whose weights sum to its own.

    Options are those of `SplitConfig` and of the chosen splitter, as keywords; an unknown one is an error
    that lists them. `jobs` is the number of layers worked on at once (any joblib backend applies; -1: all
    cores), `progress` shows a bar. The manifest is found with `manifest_of(model)`.

    Source: SplitQuant, arXiv 2501.12428.
    """

    def __init__(
        self,
        *,
        jobs: int = 1,
        progress: bool = False,
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
        rest = {key: value for key, value in options.items() if key not in own}
        unknown = set(rest) - set(self._splitter.Options.model_fields)
        if unknown:
            allowed = sorted([*SplitConfig.model_fields, *self._splitter.Options.model_fields, "jobs", "progress"])
            raise ConfigError(
                f"SplitQuantPass with splitter {self.config.splitter!r} has no option "
                f"{', '.join(map(repr, sorted(unknown)))}; it takes: {', '.join(allowed)}"
            )
        self.splitter_options = validated(self._splitter.Options, rest, f"splitter {self.config.splitter!r}")

    def __repr__(self) -> str:
        chosen = {**self.config.model_dump(exclude_defaults=True), **self.splitter_options.model_dump()}
        return f"SplitQuantPass({', '.join(f'{key}={value!r}' for key, value in chosen.items())})"

    def apply(
        self, model: nn.Module, *, grid: Grid | GridRule | None = None, leave: Sequence[str] = ()
    ) -> nn.Module:
        """Split the model's layers in place and return the model.

        On an error the layers that were already split are put back.
        """
        refuse_unfit_model(model)
        if self._splitter.needs_grid and grid is None:
            raise ConfigError(
                f"splitter {self.config.splitter!r} needs the grid that the parts will be rounded to: attach the "
                "pass to a recipe (SplitQuantPass(...) + recipe), or call .apply(model, grid=UniformGrid(...))"
            )
        started = time.perf_counter()
        refuse_unfit_weights(select_layers(model, self.config, self.plugins, leave).split)
        notes = self.plugins.prepare_model(model, self.config)
        selection = select_layers(model, self.config, self.plugins, leave)
        manifest = Manifest(
            version=_own_version(),
            config=self.config,
            splitter_options=self.splitter_options.model_dump(),
            notes=notes,
        )
        for kept in selection.kept:
            self._record(manifest, _kept_record(kept.names, kept.reason, kept.module))
        replaced: list[Layer] = []
        try:
            for layer, parts, record in self._split_layers(selection.split, grid):
                if record.action == "split":
                    split = self.plugins.build_module(layer.module, parts, layer.plan)
                    split.train(layer.module.training)
                    split.notify(self.plugins.part_replaced)
                    replaced.append(layer)
                    for name in layer.names:
                        if name:
                            replace_module(model, name, split)
                        else:
                            model = split
                self._record(manifest, record)
        except BaseException:
            for layer in replaced:
                for name in filter(None, layer.names):
                    replace_module(model, name, layer.module)
            raise
        _untie(model, self.config)
        manifest.seconds = time.perf_counter() - started
        set_manifest(model, manifest)
        self.plugins.after_split(model, manifest)
        return model

    def _record(self, manifest: Manifest, record: LayerRecord) -> None:
        manifest.layers.append(record)
        self.plugins.after_layer(record)

    def _split_layers(
        self, layers: Sequence[Layer], grid: Grid | GridRule | None
    ) -> Iterator[tuple[Layer, dict[str, list[Tensor | None]], LayerRecord]]:
        """Split the layers' tensors, several at once, in order; layers with tied weights share their parts."""
        tasks = _SplitTasks(self.plugins)
        firsts: dict[int, Layer] = {}
        for layer in layers:
            firsts.setdefault(id(layer.module._parameters["weight"]), layer)
        calls = (
            delayed(tasks)(layer.plan.weight.detach(), _detached(layer.plan.bias), *self._plans(layer, grid))
            for layer in firsts.values()
        )
        # Threads share the weights; a joblib backend that the caller configured takes precedence.
        results = iter(Parallel(n_jobs=self.jobs, prefer="threads", return_as="generator")(calls))
        done: dict[int, tuple[Layer, SplitTensors]] = {}
        for layer in track(layers, "splitting layers", enabled=self.progress):
            key = id(layer.module._parameters["weight"])
            if key not in done:
                done[key] = (layer, _as_parameters(next(results), layer))
            first, tensors = done[key]
            bias = tensors.bias if first is layer else self._tied_bias(layer, tensors)
            yield layer, {"weight": list(tensors.weight), "bias": bias}, self._split_record(layer, first, tensors, bias)

    def _plans(self, layer: Layer, grid: Grid | GridRule | None) -> tuple[TensorPlan, TensorPlan, Grid | None]:
        def plan(role: Any, granularity: Any) -> TensorPlan:
            return TensorPlan(
                layer=layer.name,
                role=role,
                k=self.config.k,
                splitter=self.config.splitter,
                granularity=granularity,
                options=self.splitter_options,
                seed=self.config.seed,
            )

        splits_bias = self.config.split_bias and self._splitter.splits_bias
        chosen = grid(layer.name) if callable(grid) else grid
        bias_plan = plan("bias", "tensor") if splits_bias else None
        return plan("weight", layer.plan.granularity), bias_plan, chosen

    def _tied_bias(self, layer: Layer, tensors: SplitTensors) -> list[Tensor | None]:
        bias: list[Tensor | None] = [None] * len(tensors.weight)
        bias[0] = layer.plan.bias
        return bias

    def _split_record(
        self, layer: Layer, first: Layer, tensors: SplitTensors, bias: list[Tensor | None]
    ) -> LayerRecord:
        from splitquant_plugins.modules import part_names

        if tensors.reason is not None:
            return _kept_record(layer.names, tensors.reason, layer.module, layer.plan.kind)
        names = part_names(len(tensors.weight))
        return LayerRecord(
            name=layer.name,
            kind=layer.plan.kind,
            action="split",
            also_known_as=layer.names[1:],
            shared_with=None if first is layer else first.name,
            shape=tuple(layer.plan.weight.shape),
            dtype=str(layer.plan.weight.dtype).removeprefix("torch."),
            granularity=layer.plan.granularity,
            splitter=self.config.splitter,
            k=len(tensors.weight),
            parts=names,
            bias_parts=tuple(name for name, part in zip(names, bias, strict=True) if part is not None),
            seconds=tensors.seconds if first is layer else 0.0,
        )


@dataclass(frozen=True)
class SplitTensors:
    """The parts of one layer's weight and bias, or why it stays whole."""

    weight: list[Tensor]
    bias: list[Tensor | None]
    seconds: float
    reason: str | None = None


class _SplitTasks:
    """Splits the tensors of one layer; joblib may carry it to another process, which loads plugins anew."""

    def __init__(self, plugins: Plugins) -> None:
        self._plugins = plugins

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._plugins = Plugins.load()

    @torch.no_grad()
    def __call__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        weight_plan: TensorPlan,
        bias_plan: TensorPlan | None,
        grid: Grid | None,
    ) -> SplitTensors:
        started = time.perf_counter()
        try:
            weights = self._parts(weight, weight_plan, grid)
        except CannotSplit as answer:
            return SplitTensors([], [], time.perf_counter() - started, answer.reason)
        except SplitFailedError as error:
            warnings.warn(f"{error}; the layer is left whole", stacklevel=2)
            return SplitTensors([], [], time.perf_counter() - started, f"it failed the check: {error}")
        if len(weights) == 1:
            return SplitTensors([], [], time.perf_counter() - started, "one part is the layer itself")
        biases: list[Tensor | None] = [None] * len(weights)
        if bias is not None:
            found = self._bias_parts(bias, bias_plan, len(weights))
            biases[: len(found)] = found
        return SplitTensors(weights, biases, time.perf_counter() - started)

    def _parts(self, tensor: Tensor, plan: TensorPlan, grid: Grid | None) -> list[Tensor]:
        parts = self._plugins.split_tensor(tensor, plan, grid)
        check_parts(f"{plan.layer}.{plan.role}", tensor, parts, plan.k)
        return parts

    def _bias_parts(self, bias: Tensor, plan: TensorPlan | None, k: int) -> list[Tensor]:
        if plan is None:
            return [bias]
        try:
            from dataclasses import replace

            return self._parts(bias, replace(plan, k=k), None)
        except CannotSplit:  # a constant bias, often all zero, stays in the first part
            return [bias]


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


def _as_parameters(tensors: SplitTensors, layer: Layer) -> SplitTensors:
    weight_grad = layer.plan.weight.requires_grad
    bias_grad = layer.plan.bias is not None and layer.plan.bias.requires_grad
    return SplitTensors(
        [nn.Parameter(part, requires_grad=weight_grad) for part in tensors.weight],
        [None if part is None else nn.Parameter(part, requires_grad=bias_grad) for part in tensors.bias],
        tensors.seconds,
        tensors.reason,
    )


def _kept_record(names: Sequence[str], reason: str, module: nn.Module, kind: str = "") -> LayerRecord:
    return LayerRecord(
        name=names[0],
        kind=kind or type(module).__name__,
        action="kept",
        reason=reason,
        also_known_as=tuple(names[1:]),
    )


def _untie(model: nn.Module, config: SplitConfig) -> None:
    """Tell a transformers model that its head no longer shares the embedding's weight."""
    if config.untie_embeddings and getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        model.config.tie_word_embeddings = False
