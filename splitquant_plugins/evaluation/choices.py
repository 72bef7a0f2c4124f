"""What became of each layer that was to be split: which splitter made its parts, or why it stayed whole."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from splitquant_plugins.manifest import LayerRecord, Manifest

WHOLE = "whole"


def choices(manifest: Manifest | None) -> list[dict[str, Any]]:
    """List the layers that a splitter was asked for, in the manifest's order; empty where nothing was to be split.

    `chosen` is the splitter that made the parts, or `whole`; `why` says what chose it, where the user did not.
    """
    if manifest is None:
        return []
    return [
        {"layer": record.name, "chosen": _chosen(record), "k": record.k, "why": record.reason or record.why}
        for record in manifest.layers
        if record.splitter
    ]


def summary(found: Iterable[Mapping[str, Any]]) -> str:
    """Count what `choices` found, most frequent first and whole layers last: `grid 12, whole 2`."""
    counted = Counter(each["chosen"] for each in found)
    whole = counted.pop(WHOLE, 0)
    order = [*sorted(counted.items(), key=lambda item: (-item[1], item[0])), *([(WHOLE, whole)] if whole else [])]
    return ", ".join(f"{name} {number}" for name, number in order)


def _chosen(record: LayerRecord) -> str:
    return record.splitter if record.action == "split" else WHOLE
