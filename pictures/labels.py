"""Label maps for AD Regions, which are masks as well: white is one region, black the other."""

from __future__ import annotations

import numpy as np

from .canvas import SIZE, grid

RADIUS = 0.33 * SIZE
"""Of the disc, in pixels."""


def halves() -> np.ndarray:
    """The left half white, the right half black: the parts of `two`. [SIZE, SIZE, 3]."""
    return black_and_white(grid()[1] < SIZE / 2)


def disc() -> np.ndarray:
    """A white disc in the middle on black. [SIZE, SIZE, 3].

    As the target of `halves` the disc takes after the left half, and what is around it after the right half.
    """
    middle = (SIZE - 1) / 2
    return black_and_white(np.hypot(*(axis - middle for axis in grid())) < RADIUS)


def black_and_white(white: np.ndarray) -> np.ndarray:
    """A picture of a map of bool."""
    return np.repeat(white[..., None], 3, axis=-1).astype(np.float64)
