"""Rounded stones of several sizes and colours, lying on each other."""

from __future__ import annotations

import numpy as np

from .canvas import SIZE, cloudy_noise, lit, smooth_noise

BEDS = ((420, 7.0, 13.0), (230, 13.0, 22.0), (95, 21.0, 34.0), (26, 34.0, 50.0))
"""How many stones, and their least and largest radius in pixels; from the bottom up."""
PALETTE = np.array(
    [
        [0.42, 0.43, 0.44],
        [0.30, 0.34, 0.38],
        [0.62, 0.60, 0.56],
        [0.72, 0.62, 0.48],
        [0.55, 0.36, 0.27],
        [0.83, 0.80, 0.74],
        [0.22, 0.23, 0.25],
        [0.40, 0.44, 0.38],
    ]
)


def pebbles() -> np.ndarray:
    """The picture, [SIZE, SIZE, 3] in 0..1."""
    generator = np.random.default_rng(12)
    speckle = smooth_noise(generator, SIZE // 2) + cloudy_noise(generator, 24, 3)
    picture = np.array([0.20, 0.17, 0.14]) * (1 + 0.3 * speckle[..., None])
    for count, least, largest in BEDS:
        for row, column in spread(generator, count):
            radius = generator.uniform(least, largest)
            paint_stone(picture, generator, speckle, row, column, radius)
    return picture.clip(0, 1)


def spread(generator: np.random.Generator, count: int) -> np.ndarray:
    """Places all over the picture that keep away from each other, [count 2]: of many candidates the farthest one."""
    places = generator.uniform(-5, SIZE + 5, (1, 2))
    while len(places) < count:
        candidates = generator.uniform(-5, SIZE + 5, (12, 2))
        nearest = np.linalg.norm(candidates[:, None] - places, axis=-1).min(axis=1)
        places = np.concatenate([places, candidates[[nearest.argmax()]]])
    return generator.permutation(places)


def paint_stone(
    picture: np.ndarray, generator: np.random.Generator, speckle: np.ndarray, row: float, column: float, radius: float
) -> None:
    """Paint one stone, and before it the shadow on what lies below."""
    shape = Outline(generator, radius)
    reach = int(1.5 * radius) + 2
    window = tuple(slice(max(0, int(m) - reach), min(SIZE, int(m) + reach)) for m in (row, column))
    below = picture[window]
    y, x = np.mgrid[window]
    y, x = y - row, x - column
    shadow = np.clip((1.35 - shape.distance(x - 0.16 * radius, y - 0.20 * radius)) / 0.5, 0, 1)
    below *= 1 - 0.70 * shadow[..., None]
    distance = shape.distance(x, y)
    height = 0.62 * radius * np.sqrt(np.clip(1 - distance**2.6, 0, 1))
    shade, shine = lit(height, ambient=0.30, gloss=0.16)
    down, right = (generator.integers(SIZE - length) for length in distance.shape)
    tone = 1 + 0.10 * speckle[down : down + distance.shape[0], right : right + distance.shape[1]]
    colour = PALETTE[generator.integers(len(PALETTE))] * generator.uniform(0.85, 1.15)
    painted = colour * (tone * shade)[..., None] + shine[..., None]
    edge = np.clip((1 - distance) * radius, 0, 1)[..., None]
    below += (painted - below) * edge


class Outline:
    """The outline of a stone: an ellipse that is a bit square and a bit uneven."""

    def __init__(self, generator: np.random.Generator, radius: float) -> None:
        self.radius, self.narrow = radius, generator.uniform(0.62, 0.95)
        self.angle, *self.phases = generator.uniform(0, 2 * np.pi, 3)
        self.power = generator.uniform(2.0, 2.8)

    def distance(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """1 on the outline, 0 in the middle."""
        along = x * np.cos(self.angle) + y * np.sin(self.angle)
        across = (y * np.cos(self.angle) - x * np.sin(self.angle)) / self.narrow
        turn = np.arctan2(across, along)
        uneven = 1 + 0.05 * np.cos(2 * turn + self.phases[0]) + 0.04 * np.cos(3 * turn + self.phases[1])
        length = (np.abs(along) ** self.power + np.abs(across) ** self.power) ** (1 / self.power)
        return length / (self.radius * uneven)
