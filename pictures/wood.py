"""A board: rings of growth cut lengthwise, knots that they flow around, fibres, pores."""

from __future__ import annotations

import numpy as np

from .canvas import SIZE, cloudy_noise, grid, mix, smooth_noise, step

KNOTS = ((150.0, 148.0, 21.0), (392.0, 366.0, 26.0), (60.0, 418.0, 12.0), (470.0, 52.0, 9.0))
"""Row, column and radius in pixels."""
LONG = 1.45
"""How much longer a knot is than wide."""
RING = 15.0
"""Width of a ring, in pixels."""
HEART_COLUMN, HEART_DEPTH, SLOPE = 262.0, 14.0, 0.20
"""The heart of the tree: its column, how far behind the board it is at the top, and how fast that grows downwards."""
EARLY, LATE = np.array([0.87, 0.66, 0.41]), np.array([0.55, 0.30, 0.13])
KNOT, BARK = np.array([0.47, 0.24, 0.11]), np.array([0.19, 0.08, 0.04])


def wood() -> np.ndarray:
    """The picture, [SIZE, SIZE, 3] in 0..1."""
    generator = np.random.default_rng(21)
    rows, columns = grid()
    columns = columns + 22 * smooth_noise(generator, (3, 4)) + 3 * smooth_noise(generator, (9, 24))
    rows = rows + 40 * smooth_noise(generator, (4, 5))
    across, inside, knot_rings = columns.copy(), np.zeros((SIZE, SIZE)), np.zeros((SIZE, SIZE))
    for row, column, radius in KNOTS:
        x, y = columns - column, (rows - row) / LONG
        distance = np.hypot(x, y) / radius
        # the stream lines of a flow around a cylinder: far away as they were, and none goes through it
        across -= x / np.maximum(distance, 1) ** 2
        inside = np.maximum(inside, 1 - step(distance, 0.93, 1.03))
        knot_rings = np.where(distance < 1.1, distance * radius, knot_rings)
    rings = np.hypot(across - HEART_COLUMN, HEART_DEPTH + SLOPE * rows) + 0.9 * smooth_noise(generator, (5, 60))
    late = latewood(rings / RING + 0.5 * np.sin(rings / 41))
    fibres = smooth_noise(generator, (14, 300)) + 0.7 * smooth_noise(generator, (30, 500))
    colour = mix(EARLY, LATE, np.clip(0.80 * late + 0.10 * fibres, 0, 1))
    heartwood = mix(KNOT, BARK, np.clip(0.55 * latewood(knot_rings / 4.5) + 0.9 * inside * (1 - inside) * 4, 0, 1))
    colour = mix(colour, heartwood, inside)
    pores = step(smooth_noise(generator, (60, 420)), 0.55, 0.8) * (0.3 + 0.5 * late)
    tone = 1 + 0.06 * fibres + 0.08 * cloudy_noise(generator, 3, 3) - 0.25 * pores
    return (colour * tone[..., None]).clip(0, 1)


def latewood(rings: np.ndarray) -> np.ndarray:
    """How dark the wood is, 0..1, at so many rings from the heart: it darkens slowly, and begins anew at once."""
    part = rings - np.floor(rings)
    return step(part, 0.25, 0.92) * (1 - step(part, 0.94, 1.0))
