"""A lake among hills, in watercolour and ink.

A wash is a shape and a pigment. Pigment gathers where the wash dries last, at its edge, and in the hollows of the
paper; it spreads in blooms. Washes lie over each other as filters do: each takes its share of the light away.
"""

from __future__ import annotations

import itertools

import numpy as np
from PIL import Image, ImageDraw

from .canvas import SIZE, blur, cloudy_noise, grid, lit, mix, smooth_noise, step

PAPER = np.array([0.985, 0.97, 0.935])
INK = np.array([0.16, 0.13, 0.14])
SKY, SUN, FAR, NEAR = (
    np.array(c) for c in ([0.38, 0.60, 0.84], [0.97, 0.72, 0.40], [0.52, 0.56, 0.74], [0.45, 0.55, 0.64])
)
MEADOW, FOREST, EARTH = (np.array(c) for c in ([0.66, 0.74, 0.36], [0.26, 0.44, 0.34], [0.72, 0.52, 0.34]))
ROOF, WALL = np.array([0.78, 0.34, 0.24]), np.array([0.93, 0.86, 0.74])
MARGIN = 22
"""Bare paper around the picture, in pixels."""
SHORE, BANK = 318.0, 404.0
"""Rows where the lake begins and ends."""
FIRS = ((66, 424, 158), (100, 432, 112), (38, 436, 92), (452, 440, 132), (482, 446, 90))
"""Column, row of the foot and height."""
LEFT, RIGHT, TOP, EAVES, FOOT, CORNER = 262, 346, 354, 384, 424, 314
"""The sides, the roof and the foot of the cottage, and its corner."""


def watercolour() -> np.ndarray:
    """The picture, [SIZE, SIZE, 3] in 0..1."""
    sheet = Sheet(np.random.default_rng(4))
    sky(sheet)
    mountains(sheet)
    meadow(sheet)
    firs(sheet)
    cottage(sheet)
    return sheet.dried()


class Sheet:
    """The paper, how much light has come through the washes so far, and the ink."""

    def __init__(self, generator: np.random.Generator) -> None:
        self.generator = generator
        grain = blur(generator.normal(size=(SIZE, SIZE)), 1.1)
        self.grain = grain / grain.std() + 0.6 * cloudy_noise(generator, 90, 2)
        self.rows, self.columns = (
            axis + 3.0 * smooth_noise(generator, 20) + 1.2 * smooth_noise(generator, 90) for axis in grid()
        )
        inset = [np.minimum(axis, SIZE - 1 - axis) for axis in (self.rows, self.columns)]
        self.frame = np.minimum(*inset) > MARGIN
        self.light = np.ones((SIZE, SIZE, 3))
        self.ink = Image.new("L", (2 * SIZE, 2 * SIZE))

    def noise(self, cells: int | tuple[int, int]) -> np.ndarray:
        """Smooth noise in -1..1."""
        return smooth_noise(self.generator, cells)

    def wash(self, shape: np.ndarray, pigment: np.ndarray, strength: np.ndarray | float) -> None:
        """Lay one wash. `shape`: where; `pigment`: its colour on white; `strength`: 1 for that colour."""
        inside = blur((shape * self.frame).astype(float), 0.7)
        strength = np.clip(strength, 0, 2)
        rim = np.clip(inside - blur(inside, 3.0), 0, 1) + 0.35 * np.clip(inside - blur(inside, 14), 0, 1)
        blooms = 0.28 * cloudy_noise(self.generator, 5, 4)
        load = inside * strength * np.clip(0.80 + blooms + 0.085 * self.grain, 0.1, 2)
        load += 0.75 * rim * np.clip(strength, 0.25, 1)
        self.light *= pigment ** load[..., None]

    def line(self, *points: tuple[float, float]) -> None:
        """Ink through points (column, row), by a hand that is not quite steady."""
        draw = ImageDraw.Draw(self.ink)
        for start, end in itertools.pairwise(points):
            parts = max(1, int(np.hypot(end[0] - start[0], end[1] - start[1]) / 6))
            path = np.linspace(start, end, parts + 1) + self.generator.normal(0, 0.5, (parts + 1, 2))
            for one, other in itertools.pairwise(path):
                draw.line([*(2 * one), *(2 * other)], fill=255, width=int(self.generator.integers(2, 5)))

    def dried(self) -> np.ndarray:
        """The picture: the light of the lamp on the paper's relief, through all washes, and the ink."""
        shade, _ = lit(0.10 * self.grain, ambient=0.5)
        painted = PAPER * self.light
        ink = np.asarray(self.ink.resize((SIZE, SIZE), Image.Resampling.BOX), float) / 255
        painted = mix(painted, INK, 0.9 * ink * np.clip(0.9 + 0.2 * self.grain, 0.3, 1))
        return (painted * (0.15 + 0.85 * shade / shade.mean())[..., None]).clip(0, 1)


def sky(sheet: Sheet) -> None:
    """Blue between clouds, the glow of a low sun, birds."""
    clouds = step(cloudy_noise(sheet.generator, 4, 3), 0.05, 0.55)
    above = sheet.rows < SHORE
    sheet.wash(above, SKY, (1.05 - sheet.rows / 330) * (1 - 0.85 * clouds))
    glow = np.exp(-(((sheet.columns - 350) / 170) ** 2) - ((sheet.rows - 235) / 75) ** 2)
    sheet.wash(above, SUN, 0.8 * glow)
    for column, row, wing in ((258, 92, 9), (284, 80, 7), (300, 101, 6)):
        sheet.line((column - wing, row - 3), (column - wing / 2, row - 5), (column, row))
        sheet.line((column, row), (column + wing / 2, row - 6), (column + wing, row - 4))


