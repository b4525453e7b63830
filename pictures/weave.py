"""Cloth: threads over and under each other, each twisted of fibres."""

from __future__ import annotations

import numpy as np

from .canvas import SIZE, blur, grid, halved, lit, smooth_noise

FINE = 2 * SIZE
"""It is drawn at twice the size."""
PITCH = 64.0
"""From thread to thread, in pixels of those."""
HALF_WIDTH = 0.47
"""Of a thread, in pitches."""
WARP = np.array([[0.12, 0.17, 0.27], [0.17, 0.24, 0.35], [0.12, 0.17, 0.27], [0.60, 0.55, 0.45]])
WEFT = np.array([[0.66, 0.58, 0.43], [0.60, 0.52, 0.38], [0.50, 0.20, 0.12], [0.64, 0.56, 0.42]])
"""Colours of the threads that run down and across, in turns."""
GAP = np.array([0.05, 0.045, 0.05])


def weave() -> np.ndarray:
    """The picture, [SIZE, SIZE, 3] in 0..1."""
    generator = np.random.default_rng(5)
    rows, columns = (axis / PITCH + 0.04 * smooth_noise(generator, 22, FINE) + 0.16 * smooth_noise(generator, 5, FINE)
                     for axis in grid(FINE))  # fmt: skip
    down = thread(generator, columns, rows, 1, WARP)
    across = thread(generator, rows, columns, -1, WEFT)
    upper = down[0] > across[0]
    height = np.where(upper, down[0], across[0])
    colour = np.where(upper[..., None], down[1], across[1])
    shade, _ = lit(0.26 * PITCH * blur(height, 1.4), ambient=0.4)
    hollow = np.clip(1.05 + 0.42 * (height - blur(height, 16)), 0.2, 1.15)
    return halved((colour * (shade * hollow)[..., None]).clip(0, 1))


def thread(
    generator: np.random.Generator, across: np.ndarray, along: np.ndarray, sign: int, colours: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Height and colour of the threads that run `along`, both in pitches. `sign`: 1 begins above, -1 below."""
    number = np.floor(across).astype(int)
    offset = across - number - 0.5
    over = sign * np.cos(np.pi * (along - 0.5)) * (1 - 2 * (number % 2))
    bulge = np.sqrt(np.clip(1 - (offset / HALF_WIDTH) ** 2, 0, 1))
    turn = along + 0.9 * np.arcsin(np.clip(offset / HALF_WIDTH, -1, 1)) / np.pi + generator.uniform(0, 1, 64)[number]
    plies = np.abs(np.sin(2 * np.pi * turn))
    fibres = np.interp(turn * 22, np.arange(1024), generator.uniform(-1, 1, 1024), period=1024)
    fibres += 0.6 * np.interp(turn * 47, np.arange(1024), generator.uniform(-1, 1, 1024), period=1024)
    fibres *= 0.7 + 0.5 * smooth_noise(generator, SIZE // 6, FINE)
    height = 0.42 * over + bulge * (0.85 + 0.22 * plies) + 0.035 * fibres
    height[np.abs(offset) > HALF_WIDTH] = -0.4
    tone = generator.uniform(0.86, 1.14, 64)[number] * (0.80 + 0.28 * plies**0.6) + 0.11 * fibres
    colour = colours[number % len(colours)] * tone[..., None]
    return height, np.where((height > -0.4)[..., None], colour, GAP)
