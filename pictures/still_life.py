"""A jug, a bottle and fruit on a striped cloth, in the light of a window on the left, as a camera sees them.

Signed distances, marched along the rays of the camera. Places are [... 3] in units of about ten centimetres: x to the
right, y up, z away from the camera; the table is y = 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .canvas import SIZE, cloudy_noise, mix, step

EYE, TARGET, FOCAL = np.array([0.3, 3.1, -9.4]), np.array([0.05, 1.12, 0.0]), 2.35
LIGHT = np.array([-0.62, 0.58, -0.53]) / np.linalg.norm([-0.62, 0.58, -0.53])
SUN, SKY, BOUNCE = np.array([1.75, 1.55, 1.22]), np.array([0.30, 0.36, 0.45]), np.array([0.24, 0.18, 0.13])
WALL, NEAR, FAR = 3.4, -2.8, 2.3
"""z of the wall behind the table, and between which all things stand."""
FLOOR, BACK = -1, -2
"""What a ray hits where it hits none of the things."""

Distance = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Thing:
    """A solid.

    Attributes:
        distance: from places to its surface, negative inside; never more than the true one.
        colour: at places, [... 3].
        gloss: how much of the window its surface mirrors, 0 to 1.
    """

    distance: Distance
    colour: Callable[[np.ndarray], np.ndarray]
    gloss: float


def turned(x: float, z: float, profile: list[tuple[float, float]], wall: float = 0.0) -> Distance:
    """What a potter turns: heights and radii from the bottom up, rounded between; hollow if it has a wall."""
    heights, radii = np.array(profile).T
    table = np.linspace(heights[0], heights[-1], 256)
    rounded = np.convolve(np.pad(np.interp(table, heights, radii), 12, mode="edge"), np.hanning(25) / 12, "valid")

    def distance(at: np.ndarray) -> np.ndarray:
        across = np.hypot(at[..., 0] - x, at[..., 2] - z) - np.interp(at[..., 1], table, rounded)
        if wall:
            across = np.abs(across) - wall
        above = np.maximum(heights[0] - at[..., 1], at[..., 1] - heights[-1])
        return 0.7 * np.maximum(across, above)

    return distance


def ball(x: float, y: float, z: float, radius: float, dimple: float = 0.0, long: float = 1.0) -> Distance:
    """A sphere; with a dimple on top, or longer along x."""

    def distance(at: np.ndarray) -> np.ndarray:
        side, up, far = (at[..., 0] - x) / long, at[..., 1] - y, at[..., 2] - z
        hollow = dimple * np.exp(-((np.hypot(side, far) / (0.4 * radius)) ** 2)) * (up > 0)
        return 0.8 * (np.sqrt(side**2 + up**2 + far**2) - radius + hollow)

    return distance


def handle(x: float, y: float, z: float, radius: float, thick: float) -> Distance:
    """The left half of an upright ring."""

    def distance(at: np.ndarray) -> np.ndarray:
        side, up = at[..., 0] - x, (at[..., 1] - y) / 1.25
        return np.hypot(np.hypot(side, up) - radius, at[..., 2] - z) - thick

    return distance


def plain(*colour: float) -> Callable[[np.ndarray], np.ndarray]:
    """The same colour everywhere."""
    return lambda at: np.broadcast_to(np.array(colour), at.shape)


def blushing(first: tuple, second: tuple, share: Callable[[np.ndarray], np.ndarray]) -> Callable:
    """From one colour to another."""
    return lambda at: mix(np.array(first), np.array(second), share(at))


def glaze(at: np.ndarray) -> np.ndarray:
    """White with two blue rings and a row of blue leaves."""
    angle = np.arctan2(at[..., 2] - 0.9, at[..., 0] + 1.75)
    height = at[..., 1]
    rings = step(np.abs(np.abs(height - 1.05) - 0.62), 0.07, 0.04)
    leaf = np.abs(height - 1.05) + 0.32 * np.abs(np.sin(4.5 * angle))
    blue = np.maximum(rings, step(leaf, 0.30, 0.25))
    return mix(np.array([0.86, 0.85, 0.80]), np.array([0.10, 0.20, 0.48]), blue)


JUG = [(0, 0.62), (0.12, 0.72), (0.6, 1.02), (1.1, 1.08), (1.7, 0.80), (2.1, 0.52), (2.5, 0.50), (2.75, 0.66)]
BOTTLE = [(0, 0.50), (0.08, 0.56), (2.0, 0.56), (2.35, 0.42), (2.7, 0.20), (3.5, 0.18), (3.52, 0.23), (3.68, 0.23)]
BOWL = [(0, 0.55), (0.10, 0.60), (0.16, 0.50), (0.4, 1.05), (0.8, 1.42), (1.05, 1.52)]
PEAR = [(0, 0.28), (0.06, 0.42), (0.35, 0.58), (0.65, 0.52), (0.95, 0.33), (1.25, 0.24), (1.38, 0.08)]
ORANGE, APPLE, LEMON = (0.93, 0.45, 0.06), (0.66, 0.07, 0.07), (0.93, 0.78, 0.12)
THINGS = (
    Thing(turned(-1.75, 0.9, JUG, wall=0.06), glaze, 0.5),
    Thing(handle(-2.75, 1.45, 0.9, 0.52, 0.10), plain(0.86, 0.85, 0.80), 0.5),
    Thing(turned(0.0, 1.5, BOTTLE), plain(0.03, 0.13, 0.07), 0.9),
    Thing(turned(1.7, 0.5, BOWL, wall=0.05), plain(0.42, 0.25, 0.15), 0.35),
    Thing(ball(1.25, 1.05, 0.15, 0.56), plain(*ORANGE), 0.15),
    Thing(ball(2.25, 1.02, 0.35, 0.55), plain(*ORANGE), 0.15),
    Thing(
        ball(1.72, 1.20, 0.95, 0.58, dimple=0.16),
        blushing(APPLE, (0.72, 0.55, 0.12), lambda at: step(at[..., 0] - 0.6 * at[..., 1], 0.8, 1.7)), 0.45,
    ),
    Thing(
        turned(-0.35, -1.35, PEAR),
        blushing((0.55, 0.60, 0.13), (0.78, 0.42, 0.12), lambda at: step(at[..., 0] - 0.3 * at[..., 1], -0.4, 0.2)),
        0.2,
    ),
    Thing(
        ball(-1.45, 0.55, -1.75, 0.58, dimple=0.18),
        blushing(APPLE, (0.80, 0.62, 0.16), lambda at: step(at[..., 1] - 0.5 * at[..., 0], 1.35, 1.95)), 0.45,
    ),
    Thing(ball(0.95, 0.40, -2.15, 0.40, long=1.35), plain(*LEMON), 0.25),
)  # fmt: skip


def nearest(at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distance to the nearest thing, and its number."""
    distances = np.stack([thing.distance(at) for thing in THINGS])
    return distances.min(axis=0), distances.argmin(axis=0)


