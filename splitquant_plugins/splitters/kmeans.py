"""`kmeans`: the split of the SplitQuant paper (arXiv 2501.12428, section 3): one part per cluster of values.

The parts have disjoint support, so they sum to the tensor bit for bit, and each has a narrower range.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field

from splitquant_plugins.clustering import masked_parts, optimal_clusters
from splitquant_plugins.errors import CannotSplit
from splitquant_plugins.splitters.base import Splitter, SplitterOptions

if TYPE_CHECKING:
    from torch import Tensor

    from splitquant_plugins.grid import Grid
    from splitquant_plugins.plan import TensorPlan


# Values looked at together in the search for one that is not 0.
_PIECE = 1 << 20


class KMeansOptions(SplitterOptions):
    """`exact`: the optimum, without a seed; `sklearn`: what the paper runs, for comparison.

    `n_init` is the number of starts of scikit-learn's greedy k-means++.
    """

    method: Literal["exact", "sklearn"] = "exact"
    n_init: int = Field(default=1, ge=1)


class KMeansSplitter(Splitter):
    """Parts are the clusters of the values, in ascending order; every value is in one part, 0 elsewhere."""

    Options: ClassVar[type[SplitterOptions]] = KMeansOptions
    splits_bias: ClassVar[bool] = True
    always_splits: ClassVar[bool] = True

    def split(self, tensor: Tensor, plan: TensorPlan, grid: Grid | None) -> list[Tensor]:
        """Cluster all values together, or those of each index of dimension 0; see `Splitter.split`.

        Fewer than `plan.k` distinct values give fewer parts; with `channel`, a channel with fewer leaves its
        places in the last parts 0. Raises CannotSplit where one part would hold everything.
        """
        options = plan.options
        if not isinstance(options, KMeansOptions):
            options = KMeansOptions.model_validate(options.model_dump())
        values = tensor.detach()
        if values.numel() == 0:
            raise CannotSplit("it has no values")
        by_channel = plan.granularity == "channel" and values.ndim > 1
        rows = values.reshape(values.shape[0] if by_channel else 1, -1)
        if options.method == "exact":
            boundaries = optimal_clusters(rows, plan.k).boundaries
        else:
            boundaries = _sklearn_boundaries(rows, plan.k, plan.seed, options.n_init)
        if not bool(torch.isfinite(boundaries).any()):
            raise CannotSplit(_why_whole(rows, plan.k, by_channel))
        # A part that is 0 everywhere adds nothing; the others still sum to the tensor.
        parts = [part for part in masked_parts(rows, boundaries) if _has_value(part)]
        if len(parts) < 2:
            raise CannotSplit("all its values but zeros are in one cluster")
        return [part.reshape(tensor.shape) for part in parts]


def _has_value(part: Tensor) -> bool:
    """Whether a part is not 0 everywhere; most show it in their first values."""
    return any(bool(piece.any()) for piece in torch.split(part.reshape(-1), _PIECE))


def _why_whole(rows: Tensor, k: int, by_channel: bool) -> str:
    if k == 1:
        return "k=1: one part is the tensor itself"
    where = " in each channel" if by_channel else ""
    low, high = torch.aminmax(rows)
    value = f" ({low.item():g})" if bool(low == high) else ""
    return f"all its values are equal{where}{value}: there is one cluster only"


def _sklearn_boundaries(rows: Tensor, k: int, seed: int, n_init: int) -> Tensor:
    """Boundaries [rows, k - 1] of scikit-learn's clusters: the lowest member of each but the first."""
    from sklearn.cluster import KMeans

    boundaries = torch.full((rows.shape[0], k - 1), torch.inf, dtype=torch.float64)
    for number, row in enumerate(rows.cpu()):
        # scikit-learn knows two float types; either holds the 16-bit ones exactly.
        values = row if row.dtype in (torch.float32, torch.float64) else row.float()
        # More clusters than distinct values would make it warn, and leave clusters empty.
        clusters = min(k, len(torch.unique(values)))
        if clusters < 2:
            continue
        model = KMeans(n_clusters=clusters, init="k-means++", n_init=n_init, random_state=seed)
        labels = torch.from_numpy(model.fit_predict(values.numpy()[:, None])).long()
        lowest = torch.full((clusters,), torch.inf, dtype=values.dtype)
        lowest.scatter_reduce_(0, labels, values, reduce="amin")
        boundaries[number, : clusters - 1] = lowest.sort().values[1:]
    return boundaries.to(rows.dtype).to(rows.device)
