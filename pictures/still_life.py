"""Things on a table beside a window, as a camera sees them."""

from __future__ import annotations

import numpy as np

from .canvas import grid, mix, step

WALL, TABLE, BALL = np.array([0.62, 0.64, 0.62]), np.array([0.45, 0.28, 0.17]), np.array([0.75, 0.25, 0.15])


def still_life() -> np.ndarray:
    """The picture, [SIZE, SIZE, 3] in 0..1."""
    rows, columns = grid()
    picture = mix(WALL, TABLE, step(rows, 318, 322))
    distance = np.hypot(rows - 300, columns - 256) / 90
    light = np.clip(1.1 - np.hypot(rows - 260, columns - 220) / 150, 0.2, 1)
    return mix(picture, BALL * light[..., None], 1 - step(distance, 0.98, 1.0)).clip(0, 1)
