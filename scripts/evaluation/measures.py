"""The columns: what is measured of each picture."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from demo_model.patch_distance import compare, copy_score

LATENT = 8
"""Pixels to a latent pixel."""


GREY = np.array([0.2126, 0.7152, 0.0722], dtype=np.float32)
EDGES = 0.15
"""The share of a picture's places that count as edges: the steepest."""


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
        content: the photo that was painted, if any: how much of its layout and of its edges is kept.
    """
    closeness = compare(picture, target, original)
    values = {"patch_distance": closeness.patch_distance, **closeness._asdict()}
    if content is not None:
        values["kept"] = copy_score(picture, content)
        values["edges_kept"] = edges_kept(picture, content)
    return {name: float(value) for name, value in values.items()}


def edges_kept(picture: np.ndarray, content: np.ndarray) -> float:
    """Boundary F1 of two pictures' edges: 1 where each edge of one lies at most a place beside one of the other.

    Edges are the places, one to a latent pixel, at which the grey value is steepest, `EDGES` of them. Pictures are
    [H W 3] in 0..1; the content is brought to the picture's size, of a larger side its middle.
    """
    ours, theirs = edges(picture, picture.shape), edges(content, picture.shape)
    common = (ours & widened(theirs)).sum() / max(1, ours.sum()), (theirs & widened(ours)).sum() / max(1, theirs.sum())
    precision, recall = map(float, common)
    return 2 * precision * recall / max(precision + recall, 1e-9)


def edges(picture: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The steepest places of a picture as it is seen at a size, one to a latent pixel: [rows columns], bool."""
    from PIL import Image, ImageOps

    grey = Image.fromarray((picture @ GREY * 255).round().astype(np.uint8))
    size = (shape[1] // LATENT, shape[0] // LATENT)
    down, across = np.gradient(np.asarray(ImageOps.fit(grey, size, Image.Resampling.BOX), dtype=np.float64))
    steepness = np.hypot(down, across)
    return (steepness >= np.quantile(steepness, 1 - EDGES)) & (steepness > 0)


def widened(places: np.ndarray) -> np.ndarray:
    """With their eight neighbours, [rows columns], bool."""
    padded = np.pad(places, 1)
    rows, columns = places.shape
    return np.any([padded[y : y + rows, x : x + columns] for y in range(3) for x in range(3)], axis=0)


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
