"""One-dimensional k-means: optimal, deterministic, one call for all rows of a tensor.

`kernels` has the compiled loops, and the idea; `exact_kmeans` calls them for rows of any length and type;
`cut_at_boundaries` turns boundaries into labels and parts.
"""

from __future__ import annotations

from splitquant_plugins.clustering.cut_at_boundaries import assign, masked_parts
from splitquant_plugins.clustering.exact_kmeans import Clusters, optimal_clusters

__all__ = ["Clusters", "assign", "masked_parts", "optimal_clusters"]