def rays(size: int) -> np.ndarray:
    """Unit directions from the eye through each pixel, [pixels 3]."""
    ahead = (TARGET - EYE) / np.linalg.norm(TARGET - EYE)
    right = np.cross([0.0, 1.0, 0.0], ahead)
    right /= np.linalg.norm(right)
    up = np.cross(ahead, right)
    across = (np.arange(size) + 0.5) / size * 2 - 1
    x, y = np.meshgrid(across, -across)
    directions = FOCAL * ahead + x[..., None] * right + y[..., None] * up
    return (directions / np.linalg.norm(directions, axis=-1, keepdims=True)).reshape(-1, 3)


def march(
    start: np.ndarray, directions: np.ndarray, first: np.ndarray, limit: np.ndarray, steps: int
) -> tuple[np.ndarray, np.ndarray]:
    """How far each ray goes until it hits a thing, and how clear of things it stayed on the way (1: clear).

    Args:
        start: places, [rays 3].
        directions: unit vectors, [rays 3].
        first, limit: between which distances to look, [rays].
        steps: at most.
    """
    travelled, clear = first.copy(), np.ones(len(start))
    going = np.arange(len(start))
    for _ in range(steps):
        at = start[going] + travelled[going, None] * directions[going]
        distance, _number = nearest(at)
        clear[going] = np.minimum(clear[going], 9 * distance / travelled[going])
        travelled[going] += np.maximum(distance, 0.002)
        going = going[(distance > 0.002) & (travelled[going] < limit[going])]
        if not len(going):
            break
    return travelled, clear.clip(0, 1)


