"""Colour charts: a colour for every place of a reference, and for each of several references others."""

import colorsys
from collections.abc import Sequence

import torch

ALONE = ((1.0, 0.25, 0.2), (1.0, 0.9, 0.1), (0.35, 0.25, 1.0), (0.1, 0.85, 0.55))
"""Of one reference, the corners: red and yellow above, blue and green below."""
PALE = 0.25
"""Saturation of the lower corners where there are several."""

Corners = Sequence[Sequence[float]]


def corners(number: int, count: int) -> Corners:
    """The colours of a chart's corners: top left, top right, bottom left, bottom right, each red, green, blue in 0..1.

    One chart alone has four hues. Of several, each has hues of its own: they change from left to right, and grow pale
    downwards.
    """
    if count == 1:
        return ALONE
    left, right = ((number + shift) / count for shift in (-0.25, 0.25))
    return [colorsys.hsv_to_rgb(hue % 1, saturation, 1.0) for saturation in (1.0, PALE) for hue in (left, right)]


def chart(number: int, count: int, height: int, width: int) -> torch.Tensor:
    """One of `count` charts, the colours mixed from those of the corners, [height, width, 3] in 0..1."""
    y, x = ((torch.arange(n) + 0.5) / n for n in (height, width))
    above, below = torch.tensor(corners(number, count)).unflatten(0, (2, 2))
    rows = torch.lerp(above, below, y[:, None, None])  # [height, 2, 3]
    return torch.lerp(rows[:, :1], rows[:, 1:], x[:, None])
