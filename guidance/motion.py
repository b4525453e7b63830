"""How the content of a batch moves from frame to frame, and how noise is carried along with it.

Noise that stays in its place while the picture moves makes a texture that sticks to the screen, as if seen through a
shower door. Carried along, each place of the picture keeps its own.

Motion is in whole latent pixels, found by block matching. Carried noise is as white as it was: a frame takes some of
the values of the one before, each once at most and chosen without a look at them, and draws the rest anew.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from comfy.model_management import throw_exception_if_processing_interrupted

RADIUS = 6  # how far a place may go between two frames, in latent pixels along either axis
BLOCK = 5  # side of the blocks that are compared, in latent pixels
# In shares of a block's variance. Measured on the demo model, blocks half a latent pixel off differ by 0.2 to 0.3.
UNLIKE = 0.25  # blocks that differ by more are not of the same place
SAME = 0.15  # how much better a motion must fit than the picture's own to be preferred
ALIKE = 0.06  # blocks that differ by more are not in step, so that what one is made into does not fit the other
FLAT = 0.1  # blocks of less variance, in shares of the frame's, say nothing about motion


@dataclass(frozen=True)
class Motion:
    """Where each place of a picture comes from, frame by frame.

    Attributes:
        sources: of each frame but the first, the place in the frame before that each place shows, as an index into its
            flattened grid, [b - 1, h * w]; -1 where that frame does not show it. No place is a source twice in a frame.
        fit: how well each place fits its source, 0 to 1, [b - 1, h * w]; 0 where it has none.
    """

    sources: torch.Tensor
    fit: torch.Tensor

    def carried(self, before: torch.Tensor, own: torch.Tensor, frame: int) -> torch.Tensor:
        """What the frame before has, where the picture has gone to by now.

        Args:
            before: of the frame before, [c h w].
            own: the same of this frame, for places that the frame before does not show.
            frame: number of this frame, 1 or more.
        """
        source = self.sources[frame - 1].to(before.device)
        moved = before.flatten(1)[:, source.clamp(min=0)].reshape(before.shape)
        return torch.where((source >= 0).reshape(1, *before.shape[1:]), moved, own)

    def along(self, noise: torch.Tensor) -> torch.Tensor:
        """The first frame's noise, carried along through all frames; what comes into the picture brings its own.

        Args:
            noise: of each frame, [b c h w], independent of each other.
        """
        frames = [noise[0]]
        for number in range(1, len(noise)):
            frames.append(self.carried(frames[-1], noise[number], number))
        return torch.stack(frames)

    def held(self, changes: torch.Tensor, firmness: float) -> torch.Tensor:
        """What was changed, each frame drawn to what was changed in the one before; the first as it is.

        Args:
            changes: of each frame, [b c h w].
            firmness: how far a change goes to that of the frame before where the picture fits it, 0 to 1.
        """
        frames = [changes[0]]
        for number in range(1, len(changes)):
            own, fit = changes[number], self.fit[number - 1].to(changes)
            pull = firmness * fit.reshape(1, *own.shape[1:])
            frames.append(torch.lerp(own, self.carried(frames[-1], own, number), pull))
        return torch.stack(frames)


@torch.no_grad()
def find_motion(content: torch.Tensor) -> Motion:
    """How a picture moves, from its frames.

    Where blocks match in both directions, a place moves as its block does. Anywhere else, as where there is nothing to
    match, it moves as most of the frame does.

    Args:
        content: the frames, latents of any scale, [b c h w], two or more. Looked at on the CPU in float32: that gives
            the same motion on every machine.
    """
    content = content.detach().to("cpu", torch.float32)
    found = []
    for before, now in itertools.pairwise(content):
        throw_exception_if_processing_interrupted()
        found.append(_from(before, now))
    sources, fit = zip(*found, strict=True)
    return Motion(torch.stack(sources), torch.stack(fit))


def _from(before: torch.Tensor, now: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sources and fit of one frame, [h * w] both; both frames [c h w]."""
    here = torch.arange(now[0].numel())
    if torch.equal(now, before):
        return here, torch.ones(len(here))
    spread = before.std(dim=(1, 2), keepdim=True)
    before, now = (frame / torch.where(spread > 0, spread, 1) for frame in (before, now))
    ways = _ways(*now.shape[-2:])
    steps = torch.tensor([y * now.shape[-1] + x for y, x in ways])
    unlike = torch.stack([_unlike(before, now, way) for way in ways])
    back = torch.stack([_shifted(one, (-y, -x), math.inf) for one, (y, x) in zip(unlike, ways, strict=True)])
    texture, texture_back = _texture(now), _texture(before)
    most = _most_go(unlike, texture)
    way, sound = (found.flatten() for found in _best(unlike, texture, most))
    way_back, sound_back = (found.flatten() for found in _best(back, texture_back, most))

    source = here - steps[way]
    seen = source.clamp(0, len(here) - 1)  # what comes from outside is not sound
    matched = sound & sound_back[seen] & (way_back[seen] == way)  # one to one, since both agree
    taken = torch.zeros(len(here), dtype=torch.bool)
    taken[source[matched]] = True
    with_most = here - steps[most]
    inside = unlike[most].flatten().isfinite()
    free = inside & ~taken[torch.where(inside, with_most, 0)]
    sources = torch.where(matched, source, torch.where(free, with_most, -1))

    way = torch.where(matched, way, most)
    differs = unlike.flatten(1).gather(0, way[None])[0] / texture.flatten().clamp(min=FLAT)
    return sources, torch.where(sources >= 0, (1 - differs / ALIKE).clamp(min=0), 0)


