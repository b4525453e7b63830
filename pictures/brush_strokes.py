"""A full moon over a field of wheat in thick strokes of a brush.

The scene says what colour is where and which way the brush goes; layers of strokes follow it, broad ones first. A
stroke is a path along the flow, as wide as the brush; each bristle leaves a streak of its own colour and height, and
begins and ends at its own place. At last the paint's relief is lit.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .canvas import SIZE, blur, cloudy_noise, halved, lit, mix, ramp, smooth_noise, step

FINE = 2 * SIZE
"""It is painted at twice the size."""
SKETCH = SIZE
"""The scene is known at this size."""
STEP = 0.9
"""From point to point of a stroke, in pixels."""
MOON, MOON_RADIUS = (0.26, 0.68), 0.085
"""Row and column, in pictures, and its radius."""
HORIZON = 0.66
NIGHT = np.array([[0.04, 0.06, 0.20], [0.07, 0.14, 0.38], [0.11, 0.28, 0.55], [0.22, 0.48, 0.66], [0.55, 0.73, 0.70]])
GLOW = np.array([[1.0, 0.97, 0.80], [0.98, 0.86, 0.48], [0.88, 0.60, 0.25]])
HILLS = np.array([[0.07, 0.12, 0.24], [0.13, 0.26, 0.36], [0.20, 0.38, 0.38]])
WHEAT = np.array([[0.36, 0.20, 0.10], [0.66, 0.40, 0.12], [0.86, 0.62, 0.18], [0.97, 0.84, 0.42]])
LEAVES, POPPIES = np.array([0.24, 0.36, 0.16]), np.array([0.78, 0.16, 0.09])


class Brush(NamedTuple):
    """A layer of strokes: width and length in pixels, how many, and how far colours stray."""

    width: float
    length: float
    count: int
    stray: float


LAYERS = (Brush(44, 200, 420, 0.05), Brush(27, 150, 560, 0.07), Brush(17, 110, 800, 0.09), Brush(10, 70, 700, 0.12))


def brush_strokes() -> np.ndarray:
    """The picture, [SIZE, SIZE, 3] in 0..1."""
    generator = np.random.default_rng(2)
    colours, flow = scene(generator)
    paint = 0.85 * colours.repeat(FINE // SKETCH, 0).repeat(FINE // SKETCH, 1).reshape(-1, 3)
    height = np.zeros(FINE * FINE)
    for brush in LAYERS:
        lay(generator, brush, colours, flow, paint, height)
    shade, shine = lit(blur(height.reshape(FINE, FINE), 0.8), ambient=0.45, gloss=0.10, sharp=16)
    return halved(paint.reshape(FINE, FINE, 3) * shade[..., None] + shine[..., None]).clip(0, 1)


def scene(generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Colours [SKETCH, SKETCH, 3], and which way the brush goes: unit vectors down and to the right, [... 2]."""
    down, right = np.mgrid[0:SKETCH, 0:SKETCH] / SKETCH
    moon = np.hypot(down - MOON[0], right - MOON[1])
    stream = down + 0.05 * cloudy_noise(generator, 4, 2, SKETCH)
    for row, column, size, strength in ((*MOON, 0.20, 0.30), (0.36, 0.24, 0.13, -0.16), (0.08, 0.26, 0.10, 0.10),
                                        (0.50, 0.86, 0.10, 0.09)):  # fmt: skip
        stream = stream + strength * np.exp(-((down - row) ** 2 + (right - column) ** 2) / size**2)
    bands = 0.5 + 0.5 * np.sin(38 * stream + 1.5 * smooth_noise(generator, 6, SKETCH))
    colours = ramp(0.12 + 0.42 * down + 0.38 * bands, NIGHT)
    halo = np.exp(-(((moon - MOON_RADIUS) / 0.09) ** 2)) * (0.45 + 0.5 * np.cos(moon * 95) ** 2)
    colours = mix(colours, GLOW[2] * 0.6 + GLOW[1] * 0.4, 0.85 * halo * (moon > MOON_RADIUS))
    colours = mix(colours, ramp(moon / MOON_RADIUS, GLOW), 1 - step(moon, MOON_RADIUS, MOON_RADIUS + 0.006))
    slope = np.stack(np.gradient(blur(stream, 1.5)), axis=-1)
    flow = np.stack([-slope[..., 1], slope[..., 0]], axis=-1)

    ridge = HORIZON - 0.05 - 0.035 * np.sin(7 * right + 1) - 0.02 * np.sin(17 * right)
    hill = step(down, ridge, ridge + 0.01)
    colours = mix(colours, ramp(6 * (down - ridge) + 0.15 * cloudy_noise(generator, 12, 2, SKETCH), HILLS), hill)
    field = step(down, HORIZON + 0.02 * np.sin(5 * right), HORIZON + 0.02 * np.sin(5 * right) + 0.01)
    depth = np.clip((down - HORIZON) / (1 - HORIZON), 0, 1)
    rows = 0.5 + 0.5 * np.sin(30 * (right - 0.4) / (0.25 + depth) + 2 * smooth_noise(generator, 8, SKETCH))
    wheat = ramp(0.25 + 0.45 * rows + 0.25 * cloudy_noise(generator, 20, 2, SKETCH), WHEAT)
    wheat = mix(wheat, LEAVES, 0.7 * step(smooth_noise(generator, 14, SKETCH), 0.35, 0.7))
    wheat = mix(wheat, POPPIES, step(smooth_noise(generator, 44, SKETCH), 0.55, 0.75) * (depth > 0.12))
    colours = mix(colours, wheat, field)
    along = np.stack([-0.4 * np.cos(7 * right + 1), np.ones_like(right)], axis=-1)
    upright = np.stack([-np.ones_like(right), 0.9 * (right - 0.4) + 0.5 * smooth_noise(generator, 5, SKETCH)], axis=-1)
    flow = mix(mix(flow / np.linalg.norm(flow, axis=-1, keepdims=True), along, hill), upright, field)
    return colours, flow / np.linalg.norm(flow, axis=-1, keepdims=True)


