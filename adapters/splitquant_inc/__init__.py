"""SplitQuant for Intel Neural Compressor 3.x: RTN, GPTQ, HQQ, AWQ and AutoRound weights, and W8A8 exported graphs."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from splitquant_inc.grid import IncRtnGrid
    from splitquant_inc.storage import load, save

_HOME = {"IncRtnGrid": "grid", "load": "storage", "save": "storage"}

__all__ = ["IncRtnGrid", "load", "save"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
