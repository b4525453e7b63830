"""The example pictures: shapes, what each looks like in coarse numbers, labels that AD Regions reads."""

import asyncio
import itertools

import numpy as np
import pytest
import torch
from demo_model.sample_reference import sample_reference

NAMES = (
    "texture: scales", "texture: pebbles", "texture: wood", "texture: weave", "texture: two", "style: brush strokes",
    "style: watercolour", "scene: still life", "labels: halves", "labels: disc",
)  # fmt: skip
"""What saved workflows hold: a name stays, a new one may be added behind."""

SCALES = (0.33954, 0.35106, 0.28930)
"""The mean colour of the picture that the demo was measured with."""


@pytest.fixture(scope="module")
def node(pack):
    """The node as ComfyUI gets it."""
    extension = asyncio.run(pack.comfy_entrypoint())
    (found,) = (one for one in asyncio.run(extension.get_node_list()) if one.__name__ == "ADExampleReference")
    return found


@pytest.fixture(scope="module")
def made(node):
    """Every picture that the node's schema offers, through the way that ComfyUI's execution goes."""
    (combo,) = node.define_schema().inputs
    clone = node.PREPARE_CLASS_CLONE(None)
    return {name: clone.EXECUTE_NORMALIZED(picture=name)[0] for name in combo.options}


def test_the_combo_offers_what_workflows_hold(node):
    (combo,) = node.define_schema().inputs
    assert tuple(combo.options)[: len(NAMES)] == NAMES
    assert combo.default == "texture: scales"


@pytest.mark.parametrize("name", NAMES)
def test_each_is_a_picture_and_always_the_same_one(name, made, node):
    picture = made[name]
    assert picture.shape == (1, 512, 512, 3) and picture.dtype == torch.float32
    assert picture.min() >= 0 and picture.max() <= 1 and picture.std() > 0.1
    state = np.random.get_state()[1].copy()
    again = node.PREPARE_CLASS_CLONE(None).EXECUTE_NORMALIZED(picture=name)[0]
    assert torch.equal(again, picture)
    assert np.array_equal(np.random.get_state()[1], state), "it draws from the numbers of others"


def coarse(picture):
    """The mean colours of 8x8 cells."""
    return picture[0].unflatten(0, (8, 64)).unflatten(2, (8, 64)).mean((1, 3))


def test_no_two_are_alike(made):
    for one, other in itertools.combinations(NAMES, 2):
        assert (coarse(made[one]) - coarse(made[other])).abs().mean() > 0.04, (one, other)


def test_the_scales_are_those_of_the_demo(made):
    """The numbers that were measured with the demo hold for this picture."""
    assert torch.equal(made["texture: scales"][0], torch.from_numpy(sample_reference()).float())
    assert made["texture: scales"].mean((0, 1, 2)).tolist() == pytest.approx(SCALES, abs=1e-3)


def test_two_is_scales_beside_wood(made):
    two = made["texture: two"]
    assert torch.equal(two[:, :, :256], made["texture: scales"][:, :, :256])
    assert torch.equal(two[:, :, 256:], made["texture: wood"][:, :, 256:])


def test_the_disc_takes_after_the_left_half(made, pack_module):
    """Both label maps have the same two colours; white is a mask."""
    regions = pack_module("attention.regions").read_regions(made["labels: halves"], made["labels: disc"])
    assert regions.count == 2
    (left,), (right,) = regions.reference[0, :, :256].unique().tolist(), regions.reference[0, :, 256:].unique().tolist()
    disc = regions.target[0] == left
    assert ((regions.target[0] == right) == ~disc).all() and left != right
    assert disc[256, 256] and not disc[0, 0] and 0.25 < disc.float().mean() < 0.5
    assert torch.equal(disc, made["labels: disc"][0, :, :, 0] == 1)


def test_an_unknown_name_is_refused(node):
    with pytest.raises(ValueError, match=r"^picture: 'texture: sand' is not one of texture: scales, "):
        node.PREPARE_CLASS_CLONE(None).EXECUTE_NORMALIZED(picture="texture: sand")
