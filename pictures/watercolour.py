"""Hills and a lake in watercolour and ink."""

from __future__ import annotations

import numpy as np

from .canvas import SIZE, grid, ramp, smooth_noise

WASH = np.array([[0.75, 0.85, 0.92], [0.97, 0.95, 0.90], [0.55, 0.70, 0.55], [0.85, 0.60, 0.50]])


def watercolour() -> np.ndarray:
    """The picture, [SIZE, SIZE, 3] in 0..1."""
    generator = np.random.default_rng(4)
    rows, _ = grid()
    return ramp(rows / SIZE + 0.1 * smooth_noise(generator, 5), WASH).clip(0, 1)
