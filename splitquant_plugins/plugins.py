"""Loading, listing and blocking plugins, and a typed face over the hook calls.

Entry points are loaded one by one, so that a broken plugin is named, skipped and listed and takes nothing
else with it. `SPLITQUANT_BLOCK_PLUGINS=name,name` blocks entry points, `SPLITQUANT_STRICT=1` turns a broken
plugin into an error.
"""

from __future__ import annotations

import os
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module, metadata
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

import pluggy

from splitquant_plugins import hookspecs
from splitquant_plugins.errors import (
    CannotSplit,
    ConfigError,
    PluginError,
    SplitQuantError,
    SplitQuantWarning,
    first_line,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from splitquant_plugins.backends import Backend
    from splitquant_plugins.config import SplitConfig
    from splitquant_plugins.grid import Grid
    from splitquant_plugins.manifest import LayerRecord, Manifest
    from splitquant_plugins.modules import SplitModule
    from splitquant_plugins.passes.base import ModelPass
    from splitquant_plugins.plan import LayerPlan, Skip, TensorPlan
    from splitquant_plugins.splitters.base import Splitter

BUILTIN_PLUGINS = (
    "splitquant_plugins.builtin.splitters",
    "splitquant_plugins.builtin.layers",
    "splitquant_plugins.builtin.preparations",
    "splitquant_plugins.builtin.backends",
)
BLOCK_VARIABLE = "SPLITQUANT_BLOCK_PLUGINS"
STRICT_VARIABLE = "SPLITQUANT_STRICT"
NOT_INSTALLED = "not installed"


@dataclass(frozen=True)
class PluginInfo:
    """One line of `splitquant plugins`: a loaded plugin, or a broken one with the reason."""

    name: str
    source: str
    version: str
    hooks: tuple[str, ...] = ()
    error: str | None = None
    details: str | None = None


@dataclass(frozen=True)
class Registered:
    """A named factory that a plugin registered."""

    name: str
    factory: str | Callable[[], Any]
    summary: str
    plugin: str

    def create(self) -> Any:
        """Import and call the factory."""
        try:
            found = resolve_name(self.factory) if isinstance(self.factory, str) else self.factory
        except (ImportError, AttributeError) as error:
            raise PluginError(
                f"plugin {self.plugin!r} registered {self.name!r} as {self.factory!r}, which cannot be loaded: {error}"
            ) from error
        except (Exception, SystemExit) as error:
            raise self._broken(error) from error
        try:
            return found()
        except SplitQuantError:
            raise
        except (Exception, SystemExit) as error:
            raise self._broken(error) from error

    def _broken(self, error: BaseException) -> PluginError:
        return PluginError(f"plugin {self.plugin!r}: making its {self.name!r} raised {type(error).__name__}: {error}")


class Plugins:
    """The plugins of one pass; built by `Plugins.load`."""

    def __init__(self) -> None:
        self._manager = pluggy.PluginManager(hookspecs.PROJECT)
        self._manager.add_hookspecs(hookspecs)
        self.infos: list[PluginInfo] = []
        self.splitters: dict[str, Registered] = {}
        self.backends: dict[str, Registered] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Plugins:
        """Copies of a recipe share the plugins, which are code."""
        return self

    def __reduce__(self) -> tuple[Callable[[], Plugins], tuple[()]]:
        """Plugins are code, and are not pickled: where a model or a task is loaded, the installed ones are."""
        return Plugins.load, ()

    @classmethod
    def load(cls, environment: Mapping[str, str] | None = None) -> Plugins:
        """Load the built-in plugins and those named by entry points of the group `splitquant`."""
        environment = os.environ if environment is None else environment
        plugins = cls()
        version = version_of()
        for name in BUILTIN_PLUGINS:
            plugins.add(import_module(name), name.rpartition(".")[2], "built in", version)
        plugins.add(_SplitterDispatch(plugins), "splitter dispatch", "built in", version)
        blocked = {name.strip() for name in environment.get(BLOCK_VARIABLE, "").split(",")}
        for entry in sorted(metadata.entry_points(group=hookspecs.PROJECT), key=lambda e: e.name):
            if entry.name not in blocked:
                plugins._add_entry_point(entry, strict=environment.get(STRICT_VARIABLE, "") not in ("", "0"))
        return plugins

    def _add_entry_point(self, entry: metadata.EntryPoint, *, strict: bool) -> None:
        source = entry.dist.name if entry.dist else entry.value
        version = entry.dist.version if entry.dist else "unknown"
        try:
            self.add(entry.load(), entry.name, source, version)
        except (Exception, SystemExit) as error:  # a module that exits is broken like one that raises
            message = f"{type(error).__name__}: {error}"
            if strict:
                raise PluginError(f"plugin {entry.name!r} of {source} is broken: {message}") from error
            details = traceback.format_exc()
            self.infos.append(PluginInfo(entry.name, source, version, error=message, details=details))
            warnings.warn(
                f"splitquant skips the broken plugin {entry.name!r} of {source} ({message}); "
                f"block it with {BLOCK_VARIABLE}={entry.name}",
                SplitQuantWarning,
                stacklevel=4,
            )

    def add(self, plugin: Any, name: str, source: str = "added in code", version: str = "unknown") -> None:
        """Register one plugin; an unknown hook or a name already taken is a PluginError, and undone."""
        if self._manager.is_registered(plugin) or self._manager.has_plugin(name):
            raise PluginError(f"plugin {name!r} is registered already")
        splitters, backends = dict(self.splitters), dict(self.backends)
        try:
            self._manager.register(plugin, name)
            callers = self._manager.get_hookcallers(plugin) or []
            unknown = [caller.name for caller in callers if not caller.has_spec()]
            if unknown:
                raise PluginError(f"unknown hook {', '.join(unknown)}; see splitquant_plugins.hookspecs")
            others = [other for other in self._manager.get_plugins() if other is not plugin]
            for kind, table in (("splitters", self.splitters), ("backends", self.backends)):
                call = self._manager.subset_hook_caller(f"splitquant_register_{kind}", others)
                call(register=partial(_register, name, table))
        except Exception:
            self.splitters, self.backends = splitters, backends
            if self._manager.is_registered(plugin):
                self._manager.unregister(plugin)
            raise
        hooks = tuple(caller.name for caller in callers)
        self.infos.append(PluginInfo(name, source, version, hooks))

    @property
    def broken(self) -> list[PluginInfo]:
        """The plugins that could not be loaded."""
        return [info for info in self.infos if info.error]

    def _broken(self) -> str:
        return "".join(f"; plugin {info.name!r} is broken: {info.error}" for info in self.broken)

    def splitter(self, name: str) -> Splitter:
        """Return the splitter of that name, or raise ConfigError with the names there are."""
        from splitquant_plugins.splitters.base import Splitter

        return self._create(self.splitters, "splitter", name, Splitter)

    def backend(self, name: str) -> Backend:
        """Return the backend of that name, or raise ConfigError with the names there are."""
        from splitquant_plugins.backends import Backend

        return self._create(self.backends, "backend", name, Backend)

    def _create(self, table: Mapping[str, Registered], what: str, name: str, kind: type) -> Any:
        if name not in table:
            for info in self.broken:
                if name in (info.name, info.source):
                    raise PluginError(f"{what} {name!r}: its plugin is broken: {info.error}")
            raise ConfigError(f"unknown {what} {name!r}: choose from {', '.join(sorted(table))}{self._broken()}")
        created = table[name].create()
        if not isinstance(created, kind):
            raise PluginError(
                f"plugin {table[name].plugin!r}: its {what} {name!r} is a {type(created).__name__}, "
                f"not a {kind.__name__}"
            )
        return created

    def prepare_model(self, model: nn.Module, config: SplitConfig) -> list[str]:
        """Run the preparation steps in the order of registration; return their notes."""
        with _no_exit("splitquant_prepare_model"):
            answers = self._manager.hook.splitquant_prepare_model(model=model, config=config)
        return [note for answer in reversed(answers) for note in answer]

    def select_layer(self, name: str, module: nn.Module, config: SplitConfig) -> LayerPlan | Skip | None:
        """Ask how to split a layer."""
        from splitquant_plugins.plan import LayerPlan, Skip

        with _no_exit("splitquant_select_layer"):
            answer = self._manager.hook.splitquant_select_layer(name=name, module=module, config=config)
        return _checked("splitquant_select_layer", answer, (LayerPlan, Skip, type(None)))

    def split_tensor(self, tensor: Tensor, plan: TensorPlan, grid: Grid | None) -> list[Tensor]:
        """Ask for the parts of a tensor; raises CannotSplit where it should stay whole."""
        import torch

        where = f"{plan.layer}.{plan.role}: splitter {plan.splitter!r}"
        # A stranger's code is given a copy, so that the model stays what it is whatever becomes of the copy.
        given = tensor if self._is_own(plan.splitter) else tensor.clone()
        try:
            answer = self._manager.hook.splitquant_split_tensor(tensor=given, plan=plan, grid=grid)
        except (CannotSplit, SplitQuantError, MemoryError):
            raise
        except (Exception, SystemExit) as error:
            owner = self.splitters[plan.splitter].plugin if plan.splitter in self.splitters else "unknown"
            message = f"{where} of plugin {owner!r} raised {type(error).__name__}: {first_line(error)}"
            raise PluginError(message) from error
        if given is not tensor and not torch.equal(given, tensor):
            raise PluginError(f"{where} wrote into the tensor that it was given; a splitter returns new tensors")
        parts = list(_checked("splitquant_split_tensor", answer, (list, tuple)))
        for part in parts:
            _checked("splitquant_split_tensor", part, (torch.Tensor,))
        return parts

    def _is_own(self, splitter: str) -> bool:
        """Whether only this package's code will see the tensor."""
        factory = self.splitters[splitter].factory if splitter in self.splitters else None
        others = len(self._manager.hook.splitquant_split_tensor.get_hookimpls()) > 1
        return isinstance(factory, str) and factory.startswith("splitquant_plugins.") and not others

    def build_module(
        self, module: nn.Module, parts: Mapping[str, Sequence[Tensor | None]], plan: LayerPlan
    ) -> SplitModule:
        """Ask for the split module that takes the layer's place."""
        from splitquant_plugins.modules import SplitModule

        answer = self._manager.hook.splitquant_build_module(module=module, parts=parts, plan=plan)
        if answer is None:
            raise PluginError(f"no plugin builds a split module of kind {plan.kind!r}")
        return _checked("splitquant_build_module", answer, (SplitModule,))

    def attach(self, split_pass: ModelPass, recipe: Any) -> Any:
        """Answer `pass + recipe`."""
        answer = self._manager.hook.splitquant_attach(split_pass=split_pass, recipe=recipe)
        if answer is None:
            raise ConfigError(
                f"no plugin knows how to attach to a {type(recipe).__module__}.{type(recipe).__qualname__}; "
                f"backends: {', '.join(sorted(self.backends)) or 'none'}{self._broken()}"
            )
        return answer

    def part_replaced(self, split: SplitModule, part: str, module: nn.Module) -> None:
        """Tell that a backend replaced a part."""
        self._manager.hook.splitquant_part_replaced(split=split, part=part, module=module)

    def after_layer(self, record: LayerRecord) -> None:
        """Tell that a layer is done."""
        with _no_exit("splitquant_after_layer"):
            self._manager.hook.splitquant_after_layer(record=record)

    def after_split(self, model: nn.Module, manifest: Manifest) -> None:
        """Tell that the model is done."""
        with _no_exit("splitquant_after_split"):
            self._manager.hook.splitquant_after_split(model=model, manifest=manifest)


def _register(
    plugin: str, table: dict[str, Registered], name: str, factory: str | Callable[[], Any], summary: str
) -> None:
    if name in table:
        raise PluginError(f"{name!r} is already registered by plugin {table[name].plugin!r}; choose another name")
    table[name] = Registered(name, factory, summary, plugin)


class _SplitterDispatch:
    """The built-in answer to `splitquant_split_tensor`: the splitter that the plan names."""

    def __init__(self, plugins: Plugins) -> None:
        self._plugins = plugins

    @hookspecs.hookimpl(trylast=True)
    def splitquant_split_tensor(self, tensor: Tensor, plan: TensorPlan, grid: Grid | None) -> Sequence[Tensor]:
        return self._plugins.splitter(plan.splitter).split(tensor, plan, grid)


@contextmanager
def _no_exit(hook: str) -> Iterator[None]:
    """Make an error of a plugin's sys.exit, which would end the program without a word."""
    try:
        yield
    except SystemExit as error:
        raise PluginError(f"a plugin called sys.exit({error.code!r}) in {hook}") from error


def _checked(hook: str, answer: Any, kinds: tuple[type, ...]) -> Any:
    if not isinstance(answer, kinds):
        allowed = " or ".join(kind.__name__ for kind in kinds)
        raise PluginError(f"a plugin answered {hook} with a {type(answer).__name__}; it takes {allowed}")
    return answer


def version_of(package: str = "splitquant-plugins") -> str:
    """The version of an installed package, by default of this one, as the manifest records it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return NOT_INSTALLED
