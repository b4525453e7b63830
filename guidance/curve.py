"""A small plot of a run's losses: did it get closer to the references?

Each step has a noise level of its own, and losses of two levels cannot be compared. So a step is drawn as what its
iterations made of it: from where the loss stood before them (thin) to where it came (thick). Where the thick line lies
below the thin one, all is well, whichever way both go. A step of one iteration has one loss alone.
"""

import math
from collections.abc import Sequence
from itertools import groupby
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from .descent import Iteration

WIDTH, HEIGHT, FINER = 512, 320, 2  # drawn larger, for smooth lines
LEFT, RIGHT, TOP, BOTTOM, LINE = 16, 16, 16, 46, 34
TEXT = 26  # of the picture's pixels; nodes show it at about half its size
BACKGROUND, FAINT, PLAIN = (30, 31, 36), (70, 72, 80), (190, 192, 198)
COLOURS = {"style": (255, 166, 64), "content": (96, 176, 255)}
LEAST = 1e-4  # of the largest loss; below, a loss is drawn as nothing


class Fall(NamedTuple):
    """One loss in each step of a run, before its iterations and before the last of them."""

    first: list[float]
    last: list[float]

    @property
    def within_steps(self) -> bool:
        """Whether steps have more than one iteration."""
        return self.first != self.last

    @property
    def change(self) -> float:
        """By what share the loss changes within a step: the median, below 0 where it falls."""
        return median(b / a - 1 for a, b in zip(self.first, self.last, strict=True) if a > 0)

    def __str__(self) -> str:
        """In few words: within steps, where it can be told, else from the first step to the last."""
        if self.within_steps:
            return f"{100 * self.change:+.0f} % in each step"
        return f"{self.first[0]:.3g} to {self.first[-1]:.3g}"


def falls(iterations: Sequence[Iteration]) -> dict[str, Fall]:
    """Style and content loss by step, both as they count in the total; content only where there is any."""
    steps = [list(of_step) for _, of_step in groupby(iterations, key=lambda one: one.step)]
    ends = [(of_step[0], of_step[-1]) for of_step in steps]
    found = {"style": Fall([a.style for a, _ in ends], [b.style for _, b in ends])}
    if any(one.content > 0 for one in iterations):
        found["content"] = Fall([a.total - a.style for a, _ in ends], [b.total - b.style for _, b in ends])
    return found


def draw_losses(iterations: Sequence[Iteration]) -> torch.Tensor:
    """The plot, [HEIGHT WIDTH 3] in 0..1.

    Args:
        iterations: of a run, at least one, in their order.
    """
    found = falls(iterations)
    image = Image.new("RGB", (FINER * WIDTH, FINER * HEIGHT), BACKGROUND)
    draw, axes = ImageDraw.Draw(image), _Axes.of(list(found.values()))
    font = ImageFont.load_default(FINER * TEXT)
    draw.rectangle([FINER * n for n in (LEFT, axes.top, WIDTH - RIGHT, HEIGHT - BOTTOM)], outline=FAINT, width=FINER)
    for number, (name, fall) in enumerate(found.items()):
        _draw_fall(draw, axes, fall, COLOURS[name])
        draw.text((FINER * LEFT, FINER * (12 + LINE * number)), f"{name}  {fall}", COLOURS[name], font, "lt")
    for text, place, anchor in (
        (f"step 1 to {axes.count}", (WIDTH / 2, HEIGHT - 10), "ms"),
        (f"{axes.high:.2g}", (LEFT + 6, axes.top + 6), "lt"),
        (f"{axes.low:.2g}", (LEFT + 6, HEIGHT - BOTTOM - 6), "lb"),
    ):
        draw.text([FINER * n for n in place], text, PLAIN, font, anchor)
    small = image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(small).astype(np.float32) / 255)


class _Axes(NamedTuple):
    """Steps from left to right, losses upwards by their logarithm: equal shares are equally high everywhere."""

    count: int
    top: int
    low: float
    high: float

    @classmethod
    def of(cls, found: Sequence[Fall]) -> "_Axes":
        """Room for all losses, below a line of text for each."""
        every = [value for fall in found for value in (*fall.first, *fall.last)]
        high = max(*every, 1e-30)
        low = min(value for value in (*every, high) if value >= LEAST * high)
        return cls(len(found[0].first), TOP + LINE * len(found), low / 1.1, high * 1.1)

    def points(self, values: Sequence[float]) -> list[tuple[float, float]]:
        """Where values of the steps lie on the drawing; a single one is a line through its step."""
        span = math.log(self.high / self.low)
        values = list(values) * 2 if self.count == 1 else values
        return [
            (
                FINER * (LEFT + (WIDTH - LEFT - RIGHT) * step / (len(values) - 1)),
                FINER * (self.top + (HEIGHT - self.top - BOTTOM) * math.log(self.high / max(value, self.low)) / span),
            )
            for step, value in enumerate(values)
        ]


def _draw_fall(draw: ImageDraw.ImageDraw, axes: _Axes, fall: Fall, colour: tuple[int, int, int]) -> None:
    first, last = axes.points(fall.first), axes.points(fall.last)
    if fall.within_steps:
        between = tuple((2 * back + own) // 3 for back, own in zip(BACKGROUND, colour, strict=True))
        draw.polygon([*first, *reversed(last)], fill=between)
        draw.line(first, colour, FINER, joint="curve")
    draw.line(last, colour, 4 * FINER, joint="curve")
