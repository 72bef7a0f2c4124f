"""The names that INC knows the parts of a split layer by, and the options that each of them gets.

INC matches the patterns of `set_local` against module names with `re.match`. A part answers to the patterns of
the layer that it came from, and to those that spell out its own name, such as `upper`: `.*up` is not meant for
the upper part of every layer. As with INC the last one that matches wins.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from splitquant_plugins.manifest import ATTRIBUTE, Manifest

Info = tuple[str, str]


class PartName(str):
    """A module's name, with the name and type of the float layer that it was."""

    __slots__ = ("kind", "layer")

    kind: str
    layer: str

    def __new__(cls, name: str, layer: str = "", kind: str = "") -> PartName:
        """Name a part; a module that is no part is its own layer."""
        new = super().__new__(cls, name)
        new.layer, new.kind = layer, kind
        return new


def part_infos(infos: Iterable[Info], model: nn.Module) -> list[Info]:
    """Return INC's (name, type) pairs with the names made `PartName`s, from the model's manifest."""
    manifest = getattr(model, ATTRIBUTE, None)
    owners: dict[str, tuple[str, str]] = {}
    for record in manifest.split if isinstance(manifest, Manifest) else ():
        kind = "Conv1D" if record.kind == "conv1d_hf" else "Linear"
        for name in (record.name, *record.also_known_as):
            owners.update({f"{name}.{part}": (record.name, kind) for part in record.parts})
    return [(PartName(name, *owners.get(name, (name, kind))), kind) for name, kind in infos]


def layer_infos(infos: Iterable[Info]) -> list[Info]:
    """Return the (name, type) pairs of the float layers."""
    return [(name.layer, name.kind) if isinstance(name, PartName) else (name, kind) for name, kind in infos]


def match_parts(infos: Iterable[Info], of_layers: Mapping[Info, Any], by_pattern: Mapping[str, Any]) -> dict[Info, Any]:
    """Return each module's configuration: its layer's, or that of the last pattern that matches either name."""
    chosen: dict[Info, Any] = {}
    for name, kind in infos:
        layer, layer_kind = (name.layer, name.kind) if isinstance(name, PartName) else (name, kind)
        config = of_layers.get((layer, layer_kind))
        for pattern, local in by_pattern.items():
            if re.match(pattern, layer) or _names_part(pattern, name):
                config = local
        if config is not None:
            chosen[(name, kind)] = config
    return chosen


def _names_part(pattern: str, name: str) -> bool:
    return name.rpartition(".")[2] in pattern and re.match(pattern, name) is not None