def surroundings(directions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How far it is along rays from the eye to the table or the wall, and which it is."""
    to_wall = (WALL - EYE[2]) / directions[:, 2]
    to_table = np.where(directions[:, 1] < -1e-6, -EYE[1] / np.minimum(directions[:, 1], -1e-6), np.inf)
    return np.minimum(to_wall, to_table), np.where(to_table < to_wall, FLOOR, BACK)


def cloth(at: np.ndarray) -> np.ndarray:
    """Linen with blue and red stripes, and where it ends the wood of the table."""
    along = at[:, 0] * 0.94 + at[:, 2] * 0.34
    stripe = np.abs((along + 0.15) % 1.9 - 0.95)
    colour = mix(np.array([0.83, 0.79, 0.70]), np.array([0.17, 0.27, 0.45]), step(stripe, 0.22, 0.19))
    colour = mix(colour, np.array([0.62, 0.16, 0.13]), step(np.abs(stripe - 0.36), 0.05, 0.03))
    thread = 0.94 + 0.06 * np.sin(38 * along) * np.sin(38 * (at[:, 2] * 0.94 - at[:, 0] * 0.34))
    return colour * thread[:, None]


def window(at: np.ndarray) -> np.ndarray:
    """How much of the window's light falls on places: its panes, thrown along the light; 0 to 1."""
    far = (at[:, 0] + 9) / -LIGHT[0]
    height, depth = at[:, 1] + far * LIGHT[1], at[:, 2] + far * LIGHT[2]
    soft = 0.12
    panes = np.ones(len(at))
    for value, low, high, bars in ((height, 5.2, 12.4, (10.6,)), (depth, -12.0, -3.4, (-9.9, -5.9))):
        panes = panes * step(value, low - soft, low + soft) * step(-value, -high - soft, -high + soft)
        for bar in bars:
            panes = panes * step(np.abs(value - bar), 0.08, 0.08 + 2 * soft)
    return panes


def mirrored(facing: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """What a gloss surface shows of the window: a bright cross-barred square, and a faint edge; a map."""
    bounced = directions - 2 * (directions * facing).sum(-1, keepdims=True) * facing
    side = np.cross(LIGHT, [0.0, 1.0, 0.0])
    side /= np.linalg.norm(side)
    up = np.cross(side, LIGHT)
    x, y, ahead = bounced @ side, bounced @ up, bounced @ LIGHT
    square = step(np.maximum(np.abs(x), np.abs(y)), 0.34, 0.26) * step(np.minimum(np.abs(x), np.abs(y)), 0.02, 0.06)
    edge = (1 + (directions * facing).sum(-1)).clip(0, 1) ** 4
    return np.where(ahead > 0, square, 0) * 0.9 + 0.25 * edge


def normals(at: np.ndarray) -> np.ndarray:
    """Of the things at places on their surface, [places 3]."""
    vectors = np.stack([nearest(at + 0.01 * axis)[0] - nearest(at - 0.01 * axis)[0] for axis in np.eye(3)], axis=-1)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-9)


def openness(at: np.ndarray, facing: np.ndarray) -> np.ndarray:
    """How much of the room a place sees: dark in corners and where things touch; 0 to 1."""
    dark = sum((reach - nearest(at + reach * facing)[0]).clip(0, reach) / reach * share for reach, share in (
        (0.12, 0.35), (0.35, 0.30), (0.8, 0.25)))  # fmt: skip
    return 1 - dark


def shade(at: np.ndarray, facing: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """Matt colour in the light of the window, of the sky and of what the table throws back, [places 3]."""
    lit = (facing @ LIGHT).clip(0)
    start = at + 0.02 * facing
    near = np.flatnonzero(lit > 0)
    shadow = np.zeros(len(at))
    shadow[near] = march(
        start[near], np.broadcast_to(LIGHT, (len(near), 3)), np.full(len(near), 0.02), np.full(len(near), 5.0), 24
    )[1]
    sun = (lit * shadow * (0.18 + 0.82 * window(at)))[:, None] * SUN
    sky = (0.65 - 0.35 * facing[:, :1]) * SKY + (0.5 - 0.5 * facing[:, 1:2]) * BOUNCE
    return colour * (sun + sky * openness(at, facing)[:, None])


def render(size: int) -> np.ndarray:
    """The scene in linear light, [size size 3]."""
    directions = rays(size)
    background, what = surroundings(directions)
    start = np.broadcast_to(EYE, directions.shape)
    first, last = ((z - EYE[2]) / directions[:, 2] for z in (NEAR, FAR))
    limit = np.minimum(background, last)
    travelled, _clear = march(start, directions, first, limit, 60)
    hit = travelled < limit
    travelled = np.where(hit, travelled, background)
    at = EYE + travelled[:, None] * directions
    facing = np.where((what == FLOOR)[:, None], [0.0, 1.0, 0.0], [0.0, 0.0, -1.0])
    facing[hit] = normals(at[hit])
    what = np.where(hit, 0, what)
    what[hit] = nearest(at[hit])[1]
    colour, gloss = np.empty_like(at), np.zeros(len(at))
    colour[what == FLOOR] = cloth(at[what == FLOOR])
    colour[what == BACK] = [0.52, 0.50, 0.43]
    for number, thing in enumerate(THINGS):
        colour[what == number] = thing.colour(at[what == number])
        gloss[what == number] = thing.gloss
    light = shade(at, facing, colour)
    light += (gloss * mirrored(facing, directions))[:, None] * SUN
    return light.reshape(size, size, 3)


def still_life() -> np.ndarray:
    """The picture, [SIZE, SIZE, 3] in 0..1."""
    light = render(SIZE)
    stains = cloudy_noise(np.random.default_rng(5), 6, 4)
    exposed = 1 - np.exp(-1.25 * light * (1 + 0.05 * stains[..., None]))
    return (exposed ** (1 / 2.2)).clip(0, 1)
