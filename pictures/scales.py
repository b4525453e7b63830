"""Overlapping glazed scales: the reference of the demo and of all that was measured on it."""

from __future__ import annotations

import numpy as np

from .canvas import SIZE, grid, smooth_noise

RADIUS = 60.0
"""Of a scale, in pixels."""
WAVES = 5.0
"""How far the grid is bent, in pixels."""
REACH = RADIUS + 2 * WAVES
"""How far from its middle on the unbent grid a scale can reach."""
PALETTE = np.array(
    [
        [0.07, 0.24, 0.33],
        [0.10, 0.42, 0.45],
        [0.42, 0.63, 0.52],
        [0.88, 0.72, 0.36],
        [0.80, 0.38, 0.20],
        [0.52, 0.15, 0.17],
    ]
)
SHARES = (0.24, 0.26, 0.18, 0.14, 0.11, 0.07)
SEAM = np.array([0.05, 0.07, 0.10])


def scales() -> np.ndarray:
    """The picture, [SIZE, SIZE, 3] in 0..1."""
    generator = np.random.default_rng(7)
    rows, columns = grid()
    rows += WAVES * smooth_noise(generator, 6)
    columns += WAVES * smooth_noise(generator, 6)
    glaze = smooth_noise(generator, 40)
    picture = np.broadcast_to(SEAM, (SIZE, SIZE, 3)).copy()
    count = int(SIZE / RADIUS) + 4
    for line in range(2 * count, -3, -1):  # from the bottom up: each row of scales covers the one below
        for column in range(-2, count):
            colour = PALETTE[generator.choice(len(PALETTE), p=SHARES)] * generator.uniform(0.85, 1.15)
            middle = ((column + 0.5 * (line % 2)) * RADIUS * 1.9, line * RADIUS * 0.62)
            near = tuple(slice(max(0, int(m - REACH)), max(0, int(m + REACH))) for m in middle[::-1])
            paint_scale(picture[near], columns[near] - middle[0], rows[near] - middle[1], colour, glaze[near])
    return picture.clip(0, 1)


def paint_scale(picture: np.ndarray, x: np.ndarray, y: np.ndarray, colour: np.ndarray, glaze: np.ndarray) -> None:
    """Paint one scale around the origin of x and y: a dark rim, a ring, a highlight, rays."""
    radius, angle = np.hypot(x, y) / RADIUS, np.arctan2(x, y)
    inside = radius < 1
    light = 0.62 + 0.38 * radius + 0.10 * np.cos(18 * angle) * radius + 0.08 * glaze
    light -= 0.35 * np.exp(-(((radius - 0.72) / 0.05) ** 2))
    light += 0.45 * np.exp(-(((radius - 0.86) / 0.06) ** 2)) * (0.6 - 0.4 * np.sin(angle))
    rim = np.clip((1 - radius) / 0.07, 0, 1)[..., None]
    painted = SEAM + (colour * light[..., None] - SEAM) * rim
    picture[inside] = painted[inside]
