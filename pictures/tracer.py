"""What a camera sees of things with a known distance to each point: rays, shadows, corners that get less light.

Points and directions are [rays 3], fp32: to the right, up, away from the camera. A *thing* knows how far points are
from it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import numpy as np

from .canvas import step

NEAR = 2e-3
"""At this distance a ray has arrived."""
STEPS, SHADOW_STEPS = 30, 12
LEAST_STEP = 0.04
"""Of a shadow's ray."""
CORNER = 0.35
"""How far away a thing still keeps light from a place."""
CELLS = 64
"""Of the table that holds how far places are from an outline: across, half as many as up."""

Distance = Callable[[np.ndarray], np.ndarray]
"""Of points [points 3] from a surface, [points]: less than 0 inside, at most the truth."""


@dataclass(frozen=True)
class Thing:
    """Something to be seen.

    Attributes:
        distance: of points from its surface.
        middle, radius: of a ball that holds it.
        colour: of points on it, [points 3] in 0..1.
        gloss: how much of the light is mirrored.
    """

    distance: Distance
    middle: np.ndarray
    radius: float
    colour: Callable[[np.ndarray], np.ndarray]
    gloss: float = 0.0


def vector(*values: float) -> np.ndarray:
    """A point or direction, [3]."""
    return np.array(values, np.float32)


def lengths(vectors: np.ndarray) -> np.ndarray:
    """Of each vector."""
    return np.sqrt(np.einsum("...i,...i->...", vectors, vectors))


def unit(vectors: np.ndarray) -> np.ndarray:
    """The same directions with the length 1."""
    return vectors / lengths(vectors)[..., None]


@cache
def turned(corners: tuple[tuple[float, float], ...]) -> tuple[Distance, float, float]:
    """Something made on a lathe around the vertical axis through 0.

    Args:
        corners: radius and height of its outline's, from the axis round to the axis; the outline is rounder.

    Returns:
        its distance, and of a ball that holds it the height of its middle and its radius.
    """
    outline = rounded(np.array(corners))
    middle = float(outline[:, 1].min() + outline[:, 1].max()) / 2
    radius = float(np.hypot(outline[:, 0], outline[:, 1] - middle).max())
    cell = 1.1 * radius / CELLS
    places = np.stack(np.mgrid[0 : CELLS + 1, -CELLS : CELLS + 1], axis=-1).reshape(-1, 2) * cell + [0, middle]
    table = to_outline(places, outline).reshape(CELLS + 1, 2 * CELLS + 1).astype(np.float32)

    def distance(points: np.ndarray) -> np.ndarray:
        across = np.clip(np.hypot(points[:, 0], points[:, 2]) / cell, 0, CELLS - 0.01)
        up = np.clip((points[:, 1] - middle) / cell + CELLS, 0, 2 * CELLS - 0.01)
        column, row = across.astype(np.int32), up.astype(np.int32)
        across, up = across - column, up - row
        corner = column * (2 * CELLS + 1) + row
        inner, outer = (
            table.take(corner + side) * (1 - up) + table.take(corner + side + 1) * up for side in (0, 2 * CELLS + 1)
        )  # fmt: skip
        return inner + (outer - inner) * across

    return distance, middle, radius


def rounded(corners: np.ndarray) -> np.ndarray:
    """A polyline with its corners cut off three times; its ends stay."""
    for _ in range(3):
        cut = np.stack([0.75 * corners[:-1] + 0.25 * corners[1:], 0.25 * corners[:-1] + 0.75 * corners[1:]], axis=1)
        corners = np.concatenate([corners[:1], cut.reshape(-1, 2), corners[-1:]])
    return corners


