"""What the formulas share: noise, blur, light.

Pictures are [SIZE, SIZE, 3] in 0..1, maps [SIZE, SIZE]; rows grow downwards, columns to the right, both in pixels.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

SIZE = 512
LIGHT = np.array([-0.45, -0.55, 0.70])
"""Where the light comes from: from the left, from above, from the front."""


def grid(size: int = SIZE) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of all pixels, two maps."""
    rows, columns = np.mgrid[0:size, 0:size].astype(np.float64)
    return rows, columns


def smooth_noise(generator: np.random.Generator, cells: int | tuple[int, int], size: int = SIZE) -> np.ndarray:
    """Noise in -1..1 of about `cells` blobs along a side (or down and across), [size, size]."""
    shape = (cells, cells) if isinstance(cells, int) else cells
    coarse = Image.fromarray(generator.uniform(-1, 1, shape).astype(np.float32))
    return np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC))


def cloudy_noise(generator: np.random.Generator, cells: int, octaves: int, size: int = SIZE) -> np.ndarray:
    """Smooth noise and finer, fainter noise on it: each octave has twice the blobs and half the strength."""
    return sum(smooth_noise(generator, cells << octave, size) / 2**octave for octave in range(octaves))


def blur(values: np.ndarray, radius: float) -> np.ndarray:
    """A map after a Gaussian of this standard deviation; its edges are taken to meet."""
    rows, columns = np.fft.fftfreq(values.shape[0]), np.fft.rfftfreq(values.shape[1])
    response = np.exp(-2 * (np.pi * radius) ** 2 * (rows[:, None] ** 2 + columns**2))
    return np.fft.irfft2(np.fft.rfft2(values) * response, s=values.shape)


def halved(picture: np.ndarray) -> np.ndarray:
    """A picture of half the size; what was drawn at twice the size gets smooth edges by it."""
    return (picture[::2, ::2] + picture[1::2, ::2] + picture[::2, 1::2] + picture[1::2, 1::2]) / 4


def step(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """A smooth step from 0 at `low` to 1 at `high`."""
    t = np.clip((values - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def mix(first: np.ndarray, second: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Colours between two, [... 3]; `share` is a map, 0 the first and 1 the second."""
    return first + (second - first) * share[..., None]


def ramp(values: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Colours along a list of them, [colours 3], as a map goes from 0 to 1."""
    places = np.linspace(0, 1, len(colours))
    return np.stack([np.interp(values, places, channel) for channel in colours.T], axis=-1)


def normals(height: np.ndarray) -> np.ndarray:
    """Unit normals of a relief given in pixels: to the right, down, to the front, [... 3]."""
    down, right = np.gradient(height)
    vectors = np.stack([-right, -down, np.ones_like(height)], axis=-1)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def lit(height: np.ndarray, ambient: float = 0.35, gloss: float = 0.0, sharp: float = 24.0) -> tuple:
    """Light on a relief: what colours are multiplied by, and a white shine to add; two maps."""
    facing = normals(height)
    light = LIGHT / np.linalg.norm(LIGHT)
    halfway = light + np.array([0.0, 0.0, 1.0])
    halfway /= np.linalg.norm(halfway)
    shade = ambient + (1.15 - ambient) * np.clip(facing @ light / light[2], 0, 1.35)
    return shade, gloss * np.clip(facing @ halfway, 0, 1) ** sharp
