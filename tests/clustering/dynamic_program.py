"""What the k-means kernels must find: a plain dynamic program, in extended precision."""

import numpy as np


def least_inertia(values, k, weights=None):
    """Least inertia of at most k clusters of values [n], and of one cluster; weights [n] count values several times.

    Clusters are runs of the sorted values. cost[p, q]: the inertia of the values p to q - 1; best[q]: the least
    inertia of the first q values in as many clusters as there were rounds, the last of which begins at some p.
    """
    order = np.argsort(np.asarray(values, dtype=np.float64), kind="stable")
    x = np.asarray(values, dtype=np.longdouble)[order]
    w = np.ones_like(x) if weights is None else np.asarray(weights, dtype=np.longdouble)[order]
    size = np.abs(x).max() or 1
    x = x / size
    x = x - (w * x).sum() / w.sum()
    weight, moment, square = (np.append(0, np.cumsum(w * x**power)) for power in range(3))
    weight, moment, cost = (sums[None] - sums[:, None] for sums in (weight, moment, square))
    weight[weight <= 0] = np.inf  # and so the mean of no values is 0
    moment *= moment
    moment /= weight
    cost -= moment
    np.maximum(cost, 0, out=cost)
    cost[np.tri(len(cost), k=-1, dtype=bool)] = np.inf
    best = cost[0]
    for _ in range(k - 2):
        best = (best[:, None] + cost).min(0)
    whole = cost[0, -1]
    least = (best + cost[:, -1]).min() if k > 1 else whole  # of all values: the last cluster ends with the last of them
    return float(least * size**2), float(whole * size**2)
