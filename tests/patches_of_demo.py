"""What the demo model matches, read plainly from a picture: patches of a pyramid, and their slow waves."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

TAPS, WAVES = 75, 39
"""Values of a patch, and how many of its cosine waves are matched."""


def pyramid_taps(image: Tensor, level: int) -> Tensor:
    """The 5x5 taps of pyramid level `level - 1` at half its size, [1, 75, h, w]: a plain reading."""
    kernel = torch.tensor([1.0, 2.0, 1.0])
    kernel = (kernel[:, None] * kernel / 16)[None, None]

    def low_pass(image: Tensor, stride: int) -> Tensor:
        planes = F.conv2d(image.transpose(0, 1), kernel, stride=stride, padding=1)
        return planes.transpose(0, 1)

    if level > 1:
        image = low_pass(image, 1)
        for _ in range(level - 1):
            image = low_pass(image, 2)
    half = (image.shape[2] // 2, image.shape[3] // 2)
    taps = F.unfold(image, 5, padding=2, stride=2).unflatten(2, half)
    return taps.unflatten(1, (3, 25)).transpose(1, 2).flatten(1, 2)


def slow_waves(u: Tensor) -> Tensor:
    """The slow waves of the cosine transform of patches, [tokens, 75] to [tokens, 39]: another plain reading."""
    y, x = torch.meshgrid(torch.arange(5), torch.arange(5), indexing="ij")
    found = []
    for _, _, v, w in sorted((v + w, max(v, w), v, w) for v in range(5) for w in range(5))[:13]:
        pattern = torch.cos(torch.pi * v * (2 * y + 1) / 10) * torch.cos(torch.pi * w * (2 * x + 1) / 10)
        found.append(torch.einsum("tyxc,yx->tc", u.unflatten(1, (5, 5, 3)), pattern / pattern.norm()))
    return torch.cat(found, 1)
