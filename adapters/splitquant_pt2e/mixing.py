"""A quantizer of the same class as another, with a method or two of our own in front."""

from __future__ import annotations

import copy
from typing import Any


def with_mixin(quantizer: Any, mixin: type, prefix: str) -> Any:
    """Return a quantizer with the settings of `quantizer`, whose class is a subclass of its class and `mixin`.

    Containers of settings are copied, so that changing the one leaves the other as it is.
    """
    kind = type(quantizer)
    mixed: Any = type(f"{prefix}{kind.__name__}", (mixin, kind), {"__module__": kind.__module__})
    made = mixed.__new__(mixed)
    for name, value in vars(quantizer).items():
        setattr(made, name, copy.copy(value) if isinstance(value, (dict, list, set)) else value)
    return made
