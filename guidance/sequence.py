"""Sequences: a batch that is one picture moving. Each frame holds on to the one before, so that texture does not boil.

The frame before is one more reference: its keys and values in the same pass, which no gradient goes back to. So frames
are made side by side, and the first one as if it were alone. Noise, too, is the frame before's, carried along with what
moves in the content.
"""

from collections.abc import Hashable, Sequence

import torch

from ..attention.bank import TokenBank
from ..attention.capture import LayerFeatures
from ..attention.frames import without_frame
from ..attention.reference import Reference
from ..losses.distillation import QueryGroup
from .motion import Motion, find_motion
from .settings import GuidanceSettings


def motion_of(settings: GuidanceSettings, content: Reference | None, latent: torch.Tensor) -> Motion | None:
    """How the picture moves; None where it is not one picture moving.

    Its content says so: the references that have a picture for each frame, or else the latent that it starts from. The
    latter counts even where it is noised away, since what is left of it may come in by ControlNet.

    Args:
        latent: [b c h w] or [b c 1 h w], of any scale; all alike is a picture that stands still.
    """
    frames = len(latent)
    if settings.frames == 0 or frames == 1:
        return None
    parts = () if content is None or settings.content_weight == 0 else content.active_parts
    shown = [part.latent for part in parts if len(part.latent) == frames]
    return find_motion(torch.cat([one.cpu() for one in shown], dim=1) if shown else without_frame(latent))


def noise_along(motion: Motion | None, noise: torch.Tensor) -> torch.Tensor:
    """The noise of each frame, [b c h w] or [b c 1 h w]: what differs between frames is what moves in the content."""
    return noise if motion is None else motion.along(without_frame(noise)).reshape(noise.shape)


def with_frame_before(
    features: LayerFeatures,
    groups: Sequence[QueryGroup],
    offers: Sequence[TokenBank],
    kinds: Sequence[Hashable],
    weight: float,
) -> tuple[list[QueryGroup], list[TokenBank]]:
    """Groups of tokens and what they look at, where each frame but the first looks at the one before, too.

    A token looks at those of the frame before that are in a group of the same kind: a style that counts in one place
    does not come into another by way of a frame.

    Args:
        features: of the frames in a layer; what is taken of them is detached.
        groups, offers: as `region_target` takes them. A group is for all frames or for one.
        kinds: of each offer, what groups it is for.
        weight: of the frame before, above 0, as if it were one more reference.
    """
    frames = len(features.q)
    k, v = features.k.detach(), features.v.detach()
    seen = None if features.seen is None else features.seen.all(dim=0)
    tokens_of = {(items.start, kinds[label]): tokens for items, tokens, label in groups}
    held, looks_at = [], []

    def add(items: slice, tokens: torch.Tensor | slice, offer: TokenBank) -> None:
        held.append(QueryGroup(items, tokens, len(looks_at)))
        looks_at.append(offer)

    for items, tokens, label in groups:
        first, end, _ = items.indices(frames)
        offer = offers[label]
        if first == 0:
            add(slice(0, 1), tokens, offer)
        later = slice(max(first, 1), end)
        if later.start == later.stop:
            continue
        of_before = tokens if end - first > 1 else tokens_of.get((first - 1, kinds[label]))
        if of_before is not None:
            before = slice(later.start - 1, later.stop - 1)
            offer = offer.with_frame_before(
                k[before][:, :, of_before],
                v[before][:, :, of_before],
                weight,
                None if seen is None else seen[of_before],
            )
        add(later, tokens, offer)
    return held, looks_at
