"""How a picture moves from frame to frame, and that noise carried along with it is as white as before."""

import pytest
import torch
import torch.nn.functional as F

SIDE = 24


@pytest.fixture(scope="module")
def motion(pack_module):
    """The module under test."""
    return pack_module("guidance.motion")


def scenery(seed, height=SIDE, width=SIDE):
    """A latent with structure at several sizes, [4 h w]."""
    generator = torch.Generator().manual_seed(seed)
    layers = (torch.randn(1, 4, height // n + 2, width // n + 2, generator=generator) for n in (1, 2, 5))
    return sum(F.interpolate(layer, size=(height, width), mode="bilinear")[0] for layer in layers)


def noises(frames, height=SIDE, width=SIDE, channels=4):
    return torch.randn(frames, channels, height, width, generator=torch.Generator().manual_seed(9))


def pan(down, right, frames=3):
    """Frames in which the picture goes by so many latent pixels a frame."""
    around = scenery(1, SIDE + 2 * abs(down), SIDE + 2 * abs(right))
    at = [(n if way < 0 else 2 - n) * abs(way) for n in range(frames) for way in (down, right)]
    return torch.stack([around[:, y : y + SIDE, x : x + SIDE] for y, x in zip(at[::2], at[1::2], strict=True)])


def gone(picture, down, right):
    """A picture that has gone so far, and where something of it is."""
    moved = torch.roll(picture, (down, right), (-2, -1))
    known = torch.roll(F.pad(torch.ones(SIDE, SIDE), (6, 6, 6, 6)), (down, right), (0, 1))[6:-6, 6:-6] > 0
    return moved, known


@pytest.mark.parametrize("way", [(0, -1), (0, 3), (2, 0), (-3, 2), (6, -6)])
def test_noise_goes_with_a_pan_by_whole_latent_pixels(motion, way):
    """Every value of it, through all frames; what comes into the picture has noise of its own."""
    noise = noises(3)
    found = motion.find_motion(pan(*way))
    carried = found.along(noise)
    assert carried[0].equal(noise[0])
    for n in (1, 2):
        moved, known = gone(carried[n - 1], *way)
        assert carried[n].equal(torch.where(known, moved, noise[n]))
        assert found.fit[n - 1].reshape(SIDE, SIDE).equal(known.float())


@pytest.mark.parametrize("picture", ["stands", "is flat", "is cut to another"])
def test_noise_stays_in_its_place_where_nothing_is_seen_to_move(motion, picture):
    frames = {
        "stands": scenery(1).expand(3, -1, -1, -1),
        "is flat": torch.tensor([0.1, 0.2, 0.3])[:, None, None, None].expand(-1, 4, SIDE, SIDE),
        "is cut to another": torch.stack([scenery(n) for n in range(3)]),
    }[picture]
    found, noise = motion.find_motion(1e3 * frames + 7), noises(3)
    assert found.along(noise).equal(noise[:1].expand(3, -1, -1, -1))
    assert found.fit.unique().tolist() == [float(picture == "stands")]


def test_what_moves_before_what_stands_takes_its_noise_along(motion):
    """Where it was, there is new noise: no value is used twice."""
    frames = scenery(1).expand(2, -1, -1, -1).clone()
    for n, frame in enumerate(frames):
        frame[:, 6:16, 4 + 3 * n : 14 + 3 * n] = scenery(2)[:, :10, :10]
    noise = noises(2)
    carried = motion.find_motion(frames).along(noise)[1]
    assert carried[:, 8:14, 9:15].equal(noise[0, :, 8:14, 6:12])
    assert carried[:, :4].equal(noise[0, :, :4])
    assert carried[:, 18:].equal(noise[0, :, 18:])
    assert carried[:, 8:14, 6:9].equal(noise[1, :, 8:14, 6:9])


def test_flat_parts_go_with_the_rest(motion):
    """A sky has nothing to match, and the noise on it goes with the pan."""
    frames = pan(0, -2)
    frames[:, :, :10] = 0.5
    noise = noises(3)
    moved, known = gone(noise[0], 0, -2)
    assert motion.find_motion(frames).along(noise)[1].equal(torch.where(known, moved, noise[1]))


@pytest.mark.parametrize("picture", ["pan", "zoom", "turmoil"])
def test_carried_noise_stays_white(motion, picture):
    """Mean, variance, no likeness of neighbours or channels."""
    frames = {
        "pan": lambda: pan(1, -2),
        "zoom": lambda: torch.stack([
            F.interpolate(scenery(1)[None, :, n : SIDE - n, n : SIDE - n], size=(SIDE, SIDE), mode="bilinear")[0]
            for n in range(3)
        ]),
        "turmoil": lambda: torch.cat([pan(0, 1)[:, :, :8], pan(0, -1)[:, :, 8:16], pan(1, 1)[:, :, 16:]], dim=2),
    }[picture]()  # fmt: skip
    found = motion.find_motion(frames)
    assert not found.sources.equal(torch.arange(SIDE * SIDE).expand(2, -1)), "something moves"
    noise = noises(3, channels=256)
    carried = found.along(noise)[2].double()
    for sources in found.sources:
        assert sources[sources >= 0].bincount().max() == 1, "no value twice"
    assert abs(carried.mean()) < 0.01
    assert carried.var() == pytest.approx(1, abs=0.01)
    for one, other in (
        (carried[:, 1:], carried[:, :-1]),
        (carried[..., 1:], carried[..., :-1]),
        (carried[:, 1:, 1:], carried[:, :-1, :-1]),
        (carried[1:], carried[:-1]),
    ):
        assert abs((one * other).mean()) < 0.01


def test_changes_are_drawn_to_those_of_the_frame_before_where_it_fits(motion):
    """As far as said; not at all between places that are half a latent pixel off."""
    changes = noises(3)
    held = motion.find_motion(pan(0, -1)).held(changes, 0.75)
    assert held[0].equal(changes[0])
    for n in (1, 2):
        moved, known = gone(held[n - 1], 0, -1)
        torch.testing.assert_close(held[n], torch.where(known, torch.lerp(changes[n], moved, 0.75), changes[n]))
    wide = F.interpolate(scenery(3)[None], scale_factor=2, mode="bilinear")[0]
    between = torch.stack([F.avg_pool2d(wide[:, :, n : n + 40], 2) for n in range(2)])
    assert motion.find_motion(between).fit.mean() < 0.3
