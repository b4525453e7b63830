"""The columns: what is measured of each picture."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from demo_model.patch_distance import compare, copy_score

LATENT = 8
"""Pixels to a latent pixel."""


class Border(NamedTuple):
    """How visible a tile's border is, relative to the mean difference inside."""

    value: float
    least: float
    greatest: float


def measure(
    picture: np.ndarray,
    target: np.ndarray,
    original: np.ndarray,
    content: np.ndarray | None = None,
) -> dict[str, float]:
    """The columns that need no network. Pictures are [H W 3] in 0..1.

    Args:
        picture: the result.
        target: the reference after the VAE's encode and decode, which all distances are to.
        original: the reference before, which the sharpness is relative to.
        content: the photo that was painted, if any: how much of its layout is kept.
    """
    closeness = compare(picture, target, original)
    values = {"patch_distance": closeness.patch_distance, **closeness._asdict()}
    if content is not None:
        values["kept"] = copy_score(picture, content)
    return {name: float(value) for name, value in values.items()}


def differences(picture: np.ndarray, axis: int) -> np.ndarray:
    """Absolute differences across each border between latent pixels, the last one round the picture's edge.

    Other neighbours are left out: the decoder makes steps of different sizes inside a latent pixel.

    Args:
        picture: [H W 3].
        axis: 0 downwards, 1 across.

    Returns:
        [borders, length of the other axis, 3].
    """
    rows = np.moveaxis(picture, axis, 0)
    return np.abs(np.roll(rows, -1, axis=0) - rows)[LATENT - 1 :: LATENT]


def seams(picture: np.ndarray, size: int, stride: int) -> float:
    """Mean squared difference across the borders of windows along the width, relative to that elsewhere."""
    squares = (differences(picture, 1)[:-1] ** 2).mean((1, 2))
    starts = range(0, picture.shape[1] - size + 1, stride)
    ends = {border for start in starts for border in (start, start + size)} - {0, picture.shape[1]}
    at_border = [(number + 1) * LATENT in ends for number in range(len(squares))]
    return float(squares[at_border].mean() / squares[[not border for border in at_border]].mean())


def tile_border(picture: np.ndarray) -> Border:
    """How visible the border is when the picture is repeated: of both axes the one that is seen more."""
    across = []
    for axis in (0, 1):
        means = differences(picture, axis).mean((1, 2))
        inside = means[:-1] / means[:-1].mean()
        across.append(Border(*map(float, (means[-1] / means[:-1].mean(), inside.min(), inside.max()))))
    return max(across)
