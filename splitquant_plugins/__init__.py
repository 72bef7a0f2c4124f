"""SplitQuant as a pass in front of the quantization recipe you already have.

    from splitquant_plugins import SplitQuantPass

    model = SplitQuantPass()(model)             # before any quantizer
    recipe = SplitQuantPass() + your_recipe     # or attached to a recipe

The names below are loaded when first used, so that importing the package, as every plugin does for
`hookimpl`, costs no import of torch. After the import, transformers' `from_pretrained` loads what `save_pretrained`
wrote of a split model.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from splitquant_plugins.hookspecs import hookimpl
from splitquant_plugins.pretrained.on_import import register_with_transformers

if TYPE_CHECKING:
    from splitquant_plugins.config import SplitConfig
    from splitquant_plugins.decoupleq.decoupleq_pass import DecoupleQPass
    from splitquant_plugins.errors import SplitQuantError
    from splitquant_plugins.grid import Grid, UniformGrid
    from splitquant_plugins.manifest import Manifest, manifest_of
    from splitquant_plugins.passes.clip import ClipPass
    from splitquant_plugins.passes.merge_parts import fuse, unfuse
    from splitquant_plugins.passes.rebuild import apply_manifest
    from splitquant_plugins.passes.self_calibration import self_calibration
    from splitquant_plugins.passes.splitquant import SplitQuantPass
    from splitquant_plugins.plan import LayerPlan, Skip, SplitterOptions, TensorPlan
    from splitquant_plugins.splitters.base import Splitter

_HOME = {
    "ClipPass": "passes.clip",
    "DecoupleQPass": "decoupleq.decoupleq_pass",
    "Grid": "grid",
    "LayerPlan": "plan",
    "Manifest": "manifest",
    "Skip": "plan",
    "SplitConfig": "config",
    "SplitQuantError": "errors",
    "SplitQuantPass": "passes.splitquant",
    "Splitter": "splitters.base",
    "SplitterOptions": "plan",
    "TensorPlan": "plan",
    "UniformGrid": "grid",
    "apply_manifest": "passes.rebuild",
    "fuse": "passes.merge_parts",
    "manifest_of": "manifest",
    "self_calibration": "passes.self_calibration",
    "unfuse": "passes.merge_parts",
}

__all__ = [
    "ClipPass",
    "DecoupleQPass",
    "Grid",
    "LayerPlan",
    "Manifest",
    "Skip",
    "SplitConfig",
    "SplitQuantError",
    "SplitQuantPass",
    "Splitter",
    "SplitterOptions",
    "TensorPlan",
    "UniformGrid",
    "apply_manifest",
    "fuse",
    "hookimpl",
    "manifest_of",
    "self_calibration",
    "unfuse",
]

register_with_transformers()


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
