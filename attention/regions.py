"""Regions: which part of the picture takes its texture from which part of the reference.

Two label images say so with colours. Colours are labels: flat areas whose colours lie within `TOLERANCE` of each other
are one label, in both images; pixels between areas (edges, JPEG noise) join the label of the nearest colour.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

TOLERANCE = 32  # of 255, in the channel that differs most
MIN_PIXELS = 16  # a flat area smaller than this is noise
MOST_LABELS = 32  # more colours than anybody paints; a photo has 40 to 110


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


@dataclass(frozen=True)
class _Colours:
    """Distinct colours and how many pixels have each.

    Attributes:
        codes: colours as numbers, 0xRRGGBB, ascending, [colours], int32.
        counts: pixels of each, [colours].
    """

    codes: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, codes: np.ndarray) -> "_Colours":
        """Those of some pixels, of any shape."""
        return cls(*np.unique(codes, return_counts=True))

    @property
    def rgb(self) -> np.ndarray:
        """[colours 3], int16 with values in 0..255."""
        return np.stack([(self.codes >> shift & 255).astype(np.int16) for shift in (16, 8, 0)], axis=-1)

    def most_common_first(self) -> "_Colours":
        """In another order; of equally many pixels the smaller code comes first."""
        order = np.argsort(-self.counts, kind="stable")
        return _Colours(self.codes[order], self.counts[order])

    def pixels_nearest_to(self, centres: np.ndarray) -> np.ndarray:
        """How many pixels each centre is the nearest of, [centres]."""
        return np.bincount(_nearest(self.rgb, centres), weights=self.counts, minlength=len(centres)).astype(np.int64)


def read_regions(reference_image: torch.Tensor, target_image: torch.Tensor) -> Regions:
    """Turn two colour images into label maps.

    All work is done on distinct colours, so that a photo plugged in by mistake is found out at once.

    Args:
        reference_image, target_image: [n H W 3] with values in 0..1, of any sizes.

    Raises:
        ValueError: an image without a flat area or with too many colours, or a colour of the target that the reference
            lacks.
    """
    images = {"reference_labels": _to_bytes(reference_image), "target_labels": _to_bytes(target_image)}
    codes = {name: _to_codes(image) for name, image in images.items()}
    flat = {name: _Colours.of(codes[name][:, 1:-1, 1:-1][_is_flat(image)]) for name, image in images.items()}
    for name, colours in flat.items():
        if colours.counts.sum() < MIN_PIXELS:
            raise ValueError(
                f"{name}: no flat coloured area found; paint each region in one colour, 6x6 pixels or more"
            )
    centres = _cluster(flat)
    used = {name: colours.pixels_nearest_to(centres) for name, colours in flat.items()}
    for centre, wanted, offered in zip(centres, used["target_labels"], used["reference_labels"], strict=True):
        if wanted >= MIN_PIXELS and offered == 0:
            raise ValueError(
                f"target_labels: the colour {_name(centre)} does not occur in reference_labels; use its colours: "
                + ", ".join(_name(c) for c, n in zip(centres, used["reference_labels"], strict=True) if n)
            )
    shared = centres[used["reference_labels"] > 0]
    return Regions(*(_labels(of_image, shared) for of_image in codes.values()), len(shared))


def _to_bytes(image: torch.Tensor) -> np.ndarray:
    return image.float().clamp(0, 1).mul_(255).round_().to(torch.uint8).cpu().numpy()


def _to_codes(image: np.ndarray) -> np.ndarray:
    """Bytes [n H W 3] as 0xRRGGBB, [n H W], int32."""
    codes = image[..., 0].astype(np.int32)
    for channel in (1, 2):
        codes <<= 8
        codes |= image[..., channel]
    return codes


def _is_flat(image: np.ndarray) -> np.ndarray:
    """Whether the 3x3 pixels around a pixel are of one colour within the tolerance, [n H-2 W-2], bool."""
    if min(image.shape[1:3]) < 3:
        return np.zeros((image.shape[0], max(image.shape[1] - 2, 0), max(image.shape[2] - 2, 0)), dtype=bool)
    return (_of_3x3(np.maximum, image) - _of_3x3(np.minimum, image)).max(axis=-1) <= TOLERANCE


def _of_3x3(extreme: np.ufunc, image: np.ndarray) -> np.ndarray:
    """The largest or smallest byte of each channel around each pixel, [n H-2 W-2 3]."""
    rows = extreme(extreme(image[:, :-2], image[:, 1:-1]), image[:, 2:])
    return extreme(extreme(rows[:, :, :-2], rows[:, :, 1:-1]), rows[:, :, 2:])


def _cluster(flat: Mapping[str, _Colours]) -> np.ndarray:
    """Label colours, most common first: a colour within the tolerance of a more common one joins it. [labels 3].

    Raises:
        ValueError: there are more than an image painted by hand has; names the image with the most colours.
    """
    codes, place = np.unique(np.concatenate([of_image.codes for of_image in flat.values()]), return_inverse=True)
    counts = np.bincount(place.reshape(-1), weights=np.concatenate([of_image.counts for of_image in flat.values()]))
    colours = _Colours(codes, counts)
    ordered = colours.most_common_first()
    left, pixels = ordered.rgb, ordered.counts
    centres: list[np.ndarray] = []
    labels = 0
    while len(left):
        centres.append(left[0])
        joins = np.abs(left - left[0]).max(axis=1) <= TOLERANCE
        labels += pixels[joins].sum() >= MIN_PIXELS
        if labels > MOST_LABELS:  # found out early: a photo has many more to come
            raise _too_many(flat)
        left, pixels = left[~joins], pixels[~joins]
    found = np.stack(centres)
    found = found[colours.pixels_nearest_to(found) >= MIN_PIXELS]
    if len(found) > MOST_LABELS:
        raise _too_many(flat)
    return found


def _too_many(flat: Mapping[str, _Colours]) -> ValueError:
    name = max(flat, key=lambda name: len(flat[name].codes))
    return ValueError(
        f"{name}: it has more than {MOST_LABELS} colours, as a photo has; paint each region in one flat colour, "
        f"{MOST_LABELS} regions at most"
    )


def _labels(codes: np.ndarray, centres: np.ndarray) -> torch.Tensor:
    """The label of each pixel, [n H W] -> [n H W], int64."""
    colours = _Colours.of(codes)
    of_code = np.zeros(1 << 24, dtype=np.uint8)  # a table, so that no pixel is looked for
    of_code[colours.codes] = _nearest(colours.rgb, centres)
    return torch.from_numpy(of_code[codes].astype(np.int64))


def _nearest(colours: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Index of the nearest centre of each colour, the first of equally near ones, [n 3] -> [n], int64."""
    nearest, best = np.zeros(len(colours), dtype=np.int64), np.full(len(colours), np.inf)
    for index, centre in enumerate(centres):
        distance = ((colours - centre).astype(np.int32) ** 2).sum(axis=-1)
        nearer = distance < best
        nearest[nearer], best[nearer] = index, distance[nearer]
    return nearest


def _name(colour: np.ndarray) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)
