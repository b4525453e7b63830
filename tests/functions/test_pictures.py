"""The example pictures: shapes, what each looks like in coarse numbers, labels that AD Regions reads."""

import asyncio
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from demo_model.sample_reference import sample_reference
from PIL import Image

NAMES = (
    "texture: scales", "texture: pebbles", "texture: wood", "texture: weave", "texture: two", "style: brush strokes",
    "style: watercolour", "scene: still life", "labels: halves", "labels: disc",
)  # fmt: skip
"""What saved workflows hold: a name stays, a new one may be added behind."""

TEMPLATES = sorted((Path(__file__).parents[2] / "workflows").glob("*.json"))

SCALES = (0.33954, 0.35106, 0.28930)
"""The mean colour of the picture that the demo was measured with."""


@pytest.fixture(scope="module")
def node(pack):
    """The node as ComfyUI gets it."""
    extension = asyncio.run(pack.comfy_entrypoint())
    (found,) = (one for one in asyncio.run(extension.get_node_list()) if one.__name__ == "ADExampleReference")
    return found


@pytest.fixture(scope="module")
def tracer(pack_module):
    """What draws the still life."""
    return pack_module("pictures.tracer")


@pytest.fixture
def ball(tracer):
    """A ball of radius 1 around 0, as the lathe makes it of a half circle."""
    corners = tuple((np.sin(turn), -np.cos(turn)) for turn in np.linspace(0, np.pi, 41))
    distance, middle, radius = tracer.turned(corners)
    return tracer.Thing(distance, tracer.vector(0, middle, 0), radius, colour=None)


@pytest.fixture(scope="module")
def made(node):
    """Every picture that the node's schema offers, through the way that ComfyUI's execution goes."""
    combo, _ = node.define_schema().inputs
    clone = node.PREPARE_CLASS_CLONE(None)
    return {name: clone.EXECUTE_NORMALIZED(picture=name)[0] for name in combo.options}


def test_the_combo_offers_what_workflows_hold(node):
    combo, _ = node.define_schema().inputs
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


def test_a_picture_of_ones_own_takes_its_place(node):
    """Whatever the combo says; without its alpha."""
    own = torch.rand(2, 30, 40, 4)
    given = node.PREPARE_CLASS_CLONE(None).EXECUTE_NORMALIZED(picture="texture: scales", image=own)[0]
    assert torch.equal(given, own[..., :3])


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


def test_two_is_scales_beside_pebbles(made):
    two = made["texture: two"]
    assert torch.equal(two[:, :, :256], made["texture: scales"][:, :, :256])
    assert torch.equal(two[:, :, 256:], made["texture: pebbles"][:, :, 256:])


def test_the_halves_of_two_have_colours_of_their_own(made):
    """So that each place of a result shows which half it took after."""
    left, right = (made["texture: two"][0, :, half].reshape(-1, 3) for half in (slice(256), slice(256, 512)))
    saturation = [(half.amax(1) - half.amin(1)).mean().item() for half in (left, right)]
    assert saturation[0] > 2 * saturation[1], saturation


def test_a_ray_meets_a_turned_ball_where_geometry_says(tracer, ball):
    """A half circle on the lathe is a ball; rays beside it meet nothing."""
    across = np.linspace(-1.4, 1.4, 57, dtype=np.float32)
    origins = np.stack([across, np.full_like(across, 0.2), np.full_like(across, -4)], axis=1)
    met = tracer.arrivals(ball, origins, np.broadcast_to(tracer.vector(0, 0, 1), origins.shape))
    beside = 1 - across**2 - 0.2**2
    inside, outside = beside > 0.02, beside < -0.02
    assert inside.sum() > 20 and outside.sum() > 10
    assert met[inside] == pytest.approx(4 - np.sqrt(beside[inside]), abs=0.01)
    assert np.isinf(met[outside]).all()
    points = origins[inside] + met[inside, None] * tracer.vector(0, 0, 1)
    assert np.abs(tracer.normals(ball, points) - tracer.unit(points)).max() < 0.03


def test_behind_a_ball_lies_a_soft_shadow_and_below_it_a_dark_corner(tracer, ball):
    """The light comes from above; the floor lies at -1."""
    across = np.linspace(0, 3, 61, dtype=np.float32)
    floor = np.stack([across, np.full_like(across, -1), np.zeros_like(across)], axis=1)
    seen = tracer.sunlight([ball], floor, tracer.vector(0, 1, 0), wide=0.2)
    assert (seen[across < 0.75] == 0).all() and (seen[across > 1.3] == 1).all() and (np.diff(seen) >= -1e-3).all()
    assert ((seen > 0.05) & (seen < 0.95)).sum() > 3, "the shadow's edge is sharp"
    free = tracer.openness([ball], floor, np.broadcast_to(tracer.vector(0, 1, 0), floor.shape))
    assert free[0] < 0.3 and (free[across > 1.5] == 1).all() and (np.diff(free) >= -1e-3).all()


def test_the_still_life_has_light_from_a_window_and_shadows(made):
    """What is to be painted: a bright window above on the left, dark and bright, cold and warm places."""
    cells = coarse(made["scene: still life"])
    assert cells[0, 1].mean() > 1.2 * cells[0, 3:5].mean(), "there is no window"
    assert cells[0, 1, 2] > cells[0, 1, 0], "the sky is not blue"
    grey = made["scene: still life"].mean(-1)
    assert grey.quantile(0.05) < 0.25 and grey.quantile(0.95) > 0.7
    warm = made["scene: still life"][..., 0] - made["scene: still life"][..., 2]
    assert warm.quantile(0.05) < -0.02 and warm.quantile(0.95) > 0.4


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


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.stem)
def test_a_template_is_shown_by_a_square_picture(template):
    """The template browser crops others."""
    with Image.open(template.with_suffix(".jpg")) as picture:
        assert picture.width == picture.height >= 256
