"""One-dimensional k-means: optimal, deterministic, one call for all rows of a tensor.

In one dimension clusters are intervals, so k-means is a search for k - 1 boundaries among the sorted values.
`bracket` closes in on where those of every optimum must be, `search` finds the best by branch and bound, both
on prefix sums (`prefix`); `tally` spares long rows the sorting; `parts` applies the boundaries.
"""

from __future__ import annotations

from splitquant_plugins.clustering.optimal import Clusters, optimal_clusters
from splitquant_plugins.clustering.parts import assign, masked_parts

__all__ = ["Clusters", "assign", "masked_parts", "optimal_clusters"]
