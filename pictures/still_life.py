"""A jug and fruit on a table beside a window, as a camera sees them.

To the right is x, up is y, away from the camera is z; the table top lies at y = 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from .canvas import SIZE, cloudy_noise, grid, mix, ramp, smooth_noise, step
from .tracer import Thing, arrivals, lengths, normals, openness, sunlight, turned, unit, vector

CAMERA, LOOKS_AT, ZOOM = vector(0, 2.0, -6.2), vector(0.02, 0.60, 0), 3.75
TABLE_END, WALL = 1.75, 2.6
"""How far away they are."""
SUN, WIDE = unit(vector(-0.78, 0.74, -0.62)), 0.08
"""Where it is, and its radius at the distance 1: large for soft shadows."""
SUNLIGHT, SKYLIGHT, ROOMLIGHT = vector(2.1, 1.86, 1.46), vector(0.46, 0.55, 0.68), vector(0.30, 0.24, 0.19)
SHINE = vector(2.6, 2.7, 2.8)
PANES = (5, -6.9, -1.0), (4, 1.9, 7.0)
"""Of the other window, behind the camera on the left: how many, from where to where, along z and y."""
OTHER_WALL = -4.0
"""The x of that window."""
LEFT, RIGHT, SILL, TOP = -2.35, -0.62, 0.85, 4.0
"""The window that is seen."""
CONTRAST = 0.12
"""To a pixel beside it, in 0..1: from here on one ray is not enough."""
RAYS = ((-0.375, -0.125), (-0.125, 0.375), (0.125, -0.375), (0.375, 0.125))
"""Where those of a pixel go then."""

# fmt: off
JUG = ((0, 0), (0.36, 0), (0.40, 0.03), (0.54, 0.45), (0.50, 0.85), (0.27, 1.15), (0.25, 1.35), (0.33, 1.58),
       (0.35, 1.62), (0.31, 1.62), (0.24, 1.45), (0.20, 1.2), (0, 1.1))
BOWL = ((0, 0), (0.34, 0), (0.36, 0.06), (0.34, 0.10), (0.62, 0.22), (0.84, 0.50), (0.86, 0.54), (0.82, 0.54),
        (0.60, 0.30), (0.25, 0.18), (0, 0.16))
APPLE = ((0, 0.07), (0.07, 0.03), (0.16, 0.00), (0.27, 0.14), (0.31, 0.33), (0.27, 0.50), (0.14, 0.57), (0.05, 0.53),
         (0, 0.46))
PEAR = ((0, 0.03), (0.12, 0), (0.29, 0.10), (0.33, 0.30), (0.24, 0.52), (0.15, 0.66), (0.12, 0.82),
        (0.06, 0.90), (0, 0.90))
LEMON = ((0, -0.35), (0.05, -0.34), (0.07, -0.29), (0.20, -0.19), (0.24, 0), (0.20, 0.19), (0.07, 0.28), (0.05, 0.33),
         (0, 0.34))
ORANGE = tuple((0.29 * np.sin(turn), 0.29 - 0.29 * np.cos(turn)) for turn in np.linspace(0, np.pi, 13))
STALK = ((0, 0), (0.022, 0), (0.017, 0.12), (0.024, 0.20), (0, 0.20))
# fmt: on
"""Half outlines, radius and height, from the axis round to the axis."""


def still_life() -> np.ndarray:
    """The picture, [SIZE, SIZE, 3] in 0..1."""
    rows, columns = grid()
    scene = Scene()
    picture = scene.seen(rows.ravel(), columns.ravel()).reshape(SIZE, SIZE, 3)
    edges = at_edges(picture)
    several = scene.seen(*(np.concatenate([places[edges] + ray[axis] for ray in RAYS])
                           for axis, places in enumerate((rows, columns))))  # fmt: skip
    picture[edges] = several.reshape(len(RAYS), -1, 3).mean(0)
    return picture.clip(0, 1)


def at_edges(picture: np.ndarray) -> np.ndarray:
    """Which pixels differ much from one beside them, [SIZE, SIZE]."""
    found = np.zeros(picture.shape[:2], bool)
    across = np.abs(np.diff(picture, axis=1)).max(-1) > CONTRAST
    down = np.abs(np.diff(picture, axis=0)).max(-1) > CONTRAST
    found[:, 1:] |= across
    found[:, :-1] |= across
    found[1:] |= down
    found[:-1] |= down
    return found


class Scene:
    """All that is seen, and the light on it."""

    def __init__(self) -> None:
        generator = np.random.default_rng(3)
        self.plaster = cloudy_noise(generator, 5, 5)
        self.grain = smooth_noise(generator, (150, 7)) + 0.5 * smooth_noise(generator, (400, 12))
        self.speckle = smooth_noise(generator, 70)
        self.things = [*self.vessels(), *self.fruit(), grapes(generator)]

    def seen(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Colours at places of the picture, [places 3]."""
        ahead = unit(LOOKS_AT - CAMERA)
        right = unit(np.cross(vector(0, 1, 0), ahead))
        x, y = (2 * columns + 1) / SIZE - 1, 1 - (2 * rows + 1) / SIZE
        rays = unit(ZOOM * ahead + x[:, None] * right + y[:, None] * np.cross(ahead, right)).astype(np.float32)
        light = self.light(np.broadcast_to(CAMERA, rays.shape), rays)
        return np.sqrt(1 - np.exp(-1.15 * light))

    def light(self, origins: np.ndarray, rays: np.ndarray) -> np.ndarray:
        """What comes along rays, [rays 3]."""
        gone = np.stack([arrivals(thing, origins, rays) for thing in self.things] + [to_table(origins, rays)])
        first = np.where(np.isfinite(gone.min(0)), gone.argmin(0), -1)
        gone = np.where(first < 0, (WALL - origins[:, 2]) / rays[:, 2], gone.min(0))
        points, light = origins + gone[:, None] * rays, np.empty_like(rays)
        for number, thing in enumerate(self.things):
            here = first == number
            surface = normals(thing, points[here]), thing.colour(points[here]), thing.gloss
            light[here] = self.lit(points[here], rays[here], *surface)
        table, wall = first == len(self.things), first < 0
        light[table] = self.lit(points[table], rays[table], *self.table(points[table]))
        light[wall] = window(points[wall], self.lit(points[wall], rays[wall], *self.wall(points[wall])), self.plaster)
        return light

    def lit(
        self, points: np.ndarray, rays: np.ndarray, facing: np.ndarray, colour: np.ndarray, gloss: float
    ) -> np.ndarray:
        """What comes from points of such colours towards the camera, [points 3]."""
        sun = np.clip(facing @ SUN, 0, 1) * panes(points, SUN, 0.07)
        shone = sun > 0
        sun[shone] *= sunlight(self.things, points[shone] + 0.01 * facing[shone], SUN, WIDE)
        free = openness(self.things, points, facing)
        sky = free * np.clip(0.55 + 0.45 * facing @ unit(vector(-0.6, 0.6, 0.5)), 0, 1)
        light = sun[:, None] * SUNLIGHT + sky[:, None] * SKYLIGHT + free[:, None] * ROOMLIGHT
        if not gloss:
            return colour**2 * light
        slant = np.clip(-np.einsum("ni,ni->n", facing, rays), 0, 1)
        mirrored = rays + 2 * slant[:, None] * facing
        shine = gloss * (0.35 + 0.65 * (1 - slant) ** 3) * free * panes(points, mirrored, 0.15)
        return colour**2 * light + shine[:, None] * SHINE

    def table(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
        """Which way the table faces, its colours, its gloss: boards, and a cloth on them."""
        x, z = points[:, 0], points[:, 2]
        facing = np.broadcast_to(vector(0, 1, 0), points.shape).copy()
        across = (z + 4) / 0.62
        board, across = np.floor(across), across % 1
        grain = at(self.grain, across * 0.3 + board * 0.37, x * 0.12 + board * 0.21)
        wood = mix(vector(0.60, 0.38, 0.22), vector(0.42, 0.24, 0.13), np.clip(0.5 + 0.5 * grain, 0, 1))
        wood *= (1 - 0.75 * np.exp(-((np.minimum(across, 1 - across) / 0.02) ** 2)))[:, None]
        return facing, self.cloth(x, z, facing, wood), 0.0

    def cloth(self, x: np.ndarray, z: np.ndarray, facing: np.ndarray, wood: np.ndarray) -> np.ndarray:
        """The table's colours after the cloth's are put over the wood's; its folds are put into `facing`."""
        along, across = 0.94 * x + 0.34 * z + 0.55, 0.94 * z - 0.34 * x + 0.45
        inside = np.minimum(1.45 - np.abs(along), 1.0 - np.abs(across))
        facing[:, 0] += np.where(inside > 0, 0.22 * np.sin(9 * along + 1.4 * np.sin(3 * across)), 0)
        facing[:, 2] += np.where(inside > 0, 0.10 * np.sin(7 * across + 2 * np.sin(2 * along)), 0)
        facing /= lengths(facing)[:, None]
        stripes = np.exp(-(((inside - 0.16) / 0.045) ** 4)) + np.exp(-(((inside - 0.27) / 0.014) ** 4))
        linen = mix(vector(0.86, 0.83, 0.76), vector(0.62, 0.16, 0.16), np.clip(stripes, 0, 1))
        shadow = 1 - 0.5 * np.exp(-np.clip(-inside, 0, 1) / 0.025)
        return mix(wood * shadow[:, None], linen, step(inside, -0.004, 0.004))

    def wall(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
        """Which way the wall faces, its colours, its gloss."""
        noise = at(self.plaster, points[:, 1] * 0.22 + 0.1, points[:, 0] * 0.19 + 0.5)
        paint = mix(vector(0.58, 0.60, 0.56), vector(0.72, 0.68, 0.60), np.clip(0.5 + 0.6 * noise, 0, 1))
        return np.broadcast_to(vector(0, 0, -1), points.shape), paint, 0.0

    def vessels(self) -> list[Thing]:
        """A jug with its handle, and a bowl."""
        at_jug = vector(-0.92, 0, 0.75)
        return [
            made(JUG, at_jug, self.glazed, 0.55),
            handle(at_jug + vector(0.44, 1.02, 0), plain(0.16, 0.48, 0.52), 0.55),
            made(BOWL, vector(0.50, 0, 0.30), striped, 0.45),
        ]

    def fruit(self) -> list[Thing]:
        """In the bowl and on the table."""
        return [
            made(ORANGE, vector(0.16, 0.31, 0.16), self.peel(0.95, 0.53, 0.10), 0.20),
            *self.with_stalk(APPLE, 0.47, vector(0.70, 0.33, 0.02), self.red_apple, 0.40, (0.25, 1, -0.25)),
            *self.with_stalk(APPLE, 0.47, vector(0.58, 0.40, 0.62), self.peel(0.58, 0.68, 0.22), 0.40, (0.1, 1, 0.2)),
            *self.with_stalk(PEAR, 0.86, vector(1.27, 0, -0.42), self.pear, 0.25, (0.06, 1, 0.05)),
            *self.with_stalk(APPLE, 0.47, vector(0.60, 0, -1.05), self.red_apple, 0.40, (-0.15, 1, -0.12)),
            made(LEMON, vector(-1.0, 0.225, -0.62), self.peel(0.95, 0.82, 0.18), 0.25, (1, 0.10, -0.45)),
        ]

    @staticmethod
    def with_stalk(
        corners: Sequence, height: float, place: np.ndarray, colour: Callable, gloss: float, axis: Sequence
    ) -> list[Thing]:
        """A fruit and its stalk, which begins at a height."""
        up = unit(vector(*axis))
        stalk = made(STALK, place + (height - 0.03) * up, plain(0.30, 0.20, 0.10), 0.0, up + vector(0.2, 0, 0.1))
        return [made(corners, place, colour, gloss, axis), stalk]

    def glazed(self, points: np.ndarray) -> np.ndarray:
        """Glaze that ran down a jug of clay."""
        height, turn = points[:, 1], turns(points)
        end = 0.42 + 0.10 * np.sin(turn * 44) * np.sin(turn * 17 + 1) + 0.04 * np.sin(turn * 90)
        glaze = ramp(height / 1.6, np.array([[0.10, 0.30, 0.36], [0.14, 0.45, 0.50], [0.24, 0.60, 0.60]]))
        clay = np.array([0.70, 0.45, 0.30]) * (1 + 0.12 * at(self.speckle, height * 0.5, turn))[:, None]
        return mix(clay, glaze, step(height, end, end + 0.03))

    def peel(self, *colour: float) -> Callable[[np.ndarray], np.ndarray]:
        """One colour, a bit uneven."""
        return lambda points: vector(*colour) * (1 + 0.06 * at(self.speckle, points[:, 1], 2 * turns(points)))[:, None]

    def red_apple(self, points: np.ndarray) -> np.ndarray:
        """Red, yellow in streaks and on one side."""
        turn = turns(points)
        streaks = 0.5 * at(self.grain.T, points[:, 1] * 0.3, turn) + 0.7 * np.sin(2 * np.pi * turn + 2.0)
        skin = mix(vector(0.74, 0.13, 0.10), vector(0.90, 0.64, 0.24), step(streaks, 0.35, 1.3))
        return mix(vector(0.42, 0.36, 0.14), skin, step(np.hypot(points[:, 0], points[:, 2]), 0.02, 0.11))

    def pear(self, points: np.ndarray) -> np.ndarray:
        """Yellow with freckles, one cheek red."""
        turn = turns(points)
        skin = mix(vector(0.76, 0.73, 0.30), vector(0.80, 0.44, 0.22), step(np.sin(2 * np.pi * turn), 0.1, 1.1))
        return skin * (1 - 0.10 * step(at(self.speckle, points[:, 1] * 1.2, 2 * turn), 0.3, 0.5))[:, None]


def striped(points: np.ndarray) -> np.ndarray:
    """White with two blue rings outside."""
    height = points[:, 1]
    rings = np.maximum(np.exp(-(((height - 0.44) / 0.035) ** 6)), np.exp(-(((height - 0.30) / 0.012) ** 6)))
    return mix(vector(0.88, 0.86, 0.80), vector(0.16, 0.24, 0.52), rings * (np.hypot(points[:, 0], points[:, 2]) > 0.5))


def plain(*colour: float) -> Callable[[np.ndarray], np.ndarray]:
    """One colour."""
    return lambda points: np.broadcast_to(vector(*colour), points.shape)


def made(
    corners: Sequence[tuple], place: np.ndarray, colour: Callable, gloss: float, axis: Sequence[float] = (0, 1, 0)
) -> Thing:
    """Something turned on a lathe that stands at a place, its axis in this direction."""
    distance, middle, radius = turned(corners)
    up = unit(vector(*axis))
    right = unit(np.cross(up, vector(0, 0, 1)))
    to_own = np.stack([right, up, np.cross(right, up)], axis=1)
    return Thing(
        lambda points: distance((points - place) @ to_own),
        place + np.float32(middle) * up,
        radius,
        lambda points: colour((points - place) @ to_own),
        gloss,
    )


def handle(place: np.ndarray, colour: Callable, gloss: float) -> Thing:
    """A ring that stands upright, higher than wide."""

    def distance(points: np.ndarray) -> np.ndarray:
        x, y, z = (points - place).T
        return 0.8 * (np.hypot(np.hypot(x, 0.72 * y) - 0.28, z) - 0.055)

    return Thing(distance, place, 0.46, colour, gloss)


def grapes(generator: np.random.Generator) -> Thing:
    """A bunch of them, in front."""
    balls = []
    for layer, (count, height) in enumerate(((9, 0.12), (6, 0.28), (2, 0.42))):
        for number in range(count):
            far, turn = 0.11 * np.sqrt(number + 0.4) * (1 - 0.1 * layer), 2.4 * number + layer
            ball = vector(-0.22 + 1.35 * far * np.cos(turn), height, -0.95 + far * np.sin(turn))
            balls.append(ball + generator.normal(0, 0.012, 3).astype(np.float32))
    middle = np.mean(balls, axis=0)
    around = np.array(balls) - middle
    squares = np.einsum("ni,ni->n", around, around)

    def distance(points: np.ndarray) -> np.ndarray:
        points = points - middle
        nearest = (squares - 2 * points @ around.T).min(1) + np.einsum("ni,ni->n", points, points)
        return np.sqrt(np.maximum(nearest, 0)) - 0.125

    radius = 0.125 + float(np.sqrt(squares.max()))
    return Thing(distance, middle, radius, plain(0.38, 0.19, 0.40), 0.5)


def turns(points: np.ndarray) -> np.ndarray:
    """How far round the vertical axis points are, -0.5..0.5, 0 in front."""
    return np.arctan2(points[:, 0], -points[:, 2]) / (2 * np.pi)


def at(noise: np.ndarray, down: np.ndarray, across: np.ndarray) -> np.ndarray:
    """A map at places given in its own size; beyond its edge it begins anew."""
    return noise[(down * SIZE).astype(int) % SIZE, (across * SIZE).astype(int) % SIZE]


def to_table(origins: np.ndarray, rays: np.ndarray) -> np.ndarray:
    """How far rays go until they meet the table, infinite where they do not."""
    gone = np.where(rays[:, 1] < 0, -origins[:, 1] / np.minimum(rays[:, 1], -1e-9), np.inf)
    return np.where(origins[:, 2] + gone * rays[:, 2] < TABLE_END, gone, np.inf)


def bars(places: np.ndarray, count: int, low: float, high: float, wide: float, soft: float) -> np.ndarray:
    """How open a window is along one axis, 0..1: panes from low to high, between them bars of a width."""
    parts = (places - low) / (high - low) * count
    to_bar = np.abs(parts - np.round(parts)) * (high - low) / count
    inside = step(places, low - soft, low + soft) * (1 - step(places, high - soft, high + soft))
    return inside * step(to_bar, wide / 2 - soft, wide / 2 + soft)


def panes(points: np.ndarray, directions: np.ndarray, soft: float) -> np.ndarray:
    """How much comes to points through the other window from these directions, 0..1."""
    x, y, z = np.moveaxis(directions, -1, 0)
    gone = (OTHER_WALL - points[:, 0]) / np.minimum(x, -0.05)
    along, up = points[:, 2] + gone * z, points[:, 1] + gone * y
    return bars(along, *PANES[0], 0.2, soft) * bars(up, *PANES[1], 0.2, soft) * (x < -0.05)


def window(points: np.ndarray, wall: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """The light from the wall behind with a window in it, and from what is outside."""
    x, y = points[:, 0], points[:, 1]
    outside = mix(vector(1.20, 1.18, 1.05), vector(0.55, 0.85, 1.25), step(y, 1.2, 2.7))
    hill = 1.45 + 0.12 * np.sin(2.2 * x) + 0.05 * np.sin(6 * x)
    outside = mix(outside, vector(0.36, 0.50, 0.48), 1 - step(y, hill - 0.04, hill + 0.04))
    trees = 1.20 + 0.12 * at(noise, 0 * x + 0.3, x * 0.25)
    outside = mix(outside, vector(0.18, 0.30, 0.12), 1 - step(y, trees - 0.05, trees + 0.05))
    to_edge = np.minimum(RIGHT + 0.10 - x, y - SILL + 0.10)
    paint = vector(0.62, 0.60, 0.55) * (0.75 + 0.25 * step(to_edge, 0.0, 0.04))[:, None]
    glass = bars(x, 2, LEFT, RIGHT, 0.09, 0.008) * bars(y, 3, SILL, TOP, 0.09, 0.008)
    return mix(mix(wall, paint, (to_edge > 0).astype(float)), outside, glass)