def lay(
    generator: np.random.Generator,
    brush: Brush,
    colours: np.ndarray,
    flow: np.ndarray,
    paint: np.ndarray,
    height: np.ndarray,
) -> None:
    """Lay one layer of strokes on the paint, [pixels 3], and its relief, [pixels]: later ones cover earlier ones."""
    place = generator.uniform(-0.1 * FINE, 1.1 * FINE, (brush.count, 2))
    late = brush.count // 16  # the last ones go to the moon
    place[-late:] = np.multiply(MOON, FINE) + generator.normal(0, 0.5 * MOON_RADIUS * FINE, (late, 2))
    tone = colours[sketched(place)] * (1 + generator.normal(0, brush.stray, (brush.count, 1)))
    tone += generator.normal(0, 0.4 * brush.stray, (brush.count, 3))
    bristles = int(brush.width / STEP)
    points = int(brush.length / STEP)
    path = np.empty((brush.count, points, 2), np.float32)
    ways = np.empty_like(path)
    for point in range(points):
        ways[:, point] = flow[sketched(place)]
        place = place + STEP * ways[:, point]
        path[:, point] = place
    streaks = generator.uniform(-1, 1, (brush.count, bristles))
    streaks[:, 1:-1] += 0.5 * (streaks[:, :-2] + streaks[:, 2:])
    ragged = generator.uniform(0, 0.16, (2, brush.count, 1, bristles)).astype(np.float32)
    side = np.linspace(-1, 1, bristles, dtype=np.float32)
    part = np.linspace(0, 1, points, dtype=np.float32)
    ends = 0.10 * side**2
    touches = (part[:, None] > ragged[0] + ends) & (part[:, None] < 1 - ragged[1] - ends)
    reach = (0.5 * brush.width * side).astype(np.float32)
    row = (path[..., 0, None] + ways[..., 1, None] * reach).astype(np.int32)
    column = (path[..., 1, None] - ways[..., 0, None] * reach).astype(np.int32)
    touches &= (row >= 0) & (row < FINE) & (column >= 0) & (column < FINE)
    last = np.full(FINE * FINE, -1, np.int32)
    last[(row * FINE + column)[touches]] = np.flatnonzero(touches)
    pixels = np.flatnonzero(last >= 0)
    stroke, point, bristle = np.unravel_index(last[pixels], touches.shape)
    streak = streaks[stroke, bristle] * (0.75 + 0.25 * np.cos(9 * part[point] + 5 * streaks[stroke, bristle]))
    paint[pixels] = tone[stroke] * (1 + 0.11 * streak[:, None])
    pushed = 0.6 + 0.5 * np.abs(side[bristle]) ** 3 + 0.8 * part[point] ** 8
    height[pixels] = 0.4 * height[pixels] + 0.055 * brush.width * pushed + 0.9 * streak


def sketched(place: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where in the sketch the places of the picture are, [n 2]."""
    found = np.clip(place * (SKETCH / FINE), 0, SKETCH - 1).astype(int)
    return found[:, 0], found[:, 1]
