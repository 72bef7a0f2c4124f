"""SplitQuantPass: select layers, split their tensors, build the split modules, check, record."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from joblib import Parallel, delayed
from torch import Tensor, nn

from splitquant_plugins.check import refuse_unfit_model, refuse_unfit_weights
from splitquant_plugins.config import SplitConfig, config_from, validated
from splitquant_plugins.errors import ConfigError
from splitquant_plugins.manifest import LayerRecord, Manifest, set_manifest
from splitquant_plugins.modules import part_names
from splitquant_plugins.plan import LayerPlan, TensorPlan
from splitquant_plugins.plugins import Plugins, _own_version
from splitquant_plugins.progress import track
from splitquant_plugins.selection import Layer, select_layers
from splitquant_plugins.surgery import replace_module
from splitquant_plugins.tensors import LayerSplitter, SplitTensors

if TYPE_CHECKING:
    from splitquant_plugins.grid import Grid

GridRule = Callable[[str], "Grid | None"]


class ModelPass(ABC):
    """A pass over a float model that can be put in front of a backend's recipe with `+`."""

    plugins: Plugins

    @property
    def splits_activations(self) -> bool:
        """Whether the pass splits activation layers, which weight-only backends refuse."""
        return False

    @abstractmethod
    def apply(self, model: nn.Module, *, grid: Grid | GridRule | None = None, leave: Sequence[str] = ()) -> nn.Module:
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

    @property
    def splits_activations(self) -> bool:
        """Whether any of the passes splits activation layers."""
        return any(one.splits_activations for one in self.passes)

    def apply(self, model: nn.Module, *, grid: Grid | GridRule | None = None, leave: Sequence[str] = ()) -> nn.Module:
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

    @property
    def splits_activations(self) -> bool:
        """Whether activation layers are split too."""
        return self.config.activations

    def __repr__(self) -> str:
        chosen = {**self.config.model_dump(exclude_defaults=True), **self.splitter_options.model_dump()}
        return f"SplitQuantPass({', '.join(f'{key}={value!r}' for key, value in chosen.items())})"

    def apply(self, model: nn.Module, *, grid: Grid | GridRule | None = None, leave: Sequence[str] = ()) -> nn.Module:
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
            self._record(manifest, kept_record(kept.names, kept.reason, type(kept.module).__name__))
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
        splitter = LayerSplitter(self.plugins)
        firsts: dict[int, Layer] = {}
        for layer in layers:
            firsts.setdefault(id(layer.module._parameters["weight"]), layer)
        calls = (delayed(splitter)(*self._task(layer.name, layer.plan, grid)) for layer in firsts.values())
        # Threads share the weights; a joblib backend that the caller configured takes precedence.
        results = iter(Parallel(n_jobs=self.jobs, prefer="threads", return_as="generator")(calls))
        done: dict[int, tuple[Layer, SplitTensors]] = {}
        for layer in track(layers, "splitting layers", enabled=self.progress):
            key = id(layer.module._parameters["weight"])
            if key not in done:
                done[key] = (layer, _as_parameters(next(results), layer.plan))
            first, tensors = done[key]
            bias = tensors.bias if first is layer else _whole_bias(layer.plan, tensors)
            record = self.record(layer.names, layer.plan, replace(tensors, bias=bias))
            if first is not layer:
                record = record.model_copy(update={"shared_with": first.name, "seconds": 0.0})
            yield layer, {"weight": list(tensors.weight), "bias": bias}, record

    def split_tensors(self, name: str, plan: LayerPlan, grid: Grid | GridRule | None = None) -> SplitTensors:
        """Split the tensors of one layer, without touching any module; for adapters that rewrite graphs."""
        return LayerSplitter(self.plugins)(*self._task(name, plan, grid))

    def _task(
        self, name: str, plan: LayerPlan, grid: Grid | GridRule | None
    ) -> tuple[Tensor, Tensor | None, TensorPlan, TensorPlan | None, Grid | None]:
        weight_plan = TensorPlan(
            layer=name,
            role="weight",
            k=self.config.k,
            splitter=self.config.splitter,
            granularity=plan.granularity,
            options=self.splitter_options,
            seed=self.config.seed,
        )
        bias_plan = None
        if self.config.split_bias and self._splitter.splits_bias:
            bias_plan = replace(weight_plan, role="bias", granularity="tensor")
        chosen = grid(name) if callable(grid) else grid
        bias = None if plan.bias is None else plan.bias.detach()
        return plan.weight.detach(), bias, weight_plan, bias_plan, chosen

    def record(self, names: Sequence[str], plan: LayerPlan, tensors: SplitTensors) -> LayerRecord:
        """Return the manifest's record of a layer whose tensors were split."""
        if tensors.reason is not None:
            return kept_record(names, tensors.reason, plan.kind)
        parts = part_names(len(tensors.weight))
        return LayerRecord(
            name=names[0],
            kind=plan.kind,
            action="split",
            also_known_as=tuple(names[1:]),
            shape=tuple(plan.weight.shape),
            dtype=str(plan.weight.dtype).removeprefix("torch."),
            granularity=plan.granularity,
            splitter=self.config.splitter,
            k=len(parts),
            parts=parts,
            bias_parts=tuple(n for n, part in zip(parts, tensors.bias, strict=True) if part is not None),
            seconds=tensors.seconds,
        )


def kept_record(names: Sequence[str], reason: str, kind: str) -> LayerRecord:
    """Return the manifest's record of a layer that stays whole."""
    return LayerRecord(name=names[0], kind=kind, action="kept", reason=reason, also_known_as=tuple(names[1:]))


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


def _untie(model: nn.Module, config: SplitConfig) -> None:
    """Tell a transformers model that its head no longer shares the embedding's weight."""
    if config.untie_embeddings and getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        model.config.tie_word_embeddings = False
