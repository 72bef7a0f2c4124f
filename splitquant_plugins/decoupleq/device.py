"""Where the work is done: on the model's own device, or on one that it is moved to for that time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from splitquant_plugins.errors import ConfigError, InputError, first_line


def refuse_missing_device(device: str | None) -> None:
    """Raise ConfigError for a device that torch does not know or have."""
    if device is None:
        return
    try:
        known = torch.device(device)
        torch.empty(1, device=known)
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        raise ConfigError(f"device={device!r}: torch has no such device here ({first_line(error)})") from None
    if known.type == "meta":
        raise ConfigError(f"device={device!r} holds no values; choose one that computes")


@contextmanager
def on_device(model: nn.Module, device: str | None) -> Iterator[None]:
    """The model on a device for the time of the block, then where it was; InputError where that is several."""
    if device is None:
        yield
        return
    homes = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    if len(homes) > 1:
        raise InputError(
            f"device={device!r}, but the model lies on {', '.join(sorted(map(str, homes)))}: move it to one first"
        )
    model.to(device)
    try:
        yield
    finally:
        for home in homes:
            model.to(home)