def mountains(sheet: Sheet) -> None:
    """Two ridges, mist at their feet, and the lake with the nearer one in it."""
    far, near = ridge(sheet, 214, 34, 3), ridge(sheet, 268, 27, 4)
    places = np.clip(sheet.columns, 0, SIZE - 1).astype(int)
    for line, pigment, mist in ((far, FAR, 170), (near, NEAR, 75)):
        below = sheet.rows - line[places]
        sheet.wash((below > 0) * (sheet.rows < SHORE), pigment, 1.05 - below / mist)
        for start in range(MARGIN + 4, SIZE - MARGIN - 30, 34):
            columns = range(start, start + int(sheet.generator.integers(14, 34)), 5)
            sheet.line(*((column, line[column] + 1) for column in columns))
    ripples = step(sheet.noise((80, 8)), 0.2, 0.7)
    water = (sheet.rows > SHORE + 3) * (sheet.rows < BANK + 22)
    sheet.wash(water, SKY, 0.62 - 0.5 * ripples)
    mirrored = sheet.rows < 2 * SHORE - (0.62 * near[places] + 0.38 * SHORE) + 6 * sheet.noise((60, 6))
    sheet.wash(water * mirrored, NEAR, 0.75 - 0.6 * ripples)


def ridge(sheet: Sheet, row: float, height: float, hills: int) -> np.ndarray:
    """The row of a mountain ridge at each column, [SIZE]."""
    places = np.linspace(0, 2 * np.pi, SIZE)
    line = sum(np.sin(places * hills * k + sheet.generator.uniform(0, 6)) / k for k in (1, 2, 5))
    return row - height * (line + 0.5 * np.abs(sheet.noise(18)[0]))


def meadow(sheet: Sheet) -> None:
    """The bank on this side, and grass."""
    columns = sheet.columns
    bank = BANK + 14 * np.sin(columns / 70 + 1) + 5 * np.sin(columns / 23)
    sheet.wash(sheet.rows > bank, MEADOW, 0.85 + 0.4 * sheet.noise(5))
    sheet.wash(sheet.rows > bank + 46 + 12 * np.sin(columns / 48), EARTH, 0.55 + 0.4 * sheet.noise(7))
    sheet.wash((sheet.rows > bank + 8) * (sheet.noise((70, 16)) > 0.3), FOREST, 0.3)
    for column, row in sheet.generator.uniform((MARGIN + 12, 446), (SIZE - MARGIN - 12, 478), (42, 2)):
        lean = sheet.generator.normal(0, 3)
        sheet.line((column, row), (column + lean, row - sheet.generator.uniform(5, 13)))


def firs(sheet: Sheet) -> None:
    """Firs on both sides: branches that get wider downwards, dark on the side away from the sun."""
    crowns, shades, trunks = np.zeros((3, SIZE, SIZE), bool)
    for column, foot, tall in FIRS:
        y, x = (foot - sheet.rows) / tall, sheet.columns - column
        wide = 0.22 * tall * np.clip(1 - y, 0, 1) * (0.58 + 0.42 * np.abs(np.sin(y * 15 + column)))
        crown = (np.abs(x) < wide) & (y > 0.06) & (y < 1)
        crowns, shades = crowns | crown, shades | (crown & (x < -0.1 * wide))
        trunks |= (np.abs(x) < 2.4) & (np.abs(y - 0.03) < 0.06)
        turns = np.linspace(0.92, 0.10, 13)
        sheet.line((column, foot - tall), *(
            (column + (-1) ** turn * 0.13 * tall * (1 - part), foot - tall * part) for turn, part in enumerate(turns)
        ))  # fmt: skip
    sheet.wash(crowns, FOREST, 0.80 + 0.5 * sheet.noise(16))
    sheet.wash(shades, FOREST, 0.45)
    sheet.wash(trunks, EARTH * 0.6, 1.0)


def cottage(sheet: Sheet) -> None:
    """A cottage by the lake, its outlines in ink."""
    x, y = sheet.columns, sheet.rows
    walls = (x > LEFT) & (x < RIGHT) & (y >= EAVES) & (y < FOOT)
    roof = (y < EAVES) & (y > TOP) & (x > LEFT - 8 + 0.75 * (EAVES - y)) & (x < RIGHT + 8 - 0.35 * (EAVES - y))
    kept_dry = blur((walls | roof).astype(float), 0.8)[..., None]
    sheet.light = sheet.light ** (1 - 0.75 * kept_dry)
    sheet.wash(walls, WALL, 0.9)
    sheet.wash(walls & (x < CORNER), FAR, 0.5)
    sheet.wash(roof, ROOF, 1.0 + 0.3 * sheet.noise(40))
    windows = (np.abs(y - 402) < 8) & ((np.abs(x - LEFT - 26) < 7) | (np.abs(x - CORNER - 16) < 6))
    sheet.wash(windows, NEAR * 0.7, 1.1)
    for middle, half in ((LEFT + 26, 7), (CORNER + 16, 6)):
        left, right = middle - half, middle + half
        sheet.line((left, 394), (right, 394), (right, 410), (left, 410), (left, 394))
        sheet.line((middle, 394), (middle, 410))
    sheet.line((LEFT, EAVES), (LEFT, FOOT), (RIGHT, FOOT), (RIGHT, EAVES))
    sheet.line((CORNER, EAVES), (CORNER, FOOT))
    sheet.line((LEFT - 8, EAVES), (RIGHT + 8, EAVES), (RIGHT - 2, TOP), (LEFT + 15, TOP), (LEFT - 8, EAVES))
