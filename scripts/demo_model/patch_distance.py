"""How close is a picture's texture to a reference's: bidirectional similarity of patches.

After Simakov et al., "Summarizing visual data using bidirectional similarity", CVPR 2008. 0 is a copy, a
flat picture of the reference's mean colour has about 1.2, noise 2.8 to 5. A reference that is compared with
a decoded picture should first pass the same VAE's encode and decode, so that the VAE's own blur is not
counted.

Beside it: whether the layout is copied, and how sharp the picture is. A copy has distance 0 as well, so all are needed.

    python patch_distance.py RESULT REFERENCE
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

SIZE, PATCH, STRIDE, SCALES = 128, 7, 2, 3
COARSE, LARGEST_SHIFT = 16, 2
"""Size at which layouts are compared, and how far they are shifted."""
CHUNK = 1024
"""Patches compared with all others at a time."""


class Closeness(NamedTuple):
    """How a result compares with its reference.

    Attributes:
        coherence: how unlike the reference the result's patches are, 0 for a copy.
        completeness: how much of the reference the result lacks, 0 for a copy.
        copy_score: how much the result repeats the reference's layout: 1 is the same, a new texture has 0.1 to 0.4. A
            small patch distance with more than 0.5 is a copy, not a texture.
        sharpness: the result's fine contrast over the reference's.
    """

    coherence: float
    completeness: float
    copy_score: float
    sharpness: float

    @property
    def patch_distance(self) -> float:
        """Coherence + completeness."""
        return self.coherence + self.completeness


def compare(result: np.ndarray, reference: np.ndarray, original: np.ndarray | None = None) -> Closeness:
    """All measures of a result. Pictures are [H, W, 3] with values in 0..1.

    Args:
        result: the picture.
        reference: after the VAE's encode and decode.
        original: the reference as it was before, for the sharpness; None takes `reference`.
    """
    coherence, completeness = similarity(result, reference)
    original = reference if original is None else original
    return Closeness(coherence, completeness, copy_score(result, reference), sharpness(result, original))


def patch_distance(result: np.ndarray, reference: np.ndarray) -> float:
    """Coherence + completeness, averaged over full, half and quarter size.

    Both are [H, W, 3] with values in 0..1.
    """
    return sum(similarity(result, reference))


def similarity(result: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """Coherence and completeness, each averaged over full, half and quarter size."""
    pictures = [prepare(result), prepare(reference)]
    distances = []
    for _ in range(SCALES):
        ours, theirs = (patches(picture) for picture in pictures)
        variance = (theirs - theirs.mean(0)).square().sum(1).mean()
        if variance == 0:
            raise ValueError("The reference has one colour only: there is no texture to compare with.")
        distances.append(torch.stack([nearest(ours, theirs), nearest(theirs, ours)]) / variance)
        pictures = [F.avg_pool2d(picture, 2) for picture in pictures]
    coherence, completeness = torch.stack(distances).mean(0).tolist()
    return coherence, completeness


def copy_score(result: np.ndarray, reference: np.ndarray) -> float:
    """The largest correlation of both pictures at 16x16 over all shifts of up to 2 cells, at most 1."""
    ours, theirs = (F.adaptive_avg_pool2d(prepare(picture), COARSE)[0] for picture in (result, reference))
    shifts = range(-LARGEST_SHIFT, LARGEST_SHIFT + 1)
    return max(correlation(overlap(ours, y, x), overlap(theirs, -y, -x)) for y in shifts for x in shifts)


def overlap(picture: Tensor, down: int, right: int) -> Tensor:
    """[3, h, w] without as many rows and columns at the top and left; where negative, at the bottom and right."""
    by = zip((down, right), picture.shape[1:], strict=True)
    rows, columns = (slice(max(0, shift), size + min(0, shift)) for shift, size in by)
    return picture[:, rows, columns]


def correlation(a: Tensor, b: Tensor) -> float:
    """Of two pictures [3, h, w] after each channel's mean is taken away; 0 where one has no contrast."""
    a, b = (picture - picture.mean((1, 2), keepdim=True) for picture in (a, b))
    return float((a * b).sum() / (a.norm() * b.norm()).clamp(min=1e-12))


def sharpness(result: np.ndarray, reference: np.ndarray) -> float:
    """The mean absolute Laplacian of the result at 128 pixels over the reference's."""
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]], dtype=torch.float64).expand(3, 1, 3, 3)
    ours, theirs = (F.conv2d(prepare(picture), kernel, groups=3).abs().mean() for picture in (result, reference))
    if theirs == 0:
        raise ValueError("The reference has one colour only: there is no sharpness to compare with.")
    return float(ours / theirs)


def prepare(picture: np.ndarray) -> Tensor:
    """The middle square, 128x128 pixels (Lanczos), as [1, 3, 128, 128]."""
    if picture.ndim != 3 or picture.shape[2] != 3:
        raise ValueError(f"A picture has the shape {picture.shape}; it must be [height, width, 3].")
    height, width, _ = picture.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = picture[top : top + side, left : left + side].astype(np.float32)
    planes = [Image.fromarray(np.ascontiguousarray(square[:, :, channel])) for channel in range(3)]
    resized = [np.asarray(plane.resize((SIZE, SIZE), Image.Resampling.LANCZOS)) for plane in planes]
    return torch.from_numpy(np.stack(resized)).double().clamp(0, 1)[None]


def patches(picture: Tensor) -> Tensor:
    """All 7x7 patches at stride 2, one a row."""
    return F.unfold(picture, PATCH, stride=STRIDE)[0].T.contiguous()


def nearest(queries: Tensor, keys: Tensor) -> Tensor:
    """The mean squared distance of the queries, each to the key that is closest to it."""
    least = [torch.cdist(chunk, keys, compute_mode="donot_use_mm_for_euclid_dist").amin(1).square()
             for chunk in queries.split(CHUNK)]  # fmt: skip
    return torch.cat(least).mean()


def flat_picture(reference: np.ndarray) -> np.ndarray:
    """A picture of the reference's mean colour."""
    return np.broadcast_to(reference.mean((0, 1)), reference.shape)


def read_picture(file: str) -> np.ndarray:
    """A picture file as [H, W, 3] in 0..1."""
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"), dtype=np.float32) / 255


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Print how close a picture is to a reference.")
    parser.add_argument("result")
    parser.add_argument("reference")
    options = parser.parse_args()
    found = compare(read_picture(options.result), read_picture(options.reference))
    print(f"patch distance {found.patch_distance:.3f}")
    for name, value in found._asdict().items():
        print(f"  {name.replace('_', ' '):13}{value:.3f}")


if __name__ == "__main__":
    main()