def _ways(height: int, width: int) -> list[tuple[int, int]]:
    """How a place may go, (down, right) in latent pixels, the shortest way first."""
    down, right = (range(-min(RADIUS, side - 1), min(RADIUS, side - 1) + 1) for side in (height, width))
    return sorted(itertools.product(down, right), key=lambda way: (way[0] ** 2 + way[1] ** 2, way))


def _shifted(picture: torch.Tensor, way: Sequence[int], outside: float) -> torch.Tensor:
    """A picture after it has gone a way, [... h w]."""
    (y, x), (height, width) = way, picture.shape[-2:]
    around = F.pad(picture, (max(x, 0), max(-x, 0), max(y, 0), max(-y, 0)), value=outside)
    return around[..., max(-y, 0) : max(-y, 0) + height, max(-x, 0) : max(-x, 0) + width]


def _block_mean(picture: torch.Tensor) -> torch.Tensor:
    """The mean over the block around each place, of what of it lies in the picture, [c h w]."""
    return F.avg_pool2d(picture, BLOCK, 1, BLOCK // 2, count_include_pad=False)


def _texture(frame: torch.Tensor) -> torch.Tensor:
    """The variance of the block around each place, mean over channels, [h w]."""
    return (_block_mean(frame.square()) - _block_mean(frame).square()).clamp(min=0).mean(dim=0)


def _unlike(before: torch.Tensor, now: torch.Tensor, way: Sequence[int]) -> torch.Tensor:
    """Mean squared difference of each block to the one that a way comes from, [h w]; infinite from outside."""
    known = _shifted(torch.ones_like(now[:1]), way, 0.0)
    difference = (now - _shifted(before, way, 0.0)).square().mean(dim=0, keepdim=True) * known
    return torch.where(known > 0, _block_mean(difference) / _block_mean(known), math.inf)[0]


def _best(unlike: torch.Tensor, texture: torch.Tensor, favoured: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The way that each place goes, and whether that is sure, [h w] both.

    Args:
        unlike: how badly each way fits, [ways h w].
        texture: as from `_texture`.
        favoured: the way that others have to fit better than, by number.
    """
    others = torch.arange(len(unlike)) != favoured
    way = (unlike + others[:, None, None] * SAME * texture.clamp(min=FLAT)).argmin(dim=0)
    own = unlike.gather(0, way[None])[0]
    return way, (texture >= FLAT) & (own <= UNLIKE * texture)


def _most_go(unlike: torch.Tensor, texture: torch.Tensor) -> int:
    """The way that fits a frame as a whole best, by number; 0, which stands still, unless another is clearly better."""
    says = texture >= FLAT
    if not says.any():
        return 0
    misfit = (unlike[:, says] / texture[says]).clamp(max=1).mean(dim=1)  # what goes another way says no more than that
    misfit[1:] += SAME
    return int(misfit.argmin())
