"""The errors users see. Each message names the layer or option, the value, and the fix."""

from __future__ import annotations

from importlib import import_module
from typing import Any


class SplitQuantError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(SplitQuantError, ValueError):
    """An option is unknown or impossible; the message says what is allowed."""


class InputError(SplitQuantError, ValueError):
    """A model, a file or a dataset cannot be used; the message says why and what would work."""


class AlreadySplitError(SplitQuantError):
    """The model was split before; splitting parts again would multiply their number."""


class AlreadyQuantizedError(SplitQuantError):
    """The model's weights are quantized; a split must come before quantization."""


class MissingExtraError(SplitQuantError, ImportError):
    """A backend's package is not installed; the message names the extra to install."""


class PluginError(SplitQuantError):
    """A plugin that a recipe asks for is broken or does not exist."""


class SkeletonMismatchError(SplitQuantError):
    """A saved split model does not fit the model it is loaded into."""


class SplitFailedError(SplitQuantError):
    """A layer could not be split because its weight or a splitter's answer is invalid."""


def optional(package: str, what: str, extra: str) -> Any:
    """Import a package that only `what` needs, or raise MissingExtraError with the extra that installs it."""
    try:
        return import_module(package)
    except ImportError:
        raise MissingExtraError(
            f'{what} {package}, which is not installed: pip install "splitquant-plugins[{extra}]"'
        ) from None


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, the next too where it ends in a colon; or its type's name."""
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


class SplitQuantWarning(UserWarning):
    """Something was left out that a user may not expect; the message says what and why."""


class ReadOnlyError(SplitQuantError, RuntimeError):
    """A write into the computed weight of a split layer, which would be lost; the message says where to write."""


class CannotSplit(Exception):  # noqa: N818 - control flow, not a failure
    """Raised by a splitter for a tensor that it leaves whole; `reason` goes into the manifest."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
