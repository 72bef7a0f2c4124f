"""SplitQuant for optimum-quanto and for transformers' QuantoConfig (weights only)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from splitquant_quanto.optimizer import ZeroExactOptimizer
    from splitquant_quanto.storage import QuantizedSplitModel, load, save

_HOME = {"QuantizedSplitModel": "storage", "ZeroExactOptimizer": "optimizer", "load": "storage", "save": "storage"}

__all__ = ["QuantizedSplitModel", "ZeroExactOptimizer", "load", "save"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
