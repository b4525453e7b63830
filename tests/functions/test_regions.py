"""Label images and what they do to the loss."""

import io as bytes_io
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image

RED, GREEN, BLUE, GREY = (255, 0, 0), (0, 200, 60), (30, 30, 250), (128, 128, 128)


@pytest.fixture(scope="module")
def regions(pack_module):
    return pack_module("attention.regions")


def painted(height, width, *bars):
    """Vertical bars of equal width, [1 H W 3] in 0..1."""
    image = torch.zeros(1, height, width, 3)
    for i, colour in enumerate(bars):
        image[:, :, i * width // len(bars) : (i + 1) * width // len(bars)] = torch.tensor(colour) / 255
    return image


def jpeg(image, quality=60):
    """The image after a trip through a JPEG file with subsampled colour."""
    data = bytes_io.BytesIO()
    Image.fromarray((image[0] * 255).byte().numpy()).save(data, "JPEG", quality=quality)
    return torch.from_numpy(np.array(Image.open(data))).float()[None] / 255


def test_colours_become_common_labels(regions):
    """Any sizes and aspect ratios; the target may leave a colour of the reference out."""
    made = regions.read_regions(painted(40, 90, RED, GREEN, BLUE), painted(64, 32, BLUE, RED))
    assert made.reference.shape == (1, 40, 90)
    assert made.target.shape == (1, 64, 32)
    assert made.count == 3
    left, middle, right = (made.reference[0, 0, x].item() for x in (0, 45, 89))
    assert len({left, middle, right}) == 3
    assert made.target[0, 5].tolist() == [right] * 16 + [left] * 16


def test_jpeg_noise_makes_no_new_label(regions):
    """Edges of a JPEG are full of colours in between."""
    reference, target = painted(96, 128, RED, GREEN, BLUE), painted(120, 80, GREEN, BLUE)
    clean = regions.read_regions(reference, target)
    noisy = regions.read_regions(jpeg(reference), jpeg(target))
    assert noisy.count == 3
    for before, after in ((clean.reference, noisy.reference), (clean.target, noisy.target)):
        pairs = {
            (a, b)
            for a, b in zip(before[:, :, 4:10].flatten().tolist(), after[:, :, 4:10].flatten().tolist(), strict=True)
        }
        assert len(pairs) == 1, "a flat area keeps one label"
        changed = torch.stack([before.flatten(), after.flatten()]).unique(dim=1, return_counts=True)[1]
        assert (
            changed.sort(descending=True).values[clean.count if before is clean.reference else 2 :].sum()
            < 0.03 * before.numel()
        )


def test_near_colours_merge_and_far_ones_do_not(regions):
    """The distance is the largest channel difference; 32 still merges."""
    near = tuple(c + 32 for c in GREY)
    assert regions.read_regions(painted(32, 64, GREY, near), painted(32, 64, GREY)).count == 1
    far = tuple(c + 33 for c in GREY)
    assert regions.read_regions(painted(32, 64, GREY, far), painted(32, 64, GREY)).count == 2


def test_a_colour_that_the_reference_lacks(regions):
    with pytest.raises(
        ValueError, match="target_labels: the colour #1e1efa does not occur in reference_labels; use its colours: #"
    ):
        regions.read_regions(painted(32, 64, RED, GREEN), painted(32, 64, RED, BLUE))


def test_an_image_without_flat_areas(regions):
    with pytest.raises(ValueError, match="reference_labels: no flat coloured area"):
        regions.read_regions(torch.rand(1, 32, 32, 3), painted(32, 32, RED))


def photo(size):
    """A formula's idea of a photo: smooth shades of many colours under a little noise, [1 size size 3] in 0..1."""
    y, x = torch.meshgrid(*[torch.linspace(0, 1, size)] * 2, indexing="ij")
    shades = torch.stack([(7 * x * (1 + c) + 5 * y * (3 - c)).sin() for c in range(3)], dim=-1) * 0.45 + 0.5
    noise = torch.rand(size, size, 3, generator=torch.Generator().manual_seed(0))
    return (shades + 0.04 * noise)[None].clamp(0, 1)


@pytest.mark.parametrize("by_mistake", ["reference_labels", "target_labels"])
def test_a_photo_by_mistake_is_refused_without_much_memory(regions, by_mistake):
    """numpy's memory: each pixel of this picture has a colour of its own, and may take 200 bytes."""
    size = 768
    images = dict.fromkeys(("reference_labels", "target_labels"), painted(64, 64, RED))
    tracemalloc.start()
    with pytest.raises(ValueError, match=f"{by_mistake}: it has more than 32 colours, as a photo has; paint each"):
        regions.read_regions(*{**images, by_mistake: photo(size)}.values())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200 * size**2


def test_as_many_labels_as_are_allowed(regions):
    """32 colours far enough apart pass, each with a label of its own; with one more they do not."""
    levels = (0, 60, 120, 180)
    colours = [(r, g, b) for r in levels for g in levels for b in (0, 120, 240)]
    made = regions.read_regions(painted(8, 320, *colours[:32]), painted(8, 40, *colours[5:9]))
    assert made.count == 32
    assert len(made.reference[0, 4].unique()) == 32
    assert made.target[0, 4, 5::10].tolist() == [made.reference[0, 4, i * 10 + 5].item() for i in range(5, 9)]
    with pytest.raises(ValueError, match="reference_labels: it has more than 32 colours"):
        regions.read_regions(painted(8, 330, *colours[:33]), painted(8, 40, *colours[5:9]))


def test_a_target_token_sees_only_its_own_label(pack_module):
    """Against attention with a mask, written out; labels of a batch may differ."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((2, 3, 5, 4), (1, 3, 7, 4), (1, 3, 7, 4))
    )
    labels = torch.tensor([[0, 1, 1, 0, 2], [2, 2, 0, 0, 0]])
    allowed = torch.tensor([[1, 1, 0, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1]]).bool()
    log_weight = torch.linspace(-1, 1, 7, dtype=torch.float64)
    losses = pack_module("losses.distillation")
    bank = pack_module("attention.bank").TokenBank(k, v, log_weight)
    groups = [
        losses.QueryGroup(slice(item, item + 1), (labels[item] == label).nonzero()[:, 0], label)
        for item in range(2)
        for label in range(3)
    ]
    offers = [bank.only(row.nonzero()[:, 0], {0: int(row.sum())}) for row in allowed]
    target = losses.region_target(q, groups, offers, attention_scale=1.3)
    logits = torch.einsum("bhid,xhjd->bhij", 1.3 * q, k) / 2 + log_weight
    logits = logits.masked_fill(~allowed[labels][:, None], -torch.inf)
    torch.testing.assert_close(target, torch.einsum("bhij,xhjd->bhid", logits.softmax(-1), v), rtol=0, atol=1e-12)


def test_small_labels_at_coarse_layers(pack_module, regions):
    """A label between the sampling points has the tokens it touches; masked away, all tokens; never none."""
    reference = pack_module("attention.reference")
    pool = pack_module("attention.bank").TokenPool
    features = pack_module("attention.capture").LayerFeatures(*[torch.arange(16.0).reshape(1, 1, 16, 1)] * 4, (4, 4))
    labels = torch.zeros(1, 32, 32, dtype=torch.long)
    labels[:, 11:13, 19:21] = 1  # nearest neighbour looks at rows 0, 8, 16, 24
    labels[:, 2, 2] = 2
    part = reference.ReferencePart(torch.zeros(1, 4, 4, 4), (0,))
    allowed = [
        of_label.k.flatten().tolist() for of_label in pool([part], [labels], 3).banks([{0: features}])[0].by_label
    ]
    assert allowed == [list(range(16)), [4 + 2], [0], list(range(16))]  # the last is for tokens beside the picture's
    mask = torch.zeros(1, 32, 32)
    mask[:, 16:] = 1
    masked = reference.ReferencePart(torch.zeros(1, 4, 4, 4), (0,), mask=mask)
    bank = pool([masked], [labels], 3).banks([{0: features}])[0]
    assert [of_label.k.flatten().tolist() for of_label in bank.by_label] == [list(range(8, 16))] * 4


def test_label_images_belong_to_pictures_in_pooled_order(pack_module, regions):
    reference = pack_module("attention.reference")
    parts = [
        reference.ReferencePart(torch.zeros(n, 4, 2, 2), (0,), weight) for n, weight in ((2, 1.0), (1, 0.0), (1, 1.0))
    ]
    style = reference.Reference(tuple(parts))
    maps = torch.arange(4)[:, None, None].expand(4, 3, 3)
    found = reference.part_labels(style, regions.Regions(maps, maps[:1], 4))
    assert [of_part[:, 0, 0].tolist() for of_part in found] == [[0, 1], [3]]
    with pytest.raises(ValueError, match="regions: 3 reference label images for 4 style pictures"):
        reference.check_regions(style, regions.Regions(maps[:3], maps[:1], 4))
