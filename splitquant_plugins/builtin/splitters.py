"""The splitters that ship with the package; each is imported when first used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from splitquant_plugins.hookspecs import hookimpl

if TYPE_CHECKING:
    from splitquant_plugins.plugins import RegisterSplitter

HOME = "splitquant_plugins.splitters"


@hookimpl
def splitquant_register_splitters(register: RegisterSplitter) -> None:
    """Register the built-in splitters."""
    register("kmeans", f"{HOME}.kmeans:KMeansSplitter", "the paper's: clusters of values, one per part")
