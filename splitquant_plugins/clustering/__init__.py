"""One-dimensional k-means: optimal, deterministic, one call for all rows of a tensor.

`kernels` has the compiled loops, and the idea; `optimal` calls them for rows of any length and type; `parts` applies
the boundaries.
"""

from __future__ import annotations

from splitquant_plugins.clustering.optimal import Clusters, optimal_clusters
from splitquant_plugins.clustering.parts import assign, masked_parts

__all__ = ["Clusters", "assign", "masked_parts", "optimal_clusters"]
