"""A board: rings of growth cut lengthwise, knots that they flow around, fibres, pores."""

from __future__ import annotations

import numpy as np

from .canvas import SIZE, cloudy_noise, grid, mix, smooth_noise, step

KNOTS = ((118, 180, 26.0), (372, 372, 34.0), (300, 60, 14.0), (40, 430, 17.0))
"""Row, column and radius in pixels."""
RING = 17.0
"""Width of a ring, in pixels."""
EARLY, LATE = np.array([0.83, 0.62, 0.38]), np.array([0.50, 0.27, 0.12])
HEART = np.array([0.25, 0.11, 0.05])


def wood() -> np.ndarray:
    """The picture, [SIZE, SIZE, 3] in 0..1."""
    generator = np.random.default_rng(21)
    rows, columns = grid()
    rings = columns + 34 * smooth_noise(generator, (3, 4)) + 6 * smooth_noise(generator, (6, 14))
    heart = np.zeros((SIZE, SIZE))
    for row, column, radius in KNOTS:
        y, x = (rows - row) / 1.7, columns - column
        distance = np.hypot(x, y) + 2.0 * smooth_noise(generator, 24)
        near = np.exp(-((distance / (2.2 * radius)) ** 2))
        rings = rings * (1 - near) + (column + 1.6 * distance) * near
        heart = np.maximum(heart, 1 - step(distance, 0.55 * radius, 0.9 * radius))
    phase = rings / RING + 0.15 * smooth_noise(generator, (4, 60))
    ring = phase - np.floor(phase)
    late = step(ring, 0.25, 0.92) * (1 - step(ring, 0.94, 1.0))
    fibres = smooth_noise(generator, (14, 300)) + 0.7 * smooth_noise(generator, (30, 500))
    colour = mix(EARLY, LATE, np.clip(0.85 * late + 0.10 * fibres, 0, 1))
    colour = mix(colour, HEART, 0.85 * heart)
    pores = step(smooth_noise(generator, (60, 420)), 0.55, 0.8) * (0.3 + 0.5 * late)
    tone = 1 + 0.07 * fibres + 0.10 * cloudy_noise(generator, 3, 3) - 0.28 * pores
    return (colour * tone[..., None]).clip(0, 1)
