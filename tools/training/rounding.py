"""Weights in whole steps: not each the nearest, but all together those whose sums of products are the nearest.

A convolution multiplies neighbouring samples, which are nearly alike in pictures: rounding errors that cancel each
other out over a kernel cost next to nothing, equal ones add up. `moments` says how the inputs go together.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Reals = NDArray[np.floating]
GAIN = 1e-9  # of the squared error: less is no gain but the last bits of the sums


def moments(patches: Reals) -> NDArray[np.float64]:
    """Mean products (n, n) of the inputs of a convolution, from patches (m, n)."""
    return np.asarray(patches.T @ patches / len(patches), np.float64)


def rounded(weights: Reals, together: NDArray[np.float64], limit: int) -> NDArray[np.float64]:
    """Whole numbers (O, n) within +-limit for weights (O, n) in steps, of small mean squared error over the inputs."""
    return np.stack([_row(row.astype(np.float64), together, limit) for row in weights])


def _row(wanted: NDArray[np.float64], together: NDArray[np.float64], limit: int) -> NDArray[np.float64]:
    """From the nearest steps on, take the best single change, or the best two opposite ones, while there is any."""
    steps = np.clip(np.round(wanted), -limit, limit)
    own = np.diag(together)
    while True:
        slope = 2 * together @ (steps - wanted)
        up, down = own + slope, own - slope  # what the squared error gains by one step of each weight
        up[steps >= limit] = down[steps <= -limit] = np.inf
        both = up[:, None] + down - 2 * together
        np.fill_diagonal(both, np.inf)
        change = np.zeros_like(steps)
        if min(up.min(), down.min()) <= both.min():
            change[np.minimum(up, down).argmin()] = 1 if up.min() <= down.min() else -1
            gain = min(up.min(), down.min())
        else:
            first, second = np.unravel_index(both.argmin(), both.shape)
            change[first], change[second] = 1, -1
            gain = both.min()
        if gain >= -GAIN:
            return steps
        steps = steps + change
