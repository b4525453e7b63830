"""The patch distance of EVALUATION.md: known values, and a plain reading on a small case."""

from __future__ import annotations

import numpy as np
import pytest
from demo_model.patch_distance import compare, copy_score, flat_picture, patch_distance, sharpness, similarity
from demo_model.sample_reference import sample_reference


@pytest.fixture(scope="module")
def scales() -> np.ndarray:
    """The sample reference, a texture with clear patches."""
    return sample_reference()


def stripes(period: int, size: int = 128) -> np.ndarray:
    """Vertical stripes of a cosine, [size, size, 3]."""
    wave = 0.5 + 0.4 * np.cos(2 * np.pi * np.arange(size) / period)
    return np.broadcast_to(wave[None, :, None], (size, size, 3)).copy()


def test_copy_is_zero(scales: np.ndarray) -> None:
    assert patch_distance(scales, scales) == 0


def test_shifted_texture_is_near_zero() -> None:
    """Whole periods change nothing; nor does half a period, a whole number of strides at every scale."""
    picture = stripes(16)
    assert patch_distance(np.roll(picture, 16, axis=1), picture) < 1e-9
    assert patch_distance(np.roll(picture, 8, axis=1), picture) < 1e-9
    assert patch_distance(np.roll(picture, 2, axis=1), picture) > 0.1


def test_flat_picture(scales: np.ndarray) -> None:
    """Completeness is close to 1 by the definition of variance; coherence adds about a quarter."""
    assert patch_distance(flat_picture(scales), scales) == pytest.approx(1.2, abs=0.15)


@pytest.mark.parametrize("seed", [0, 1])
def test_noise(scales: np.ndarray, seed: int) -> None:
    """Coarse noise, as a VAE decodes it: one colour for each 8x8 pixels."""
    noise = np.random.default_rng(seed).uniform(0, 1, (64, 64, 3)).repeat(8, 0).repeat(8, 1)
    assert 2.4 < patch_distance(noise, scales) < 5


def test_lost_colours_are_counted_by_completeness(scales: np.ndarray) -> None:
    """A picture made of one corner is coherent, but incomplete; the measure sees both directions."""
    corner = scales[:256, :256].repeat(2, 0).repeat(2, 1)
    assert patch_distance(corner, scales) > 0.2
    half = scales.copy()
    half[:, 256:] = half[:, :256]
    assert 0.03 < patch_distance(half, scales) < 0.4


def test_plain_reading() -> None:
    """The definition, word by word, with loops, at 128x128."""
    generator = np.random.default_rng(3)
    result, reference = generator.uniform(0, 1, (2, 128, 128, 3)).astype(np.float32)

    def patches(picture: np.ndarray) -> np.ndarray:
        last = len(picture) - 7
        return np.array([picture[y : y + 7, x : x + 7].ravel() for y in range(0, last + 1, 2)
                         for x in range(0, last + 1, 2)])  # fmt: skip

    def least(ours: np.ndarray, theirs: np.ndarray) -> float:
        return float(np.mean([((theirs - patch) ** 2).sum(1).min() for patch in ours]))

    coherence = completeness = 0.0
    for _ in range(3):
        ours, theirs = patches(result), patches(reference)
        variance = ((theirs - theirs.mean(0)) ** 2).sum(1).mean()
        coherence += least(ours, theirs) / variance / 3
        completeness += least(theirs, ours) / variance / 3
        shape = (len(result) // 2, 2, len(result) // 2, 2, 3)
        result, reference = (p.reshape(shape).mean((1, 3)) for p in (result, reference))
    generator = np.random.default_rng(3)
    result, reference = generator.uniform(0, 1, (2, 128, 128, 3)).astype(np.float32)
    assert similarity(result, reference) == pytest.approx((coherence, completeness), rel=1e-4)


def test_the_measures_are_told_apart(scales: np.ndarray) -> None:
    """A copy, the same texture in another layout, a part of it only, and the texture out of focus."""
    copy = compare(scales, scales)
    assert copy == pytest.approx((0, 0, 1, 1), abs=1e-6)
    turned = compare(np.roll(scales, (256, 256), axis=(0, 1)), scales)
    assert turned.coherence < 0.25 and turned.copy_score < 0.4 and turned.sharpness == pytest.approx(1, abs=0.05)
    corner = compare(scales[:256, :256].repeat(2, 0).repeat(2, 1), scales)
    assert corner.completeness > 0.1 and corner.sharpness < 0.7
    blurred = compare(scales, scales, original=2 * scales)
    assert blurred.patch_distance == 0 and blurred.sharpness < 0.8


def test_layout_is_found_when_shifted() -> None:
    """Cells of 8 pixels, moved by two cells and by five."""
    cells = np.random.default_rng(5).uniform(0, 1, (24, 24, 3))

    def cut(row: int, column: int) -> np.ndarray:
        return cells[row : row + 16, column : column + 16].repeat(8, 0).repeat(8, 1)

    assert copy_score(cut(2, 1), cut(0, 3)) == pytest.approx(1, abs=1e-6)
    assert copy_score(1 - cut(0, 0), cut(0, 0)) < 0.3
    assert copy_score(cut(5, 0), cut(0, 0)) < 0.3
    assert copy_score(flat_picture(cells), cells) == 0


def test_sharpness_is_the_ratio_of_contrast() -> None:
    """Fine stripes of half the contrast; a picture without any has none to compare with."""
    assert sharpness(0.25 + stripes(4) / 2, stripes(4)) == pytest.approx(0.5, rel=1e-5)
    with pytest.raises(ValueError, match="one colour"):
        sharpness(stripes(4), np.full((128, 128, 3), 0.5))


def test_centre_crop(scales: np.ndarray) -> None:
    """Only the middle square counts."""
    wide = np.concatenate([np.zeros((512, 100, 3)), scales, np.ones((512, 100, 3))], axis=1)
    assert patch_distance(wide, scales) == 0


def test_shape_is_checked() -> None:
    with pytest.raises(ValueError, match=r"\(4, 4\).*\[height, width, 3\]"):
        patch_distance(np.zeros((4, 4)), np.zeros((4, 4, 3)))


def test_one_colour_is_no_reference() -> None:
    with pytest.raises(ValueError, match="one colour"):
        patch_distance(np.zeros((128, 128, 3)), np.full((128, 128, 3), 0.5))
