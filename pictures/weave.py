"""Cloth: threads over and under each other, twisted of two plies."""

from __future__ import annotations

import numpy as np

from .canvas import SIZE, blur, grid, lit, smooth_noise

PITCH = 32.0
"""From thread to thread, in pixels."""
HALF_WIDTH = 0.49
"""Of a thread, in pitches."""
WARP = np.array([[0.13, 0.22, 0.40], [0.16, 0.30, 0.50], [0.13, 0.22, 0.40], [0.86, 0.80, 0.66]])
WEFT = np.array([[0.80, 0.71, 0.54], [0.80, 0.71, 0.54], [0.72, 0.33, 0.18], [0.80, 0.71, 0.54]])
"""Colours of the threads that run down and across, in turns."""
GAP = np.array([0.05, 0.045, 0.05])


def weave() -> np.ndarray:
    """The picture, [SIZE, SIZE, 3] in 0..1."""
    generator = np.random.default_rng(5)
    rows, columns = (axis / PITCH + 0.07 * smooth_noise(generator, 24) + 0.15 * smooth_noise(generator, 5)
                     for axis in grid())  # fmt: skip
    down = thread(generator, columns, rows, 1, WARP)
    across = thread(generator, rows, columns, -1, WEFT)
    upper = down[0] > across[0]
    height = np.where(upper, down[0], across[0])
    colour = np.where(upper[..., None], down[1], across[1])
    shade, _ = lit(0.30 * PITCH * blur(height, 0.6))
    hollow = np.clip(1 + 0.55 * (height - blur(height, 9)), 0.25, 1.1)
    return (colour * (shade * hollow)[..., None]).clip(0, 1)


def thread(
    generator: np.random.Generator, across: np.ndarray, along: np.ndarray, sign: int, colours: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Height and colour of the threads that run `along`, both in pitches. `sign`: 1 begins above, -1 below."""
    number = np.floor(across).astype(int)
    offset = across - number - 0.5
    over = sign * np.cos(np.pi * (along - 0.5)) * (1 - 2 * (number % 2))
    twist = np.cos(2 * np.pi * (1.5 * along + 1.2 * offset))
    fibres = smooth_noise(generator, SIZE // 3)
    round_ = np.sqrt(np.clip(1 - (offset / HALF_WIDTH) ** 2, 0, 1))
    height = 0.55 * over + round_ * (1 + 0.10 * twist) + 0.05 * fibres
    height[np.abs(offset) > HALF_WIDTH] = -1
    tone = generator.uniform(0.85, 1.12, 64)[number % 64] + 0.10 * fibres + 0.06 * twist
    colour = colours[number % len(colours)] * tone[..., None]
    return height, np.where((height > -1)[..., None], colour, GAP)
