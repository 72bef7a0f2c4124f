"""Every hook of the package. Built-in splitters, layer types and backends go through the same ones.

A plugin is a module, named by an entry point of the group `splitquant`, with functions of these names marked
`@hookimpl`. It must import neither torch nor a backend when it is itself imported. Implementations may take
fewer arguments than listed here. Hooks marked *first result* stop at the first answer that is not None, and
ask the plugin that was registered last first; the built-in implementations come last of all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import pluggy

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor, nn

    from splitquant_plugins.backends import Backend
    from splitquant_plugins.config import SplitConfig
    from splitquant_plugins.grid import Grid
    from splitquant_plugins.manifest import LayerRecord, Manifest
    from splitquant_plugins.modules import SplitModule
    from splitquant_plugins.passes.base import ModelPass
    from splitquant_plugins.plan import LayerPlan, Skip, TensorPlan
    from splitquant_plugins.splitters.base import Splitter

PROJECT = "splitquant"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


class RegisterSplitter(Protocol):
    """The callback of `splitquant_register_splitters`."""

    def __call__(self, name: str, factory: str | Callable[[], Splitter], summary: str) -> None: ...


class RegisterBackend(Protocol):
    """The callback of `splitquant_register_backends`."""

    def __call__(self, name: str, factory: str | Callable[[], Backend], summary: str) -> None: ...


@hookspec
def splitquant_register_splitters(register: RegisterSplitter) -> None:
    """Call `register(name, factory, summary)`; `factory` returns a Splitter or is its "module:Class"."""


@hookspec
def splitquant_register_backends(register: RegisterBackend) -> None:
    """Call `register(name, factory, summary)`; `factory` returns a Backend or is its "module:Class"."""


@hookspec
def splitquant_prepare_model(model: nn.Module, config: SplitConfig) -> Sequence[str] | None:
    """Change the model, keeping its outputs, before layers are selected; answer notes for the manifest."""


@hookspec(firstresult=True)
def splitquant_select_layer(name: str, module: nn.Module, config: SplitConfig) -> LayerPlan | Skip | None:
    """Say how to split a layer, or why not to; None for a module that is no layer of yours (first result)."""


@hookspec(firstresult=True)
def splitquant_split_tensor(tensor: Tensor, plan: TensorPlan, grid: Grid | None) -> Sequence[Tensor] | None:
    """Split one tensor into parts that sum to it (first result). The built-in asks the named splitter."""


@hookspec(firstresult=True)
def splitquant_build_module(
    module: nn.Module, parts: Mapping[str, Sequence[Tensor | None]], plan: LayerPlan
) -> SplitModule | None:
    """Build the split module from `parts["weight"]` and `parts["bias"]` (first result).

    Both lists have one entry per part. It is also called with empty tensors, to rebuild the skeleton of a
    saved model.
    """


@hookspec(firstresult=True)
def splitquant_attach(split_pass: ModelPass, recipe: Any) -> Any | None:
    """Answer `pass + recipe`: a recipe of the same kind that runs the pass first (first result)."""


@hookspec
def splitquant_part_replaced(split: SplitModule, part: str, module: nn.Module) -> None:
    """Notice that a backend put its own module in the place of a part."""


@hookspec
def splitquant_after_layer(record: LayerRecord) -> None:
    """Notice that a layer was split or left whole."""


@hookspec
def splitquant_after_split(model: nn.Module, manifest: Manifest) -> None:
    """Notice that the pass is through with a model."""
