"""Example pictures by formula, so that a first run needs no file: textures, painted styles, a scene, label maps.

Each is a function without inputs that gives [SIZE, SIZE, 3] in 0..1, always the same one.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .brush_strokes import brush_strokes
from .canvas import SIZE
from .labels import disc, halves
from .pebbles import pebbles
from .scales import scales
from .still_life import still_life
from .watercolour import watercolour
from .weave import weave
from .wood import wood

__all__ = ["PICTURES", "SIZE"]


def two() -> np.ndarray:
    """Two textures: the left half of `scales`, the right half of `pebbles`."""
    return np.where(halves() > 0, scales(), pebbles())


PICTURES: dict[str, Callable[[], np.ndarray]] = {
    "texture: scales": scales,
    "texture: pebbles": pebbles,
    "texture: wood": wood,
    "texture: weave": weave,
    "texture: two": two,
    "style: brush strokes": brush_strokes,
    "style: watercolour": watercolour,
    "scene: still life": still_life,
    "labels: halves": halves,
    "labels: disc": disc,
}
"""By the names that saved workflows hold."""
