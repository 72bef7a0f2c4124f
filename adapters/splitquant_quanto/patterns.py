"""quanto's include and exclude on a model that was split before: patterns that name a layer have to reach its parts.

quanto matches the names of modules one by one, so that `exclude="head"` leaves a split layer `head` alone, and
quantizes `head.lower` and its other parts. It tells nobody of its patterns; they are read off its call: when it comes
to a split layer, which has a place in quanto's table of layers for that alone, and when it replaces a part.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from fnmatch import fnmatch
from types import FrameType
from typing import Any

from optimum.quanto import quantize
from optimum.quanto.nn import register_qmodule
from torch import nn

from splitquant_plugins.errors import ConfigError
from splitquant_plugins.modules import SplitModule

NEAR = 16  # quanto's call is a few frames above the assignment of a part


@register_qmodule(SplitModule)
class _NotQuantized(nn.Module):
    """What quanto makes of a split layer itself: nothing. Its parts are quantized."""

    @classmethod
    def from_module(cls, module: nn.Module, **options: Any) -> None:
        refuse_patterns_that_miss_parts()


def refuse_patterns_that_miss_parts() -> None:
    """Raise ConfigError, within a call of quanto's quantize, where a pattern names a split layer and not its parts."""
    call = _call_of_quantize()
    if call is None:
        return
    for option in ("include", "exclude"):
        given: Any = call.f_locals.get(option)
        patterns = [given] if isinstance(given, str) else list(given or ())
        for name, module in call.f_locals["model"].named_modules():
            if name and isinstance(module, SplitModule):
                _refuse(option, patterns, name, module.part_names)


def _call_of_quantize() -> FrameType | None:
    frame: FrameType | None = sys._getframe()
    for _ in range(NEAR):
        if frame is None or frame.f_code is quantize.__code__:
            return frame
        frame = frame.f_back
    return None


def _refuse(option: str, patterns: Sequence[str], layer: str, parts: Sequence[str]) -> None:
    named = [pattern for pattern in patterns if fnmatch(layer, pattern)]
    missed = [part for part in parts if not any(fnmatch(f"{layer}.{part}", pattern) for pattern in patterns)]
    if named and missed:
        raise ConfigError(
            f"{option}={named[0]!r} names the layer {layer}, which is split, but not its part {layer}.{missed[0]}, "
            f"which quanto would {'quantize' if option == 'exclude' else 'leave float'}: write {layer + '.*'!r}"
        )
