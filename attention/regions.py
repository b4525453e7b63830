"""Regions: which part of the picture takes its texture from which part of the reference.

Two label images say so with colours. Colours are labels: flat areas whose colours lie within `TOLERANCE` of each other
are one label, in both images; pixels between areas (edges, JPEG noise) join the label of the nearest colour.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

TOLERANCE = 32  # of 255, in the channel that differs most
MIN_PIXELS = 16  # a flat area smaller than this is noise


@dataclass(frozen=True)
class Regions:
    """An AD_REGIONS: a pair of label maps with common numbers.

    Attributes:
        reference: one map for all reference pictures, or one for each in pooled order, [n H W], int64.
        target: one map for all pictures of the batch, or one for each, [b H W], int64; any size and aspect ratio.
        count: labels are 0 to count - 1.
    """

    reference: torch.Tensor
    target: torch.Tensor
    count: int


def read_regions(reference_image: torch.Tensor, target_image: torch.Tensor) -> Regions:
    """Turn two colour images into label maps.

    Args:
        reference_image, target_image: [n H W 3] with values in 0..1, of any sizes.

    Raises:
        ValueError: an image without a flat area, or a colour of the target that the reference lacks.
    """
    images = {"reference_labels": _to_bytes(reference_image), "target_labels": _to_bytes(target_image)}
    flat = {name: _flat_colours(image) for name, image in images.items()}
    for name, colours in flat.items():
        if len(colours) < MIN_PIXELS:
            raise ValueError(f"{name}: no flat coloured area found; paint each region in one colour")
    centres = _cluster(np.concatenate(list(flat.values())))
    used = {name: np.bincount(_nearest(colours, centres), minlength=len(centres)) for name, colours in flat.items()}
    for centre, wanted, offered in zip(centres, used["target_labels"], used["reference_labels"], strict=True):
        if wanted >= MIN_PIXELS and offered == 0:
            raise ValueError(
                f"target_labels: the colour {_name(centre)} does not occur in reference_labels; use its colours: "
                + ", ".join(_name(c) for c, n in zip(centres, used["reference_labels"], strict=True) if n)
            )
    shared = centres[used["reference_labels"] > 0]
    reference, target = (torch.from_numpy(_nearest(image, shared)) for image in images.values())
    return Regions(reference, target, len(shared))


def _to_bytes(image: torch.Tensor) -> np.ndarray:
    return (image[..., :3].float().clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()


def _flat_colours(image: np.ndarray) -> np.ndarray:
    """Colours of the pixels whose 3x3 neighbourhood is of one colour within the tolerance, [pixels 3], int."""
    pixels = torch.from_numpy(image).permute(0, 3, 1, 2).float()
    spread = F.max_pool2d(pixels, 3, stride=1) + F.max_pool2d(-pixels, 3, stride=1)
    flat = (spread.amax(dim=1) <= TOLERANCE).numpy()
    return image[:, 1:-1, 1:-1][flat].astype(np.int64)


def _cluster(colours: np.ndarray) -> np.ndarray:
    """Label colours, most common first: a colour within the tolerance of a more common one joins it. [labels 3]."""
    unique, counts = np.unique(colours, axis=0, return_counts=True)
    unique = unique[np.argsort(-counts, kind="stable")]
    centres: list[np.ndarray] = []
    while len(unique):
        centres.append(unique[0])
        unique = unique[np.abs(unique - unique[0]).max(axis=1) > TOLERANCE]
    centres_array = np.stack(centres)
    pixels = np.bincount(_nearest(colours, centres_array), minlength=len(centres_array))
    return centres_array[pixels >= MIN_PIXELS]


def _nearest(colours: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Index of the nearest centre of each colour, [... 3] -> [...], int64."""
    distance = np.stack([((colours.astype(np.int64) - centre) ** 2).sum(axis=-1) for centre in centres])
    return distance.argmin(axis=0)


def _name(colour: np.ndarray) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)