def to_outline(places: np.ndarray, outline: np.ndarray) -> np.ndarray:
    """How far places [n 2] are from a polyline, less than 0 between it and the axis."""
    far, crossed = np.full(len(places), np.inf), np.zeros(len(places), int)
    x, y = places.T
    for start, end in pairwise(outline):
        side, away = end - start, places - start
        part = np.clip(away @ side / max(side @ side, 1e-12), 0, 1)
        far = np.minimum(far, lengths(away - part[:, None] * side))
        beside = (start[1] > y) != (end[1] > y)
        crossed += beside & (x < start[0] + (y - start[1]) / (side[1] or 1) * side[0])
    return np.where(crossed % 2 == 1, -far, far)


def through(thing: Thing, origins: np.ndarray, directions: np.ndarray, room: float = 0.0) -> tuple:
    """Which rays pass within `room` of the ball around a thing (their numbers), and where they enter and leave it."""
    to_middle = thing.middle - origins
    along = np.einsum("ni,ni->n", to_middle, directions)
    beside = (thing.radius + room) ** 2 - np.einsum("ni,ni->n", to_middle, to_middle) + along**2
    (rays,) = np.nonzero((beside > 0) & (along > -thing.radius - room))
    half = np.sqrt(beside[rays])
    return rays, np.maximum(along[rays] - half, 0), along[rays] + half


def arrivals(thing: Thing, origins: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """How far each ray goes until it meets a thing, [rays]; infinite where it does not."""
    met = np.full(len(origins), np.inf, np.float32)
    rays, gone, end = through(thing, origins, directions)
    origins, directions = origins[rays], directions[rays]
    for _ in range(STEPS):
        away = thing.distance(origins + gone[:, None] * directions)
        arrived = away < NEAR
        met[rays[arrived]] = gone[arrived]
        gone = gone + away
        on = ~arrived & (gone < end)
        rays, gone, end, origins, directions = (values[on] for values in (rays, gone, end, origins, directions))
    return met


def normals(thing: Thing, points: np.ndarray) -> np.ndarray:
    """Directions straight away from a thing's surface."""
    corners = vector(1, -1, -1), vector(-1, -1, 1), vector(-1, 1, -1), vector(1, 1, 1)
    return unit(sum(corner * thing.distance(points + 0.01 * corner)[:, None] for corner in corners))


def sunlight(things: Sequence[Thing], points: np.ndarray, direction: np.ndarray, wide: float) -> np.ndarray:
    """How much each point sees of a light in this direction, 0..1. `wide`: the light's radius at the distance 1."""
    seen = np.ones(len(points), np.float32)
    for thing in things:
        rays, gone, end = through(thing, points, np.broadcast_to(direction, points.shape), room=0.15)
        origins, least = points[rays], np.ones(len(rays), np.float32)
        passing = np.arange(len(rays))
        for _ in range(SHADOW_STEPS):
            away = thing.distance(origins + gone[:, None] * direction)
            least[passing] = np.minimum(least[passing], 0.5 + 0.5 * away / (wide * gone + NEAR))
            gone = gone + np.maximum(away, LEAST_STEP)
            on = (gone < end) & (least[passing] > 0)
            passing, gone, end, origins = (values[on] for values in (passing, gone, end, origins))
        seen[rays] = np.minimum(seen[rays], step(least, 0, 1))
    return seen


def openness(things: Sequence[Thing], points: np.ndarray, facing: np.ndarray) -> np.ndarray:
    """How little the things around keep light from each point, 0..1."""
    reaches = (0.2 * CORNER, 0.6 * CORNER, CORNER)
    nearest = np.repeat(np.array(reaches, np.float32)[:, None], len(points), axis=1)
    for thing in things:
        away = points - thing.middle
        (close,) = np.nonzero(np.einsum("ni,ni->n", away, away) < (thing.radius + 2 * CORNER) ** 2)
        for reach, least in zip(reaches, nearest, strict=True):
            least[close] = np.minimum(least[close], thing.distance(points[close] + reach * facing[close]))
    kept = sum(1 - np.maximum(least, 0) / reach for reach, least in zip(reaches, nearest, strict=True))
    return 1 - 0.28 * kept
