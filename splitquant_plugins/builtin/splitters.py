"""The splitters that ship with the package; each is imported when first used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from splitquant_plugins.hookspecs import hookimpl

if TYPE_CHECKING:
    from splitquant_plugins.hookspecs import RegisterSplitter

HOME = "splitquant_plugins.splitters"


@hookimpl
def splitquant_register_splitters(register: RegisterSplitter) -> None:
    """Register the built-in splitters."""
    register("auto", f"{HOME}.auto:AutoSplitter", "the default: `grid` where the recipe's grid is known, else `kmeans`")
    register("kmeans", f"{HOME}.kmeans:KMeansSplitter", "the paper's: clusters of values, one per part")
    register("grid", f"{HOME}.grid:GridSplitter", "codes of all parts chosen jointly for the recipe's grid")
    register("residual", f"{HOME}.residual:ResidualSplitter", "each part carries what rounding the one before lost")
    register("range", f"{HOME}.range:RangeSplitter", "clusters whose boundaries minimise the quantization error")
    register("halve", f"{HOME}.halve:HalveSplitter", "baseline: outliers halved into two parts")
    register("ocs", f"{HOME}.ocs:OcsSplitter", "baseline: outlier channel splitting")
    register("percentile", f"{HOME}.percentile:PercentileSplitter", "baseline: clipped values, and what was cut off")
