"""A night over a field in thick strokes of a brush."""

from __future__ import annotations

import numpy as np

from .canvas import SIZE, grid, ramp, smooth_noise

SKY = np.array([[0.05, 0.08, 0.25], [0.10, 0.25, 0.55], [0.35, 0.60, 0.70], [0.95, 0.85, 0.50]])


def brush_strokes() -> np.ndarray:
    """The picture, [SIZE, SIZE, 3] in 0..1."""
    generator = np.random.default_rng(2)
    rows, _ = grid()
    return ramp(rows / SIZE + 0.2 * smooth_noise(generator, 9), SKY).clip(0, 1)
