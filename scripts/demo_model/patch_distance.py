"""How close is a picture's texture to a reference's: bidirectional similarity of patches.

After Simakov et al., "Summarizing visual data using bidirectional similarity", CVPR 2008. 0 is a copy, a
flat picture of the reference's mean colour has about 1.2, noise 2.8 to 5. A reference that is compared with
a decoded picture should first pass the same VAE's encode and decode, so that the VAE's own blur is not
counted.

    python patch_distance.py RESULT REFERENCE
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

SIZE, PATCH, STRIDE, SCALES = 128, 7, 2, 3
CHUNK = 1024
"""Patches compared with all others at a time."""


def patch_distance(result: np.ndarray, reference: np.ndarray) -> float:
    """Coherence + completeness, averaged over full, half and quarter size.

    Both are [H, W, 3] with values in 0..1.
    """
    pictures = [prepare(result), prepare(reference)]
    distances = []
    for _ in range(SCALES):
        ours, theirs = (patches(picture) for picture in pictures)
        variance = (theirs - theirs.mean(0)).square().sum(1).mean()
        if variance == 0:
            raise ValueError("The reference has one colour only: there is no texture to compare with.")
        coherence, completeness = nearest(ours, theirs), nearest(theirs, ours)
        distances.append((coherence + completeness) / variance)
        pictures = [F.avg_pool2d(picture, 2) for picture in pictures]
    return float(torch.stack(distances).mean())


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
    parser = argparse.ArgumentParser(description="Print the patch distance of a picture to a reference.")
    parser.add_argument("result")
    parser.add_argument("reference")
    options = parser.parse_args()
    print(f"{patch_distance(read_picture(options.result), read_picture(options.reference)):.3f}")


if __name__ == "__main__":
    main()
