"""Telling transformers that there are split checkpoints, whenever it is imported: before this package or after it.

transformers finds quantizers in two dictionaries of `transformers.quantizers.auto`, which others add to in Python; it
reads no entry points, and a config.json names no package. So `import splitquant_plugins` has to bring the entries
about, and must import neither transformers nor torch for that, as every plugin imports this package. Where transformers
is imported already, they are made at once. Where it is not, a finder waits in `sys.meta_path` for that one module, lets
it load as ever, adds the entries, and is gone: what setuptools does for distutils, and wrapt offers as post-import
hooks. Entries that are made by the first use of the package would come too late: `from_pretrained` is the first use.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec, PathFinder
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType

REGISTRY = "transformers.quantizers.auto"


def register_with_transformers() -> None:
    """Add the entries to transformers' registry now, or as soon as transformers makes it."""
    module = sys.modules.get(REGISTRY)
    if module is not None:
        _add_entries(module)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _add_entries(registry: Any) -> None:
    from splitquant_plugins.checkpoints.pretrained_config import METHOD
    from splitquant_plugins.pretrained.checkpoint_config import SplitCheckpointConfig
    from splitquant_plugins.pretrained.quantizer import SplitCheckpointQuantizer

    # Once more after a reload of either: the registry refuses a name that is there.
    registry.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = SplitCheckpointConfig
    registry.AUTO_QUANTIZER_MAPPING[METHOD] = SplitCheckpointQuantizer


class _Finder:
    """Finds the registry's module where it would be found anyway."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != REGISTRY:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(self, spec.loader)  # type: ignore[assignment]
        return spec


class _Loader:
    """Loads the module as its own loader does, and adds the entries."""

    def __init__(self, finder: _Finder, loader: Any) -> None:
        self._finder, self._loader = finder, loader

    def create_module(self, spec: ModuleSpec) -> Any:
        return self._loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        module.__loader__ = module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        if self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)
        _add_entries(module)
